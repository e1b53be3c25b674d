// The AMX tier: int8 and bfloat16 products and attention in tiles of 16 rows of 64 bytes. fp32 is that of AVX-512.
#define SEC_LANES 16
#define SEC_ROWS 8
#include "generic.h"

namespace secateur {
namespace {

constexpr int TILE = 1024;  // bytes

struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

SEC_INLINE void configure() {
    const Configuration tiles;
    asm volatile("ldtilecfg %0" ::"m"(tiles) : "memory");  // the intrinsic does not clobber memory
}
SEC_INLINE void release() { asm volatile("tilerelease"); }
// The intrinsics do not tell the compiler which memory tiles are read from and written to.
SEC_INLINE void settle() { asm volatile("" ::: "memory"); }

// Inputs that lie in one row of a tile.
SEC_INLINE int step_of(Precision precision) { return precision == INT8 ? 64 : 32; }

static void pack(Precision precision, const float* weight, Map& map) {
    if (precision != BF16) return generic_pack(precision, weight, map);
    uint16_t* to = (uint16_t*)map.weights;  // panels of 16 outputs, pairs of inputs side by side
    for (int n = 0; n < map.wide; n++)
        for (int k = 0; k < map.deep; k++)
            put(to + (((size_t)(n / 16) * (map.deep / 2) + k / 2) * 16 + n % 16) * 2 + k % 2, weight_at(weight, map, n, k));
}

// Rows in tiles: 16 rows of 64 bytes, then the next 64 bytes of the same rows.
template <class From>
static void prepare_tiles(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale,
                          int threads) {
    const int steps = map.deep / step_of(precision);
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        const From* row = (const From*)from.data + (size_t)m * from.stride;
        char* to = (char*)input + ((size_t)(m / 16) * steps * 16 + m % 16) * 64;
        if (precision == INT8) {
            const float high = largest(row, map.in);
            scale[m] = high / 127;
            quantise(row, map.in, map.deep, high > 0 ? 127 / high : 0, 0,
                     [&](int k) { return (int8_t*)to + (size_t)(k / 64) * TILE + k % 64; });
        } else {
            for (int k = 0; k < map.deep; k += LANES) {
                uint16_t* at = (uint16_t*)(to + (size_t)(k / 32) * TILE) + k % 32;
                if (k + LANES <= map.in) {
                    store(at, load(row + k));
                } else {
                    for (int i = 0; i < LANES; i++) put(at + i, k + i < map.in ? one(row + k + i) : 0.0f);
                }
            }
        }
    }
}

static void prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale, int threads) {
    if (precision == FP32) return generic_prepare(precision, from, rows, map, input, scale, threads);
    (from.half ? prepare_tiles<uint16_t> : prepare_tiles<float>)(precision, from, rows, map, input, scale, threads);
}

// What is left to do of a block of 32 x 32 sums while the next one is computed.
struct Rest {
    const int32_t* sums = nullptr;
    int row = 0, rows = 0, done = 0, column = 0;
};

template <Precision P>
SEC_INLINE void write_rows(Rest& rest, int count, const float* scale, const Map& map, Activation activation, Rows to) {
    const int end = least(rest.rows, rest.done + count);
    for (; rest.done < end; rest.done++) {
        const int r = rest.done, row = rest.row + r;
        const int32_t* from = rest.sums + (r / 16) * 512 + (r % 16) * 16;
        for (int half = 0; half < 2; half++) {
            const int at = rest.column + half * LANES;
            const vi whole = *(const vi*)(from + half * 256);
            const vf bias = load(map.bias + at);
            const vf value = P == INT8 ? __builtin_convertvector(whole, vf) * (load(map.scale + at) * scale[row]) + bias
                                       : (vf)whole + bias;
            finish(to, row, at, value, activation);
        }
    }
}

template <Precision P>
static void tile_product(const void* input, const float* scale, int rows, const Map& map, Activation activation, Rows to,
                         int threads) {
    const int steps = map.deep / (P == INT8 ? 64 : 32), each = (32 + steps - 1) / steps;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        configure();
        alignas(64) int32_t sums[2][4 * 256];
        int turn = 0;
#pragma omp for schedule(dynamic, 1)
        for (int column = 0; column < map.wide; column += PANEL) {
            Rest rest;
            const char* low = (const char*)map.weights + (size_t)(column / 16) * steps * TILE;
            const char* high = low + (size_t)steps * TILE;
            for (int row = 0; row < rows; row += 32) {
                const bool second = rows - row > 16;
                const char* top = (const char*)input + (size_t)(row / 16) * steps * TILE;
                const char* bottom = top + (second ? (size_t)steps * TILE : 0);
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int k = 0; k < steps; k++) {
                    _tile_loadd(6, low + (size_t)k * TILE, 64);
                    _tile_loadd(4, top + (size_t)k * TILE, 64);
                    _tile_loadd(7, high + (size_t)k * TILE, 64);
                    if (second) _tile_loadd(5, bottom + (size_t)k * TILE, 64);
                    if constexpr (P == INT8) {
                        _tile_dpbssd(0, 4, 6);
                        _tile_dpbssd(1, 4, 7);
                        if (second) {
                            _tile_dpbssd(2, 5, 6);
                            _tile_dpbssd(3, 5, 7);
                        }
                    } else {
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        if (second) {
                            _tile_dpbf16ps(2, 5, 6);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                    }
                    if (rest.sums) write_rows<P>(rest, each, scale, map, activation, to);
                }
                if (rest.sums) write_rows<P>(rest, 32, scale, map, activation, to);
                int32_t* here = sums[turn ^= 1];
                _tile_stored(0, here, 64);
                _tile_stored(1, here + 256, 64);
                if (second) {
                    _tile_stored(2, here + 512, 64);
                    _tile_stored(3, here + 768, 64);
                }
                settle();
                rest = {here, row, least(32, rows - row), 0, column};
            }
            write_rows<P>(rest, 32, scale, map, activation, to);
        }
        release();
    }
}

static void product(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, int threads) {
    if (precision == INT8) return tile_product<INT8>(input, scale, rows, map, activation, to, threads);
    if (precision == BF16) return tile_product<BF16>(input, scale, rows, map, activation, to, threads);
    float_product<float>(input, rows, map, activation, to, threads);
}

// --- attention in tiles: heads whose width is a multiple of 32, of bfloat16 rows ----------------------------------

static size_t attention_scratch(int width, int tokens) {
    const size_t padded = up_to(tokens, 32);
    const size_t tiles = padded * width + padded * 16 + 16 * padded / 2 + 16 * (size_t)width + 4 * 64;
    return up_to((int)most((int)tiles, (int)generic_attention_scratch(width, tokens)), 64);
}

static void head_in_tiles(Rows qkv, const Attention& what, Rows to, int example, int h, float* scratch) {
    const int first = what.starts[example], tokens = what.starts[example + 1] - first;
    const int width = what.width, padded = up_to(tokens, 32), parts = width / 32, all = what.heads * width;
    const long stride = qkv.stride;
    const uint16_t* queries = (const uint16_t*)qkv.data + (size_t)first * stride + h * width;
    const uint16_t *keys = queries + all, *values = keys + all;
    uint32_t* turned = (uint32_t*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);  // a tile for 16 keys and 32 entries
    uint32_t* paired = turned + (size_t)padded * width / 2;                      // a tile for 32 values and 16 entries
    float* scores = (float*)(paired + (size_t)padded * width / 2);
    uint16_t* probabilities = (uint16_t*)(scores + (size_t)16 * padded);
    float* found = (float*)(probabilities + (size_t)16 * padded);
    for (int j = 0; j < padded; j += 16)
        for (int part = 0; part < parts; part++) {
            uint32_t* tile = turned + ((size_t)(j / 16) * parts + part) * 256;
            for (int key = 0; key < 16; key++)
                for (int r = 0; r < 16; r++) {
                    uint32_t pair = 0;
                    if (j + key < tokens) memcpy(&pair, keys + (size_t)(j + key) * stride + part * 32 + r * 2, 4);
                    tile[r * 16 + key] = pair;
                }
        }
    for (int j = 0; j < padded; j += 32)
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < width / 16; c++) {
                const int low = j + 2 * r, high = low + 1;
                vu even = {}, odd = {};
                if (low < tokens) even = __builtin_convertvector(*(const vh*)(values + (size_t)low * stride + c * 16), vu);
                if (high < tokens) odd = __builtin_convertvector(*(const vh*)(values + (size_t)high * stride + c * 16), vu);
                *(vu*)(paired + ((size_t)(j / 32) * (width / 16) + c) * 256 + r * 16) = even | (odd << 16);
            }
    settle();
    const AttentionRun<uint16_t> run{qkv, to, what};
    for (int i = 0; i < tokens; i += 16) {
        const int count = least(16, tokens - i);
        const uint16_t* query = queries + (size_t)i * stride;  // rows behind the last token are read and not used
        for (int j = 0; j < padded; j += 16) {
            _tile_zero(0);
            for (int part = 0; part < parts; part++) {
                _tile_loadd(4, query + part * 32, stride * 2);
                _tile_loadd(6, turned + ((size_t)(j / 16) * parts + part) * 256, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, scores + j, (long)padded * 4);
        }
        settle();
        float inverse[16];
        for (int r = 0; r < count; r++) {
            float* row = scores + (size_t)r * padded;
            for (int j = 0; j < padded; j += LANES) store(row + j, load(row + j) * what.scaling);
            inverse[r] = run.softmax(row, tokens, padded, h, i + r);
            for (int j = 0; j < padded; j += LANES) store(probabilities + (size_t)r * padded + j, load(row + j));
        }
        settle();
        for (int c = 0; c < width / 16; c++) {
            _tile_zero(0);
            for (int j = 0; j < padded; j += 32) {
                _tile_loadd(4, probabilities + j, (long)padded * 2);
                _tile_loadd(6, paired + ((size_t)(j / 32) * (width / 16) + c) * 256, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, found + c * 16, width * 4);
        }
        settle();
        for (int r = 0; r < count; r++)
            for (int c = 0; c < width; c += LANES)
                store((uint16_t*)to.data + (size_t)(first + i + r) * to.stride + h * width + c,
                      load(found + (size_t)r * width + c) * inverse[r]);
    }
}

static void attention(Rows qkv, const Attention& what, Rows to, int threads) {
    if (!qkv.half || what.width % 32) return generic_attention(qkv, what, to, threads);
    const int jobs = what.examples * what.heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        configure();
#pragma omp for schedule(dynamic, 1)
        for (int job = 0; job < jobs; job++)
            head_in_tiles(qkv, what, to, job / what.heads, job % what.heads,
                          what.scratch + what.scratch_each * omp_get_thread_num());
        release();
    }
}

}  // namespace

const Kernels amx_kernels = {"amx",   attention_scratch, generic_packed_bytes, pack,
                             prepare, product,           attention,            generic_add_norm};

}  // namespace secateur
