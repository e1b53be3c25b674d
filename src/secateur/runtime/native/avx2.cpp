// The AVX2 tier: bytes are multiplied as |a| and sign(w, a), whose pairs never overflow 16 bits since both stay within 127;
// levels without a sign as they are, by signs.
#define SEC_LANES 8
#define SEC_ROWS 4
#include "generic.h"

namespace secateur {
namespace {

// R rows times 16 outputs.
template <int R, Activation A, bool SIGNED>
SEC_INLINE void byte_panel(const int8_t* input, const float* scale, int row, int column, const Panel<int8_t>& panel,
                           const Map& map, Rows to) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[R][2];
    SEC_UNROLL for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    const int8_t* weights = panel.from(column % WIDE);
    const int8_t* from = input + (size_t)row * map.deep;
    for (int block = 0; block < panel.count; block++) {
        const int begin = panel.steps[block] * DEPTH;
        for (int k = begin; k < begin + DEPTH; k += 4, weights += 64) {
            const __m256i low = _mm256_loadu_si256((const __m256i*)weights);
            const __m256i high = _mm256_loadu_si256((const __m256i*)(weights + 32));
            SEC_UNROLL for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, from + (size_t)r * map.deep + k, 4);
                const __m256i x = _mm256_set1_epi32(four), size = SIGNED ? _mm256_abs_epi8(x) : x;
                const __m256i a = _mm256_maddubs_epi16(size, SIGNED ? _mm256_sign_epi8(low, x) : low);
                const __m256i b = _mm256_maddubs_epi16(size, SIGNED ? _mm256_sign_epi8(high, x) : high);
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(a, ones));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(b, ones));
            }
        }
    }
    SEC_UNROLL for (int r = 0; r < R; r++) {
        int32_t held[16];
        memcpy(held, sums[r], sizeof held);
        finish_whole<A>(held, scale, row + r, column, map, to);
    }
}

template <Activation A, bool SIGNED>
static void byte_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels,
                         Team& team) {
    const int8_t* from = (const int8_t*)input;
    over_panels(map, panels, team, [&](int column, const Panel<int8_t>& panel) {
        for (int n = column; n < column + WIDE; n += 16) {
            int row = 0;
            for (; row + 4 <= rows; row += 4) byte_panel<4, A, SIGNED>(from, scale, row, n, panel, map, to);
            for (; row < rows; row++) byte_panel<1, A, SIGNED>(from, scale, row, n, panel, map, to);
        }
    });
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2", false, false, generic_attention_scratch, generic_pack, generic_pack_signs,
    generic_prepare, product, generic_attention, generic_add_norm,
    generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
