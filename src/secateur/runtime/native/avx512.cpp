// The AVX-512 tier: bytes by VNNI, whose left operand has no sign: inputs are raised by 128, and 128 Σ w taken away again.
#define SEC_LANES 16
#define SEC_ROWS 8
#include "generic.h"

namespace secateur {
namespace {

constexpr int RAISED = 128;

static void prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale, int threads) {
    (from.half ? prepare_rows<uint16_t> : prepare_rows<float>)(precision, from, rows, map, input, scale, RAISED, threads);
}

// R rows times 32 outputs.
template <int R, Activation A>
SEC_INLINE void int8_panel(const uint8_t* input, const float* scale, int row, int column, const Map& map,
                           Rows to) {
    const int8_t* low = (const int8_t*)map.weights + (size_t)column * map.deep;
    const int8_t* high = low + (size_t)LANES * map.deep;
    __m512i sums[R][2];
    SEC_UNROLL for (int r = 0; r < R; r++) {
        sums[r][0] = _mm512_slli_epi32(_mm512_loadu_si512(map.sums + column), 7);
        sums[r][1] = _mm512_slli_epi32(_mm512_loadu_si512(map.sums + column + LANES), 7);
        sums[r][0] = _mm512_sub_epi32(_mm512_setzero_si512(), sums[r][0]);
        sums[r][1] = _mm512_sub_epi32(_mm512_setzero_si512(), sums[r][1]);
    }
    const uint8_t* from = input + (size_t)row * map.deep;
    for (int k = 0; k < map.deep; k += 4) {
        const __m512i a = _mm512_loadu_si512(low + (size_t)k * LANES), b = _mm512_loadu_si512(high + (size_t)k * LANES);
        SEC_UNROLL for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, from + (size_t)r * map.deep + k, 4);
            const __m512i x = _mm512_set1_epi32(four);
            // the compiler's intrinsic copies registers around the instruction
            asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][0]) : "v"(x), "v"(a));
            asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][1]) : "v"(x), "v"(b));
        }
    }
    SEC_UNROLL for (int r = 0; r < R; r++)
        SEC_UNROLL for (int half = 0; half < 2; half++) {
            const int at = column + half * LANES;
            vf value = (vf)_mm512_cvtepi32_ps(sums[r][half]) * (load(map.scale + at) * scale[row + r]);
            finish<A>(to, row + r, at, value + load(map.bias + at));
        }
}

template <Activation A>
static void int8_product(const void* input, const float* scale, int rows, const Map& map, Rows to, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int column = 0; column < map.wide; column += PANEL) {
        int row = 0;
        for (; row + 8 <= rows; row += 8) int8_panel<8, A>((const uint8_t*)input, scale, row, column, map, to);
        for (; row < rows; row++) int8_panel<1, A>((const uint8_t*)input, scale, row, column, map, to);
    }
}

}  // namespace

const Kernels avx512_kernels = {"avx512", generic_attention_scratch, generic_packed_bytes, generic_pack,
                                prepare,  product,                   generic_attention,    generic_add_norm,
                                generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
