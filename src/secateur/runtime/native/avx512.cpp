// The AVX-512 tier: bytes by VNNI, whose left operand has no sign: inputs are raised by 128, and 128 Σ w taken away again.
#define SEC_LANES 16
#define SEC_ROWS 8
#define SEC_RAISED 128
#include "generic.h"

namespace secateur {
namespace {

// R rows times 32 outputs.
template <int R, Activation A, bool SIGNED>
SEC_INLINE void byte_panel(const uint8_t* input, const float* scale, int row, int column,
                           const Panel<int8_t>& panel, const Map& map, Rows to) {
    __m512i sums[R][2];
    SEC_UNROLL for (int r = 0; r < R; r++) SEC_UNROLL for (int half = 0; half < 2; half++) {
        const __m512i whole = _mm512_loadu_si512(map.sums + column + half * LANES);
        sums[r][half] = SIGNED ? _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(whole, 7)) : _mm512_setzero_si512();
    }
    const int8_t *low = panel.weights, *high = panel.from(LANES);
    const uint8_t* from = input + (size_t)row * map.deep;
    for (int block = 0; block < panel.count; block++) {
        const int begin = panel.steps[block] * DEPTH;
        for (int k = begin; k < begin + DEPTH; k += 4, low += 64, high += 64) {
            const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
            SEC_UNROLL for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, from + (size_t)r * map.deep + k, 4);
                const __m512i x = _mm512_set1_epi32(four);
                // the compiler's intrinsic copies registers around the instruction
                asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][0]) : "v"(x), "v"(a));
                asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][1]) : "v"(x), "v"(b));
            }
        }
    }
    SEC_UNROLL for (int r = 0; r < R; r++) SEC_UNROLL for (int half = 0; half < 2; half++) {
        const int at = column + half * LANES;
        finish_whole<A>((vi)sums[r][half], scale, row + r, at, map, to);
    }
}

template <Activation A, bool SIGNED>
static void byte_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels,
                         Team& team) {
    const uint8_t* from = (const uint8_t*)input;
    over_panels(map, panels, team, [&](int column, const Panel<int8_t>& panel) {
        int row = 0;
        for (; row + 8 <= rows; row += 8) byte_panel<8, A, SIGNED>(from, scale, row, column, panel, map, to);
        for (; row < rows; row++) byte_panel<1, A, SIGNED>(from, scale, row, column, panel, map, to);
    });
}

}  // namespace

const Kernels avx512_kernels = {
    "avx512", false, true, generic_attention_scratch, generic_pack, generic_pack_signs,
    generic_prepare, product, generic_attention, generic_add_norm,
    generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
