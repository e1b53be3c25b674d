// The portable tier: the compiler's vectors and plain loops.
#define SEC_LANES 4
#define SEC_ROWS 4
#include "generic.h"

namespace secateur {
namespace {

// Weights of an output lie one behind the other: sums of products of shorts are what compilers vectorise.
static void pack(Precision precision, const float* weight, Map& map) {
    if (precision != INT8) return generic_pack(precision, weight, map);
    pack_int8(weight, map, [&](int n, int k) { return (size_t)n * map.deep + k; });
}

template <Activation A>
static void int8_product(const void* input, const float* scale, int rows, const Map& map, Rows to, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int column = 0; column < map.wide; column += 16)
        for (int row = 0; row < rows; row++) {
            const int8_t* from = (const int8_t*)input + (size_t)row * map.deep;
            int32_t sums[16];
            for (int n = 0; n < 16; n++) {
                const int8_t* weights = (const int8_t*)map.weights + (size_t)(column + n) * map.deep;
                int32_t sum = 0;
                for (int k = 0; k < map.deep; k++) sum += (int16_t)from[k] * (int16_t)weights[k];
                sums[n] = sum;
            }
            finish_whole<A>(sums, scale[row], row, column, map, to);
        }
}

}  // namespace

const Kernels portable_kernels = {"portable",       generic_attention_scratch, generic_packed_bytes, pack,
                                  generic_prepare,  product,                   generic_attention,    generic_add_norm,
                                  generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
