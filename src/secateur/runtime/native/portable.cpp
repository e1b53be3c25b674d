// The portable tier: the compiler's vectors and plain loops. Weights of an output lie one behind the other: sums of products
// of shorts are what compilers vectorise.
#define SEC_LANES 4
#define SEC_ROWS 4
#define SEC_ROW_AFTER_ROW
#include "generic.h"

namespace secateur {
namespace {

template <Activation A, bool SIGNED>
static void byte_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels,
                         Team& team) {
    over_panels(map, panels, team, [&](int column, const Panel<int8_t>& panel) {
        for (int row = 0; row < rows; row++) {
            int32_t sums[WIDE];
            for (int n = 0; n < WIDE; n++) {
                const int8_t* weights = panel.from(n);
                int32_t sum = 0;
                for (int block = 0; block < panel.count; block++, weights += DEPTH) {
                    const int8_t* from = (const int8_t*)input + (size_t)row * map.deep + panel.steps[block] * DEPTH;
                    for (int k = 0; k < DEPTH; k++)
                        sum += (SIGNED ? (int16_t)from[k] : (int16_t)(uint8_t)from[k]) * (int16_t)weights[k];
                }
                sums[n] = sum;
            }
            for (int n = 0; n < WIDE; n += 16) finish_whole<A>(sums + n, scale, row, column + n, map, to);
        }
    });
}

}  // namespace

const Kernels portable_kernels = {
    "portable", false, false, generic_attention_scratch, generic_pack, generic_pack_signs,
    generic_prepare, product, generic_attention, generic_add_norm,
    generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
