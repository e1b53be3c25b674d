// The AMX tier: int8 and bfloat16 products and attention in tiles of 16 rows of 64 bytes. fp32 is that of AVX-512.
#define SEC_OWN_PRODUCT
#define SEC_TILES
#define SEC_LANES 16
#define SEC_ROWS 8
#include "generic.h"

namespace secateur {
namespace {

constexpr int TILE = 1024;  // bytes
constexpr size_t NEAREST = 40 << 10;  // bytes of the nearest cache that tiles may fill
constexpr int RING = 8;         // tiles
constexpr int FURTHER = 3072;   // bytes from the signs that are spread out to those that are asked for

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

static void pack(Precision precision, const float* weight, Map& map) {
    if (precision != BF16) return generic_pack(precision, weight, map);
    auto place = [](int n, int k, int deep) {  // 16 outputs, pairs of inputs side by side
        return (((size_t)(n / 16) * (deep / 2) + k / 2) * 16 + n % 16) * 2 + k % 2;
    };
    for (int n = 0; n < map.wide; n++)
        over_inputs(map, n, place, [&](int k, size_t at) { put((uint16_t*)map.weights + at, weight_at(weight, map, n, k)); });
}

// Rows of bfloat16 in tiles: 16 rows of 64 bytes, then the next 64 bytes of the same rows.
template <class From>
static void prepare_halves(Rows from, int rows, const Map& map, void* input, int threads) {
    const int steps = map.deep / 32;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        const From* row = (const From*)from.data + (size_t)m * from.stride;
        for (int k = 0; k < map.deep; k += LANES) {
            uint16_t* at = (uint16_t*)((char*)input + ((size_t)(m / 16) * steps + k / 32) * TILE + m % 16 * 64) + k % 32;
            if (k + LANES <= map.in) {
                store(at, load(row + k));
            } else {
                for (int i = 0; i < LANES; i++) put(at + i, k + i < map.in ? one(row + k + i) : 0.0f);
            }
        }
    }
}

static void prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale, int threads) {
    if (precision != BF16) return generic_prepare(precision, from, rows, map, input, scale, threads);
    (from.half ? prepare_halves<uint16_t> : prepare_halves<float>)(from, rows, map, input, threads);
}

// The weights of a panel, brought near a tile at a time while the panel before it is multiplied, which leaves vector units
// and memory free: asked for, or spread out where they are kept in fewer bytes.
template <Precision P>
struct Coming {
    Panel<char> panel;
    int tiles = 0, done = 0;
    const char* kept = nullptr;  // what is left to spread out
    const uint64_t* masks = nullptr;
    int8_t* to = nullptr;

    // `panels`: where to spread out, `place` bytes behind it.
    SEC_MEMBER void begin(const Map& map, int column, void* panels, size_t place) {
        constexpr int TILES = P == BF16 ? 2 : 1;
        const size_t first = (size_t)map.blocks[column / WIDE] * WIDE * DEPTH;
        panel = panel_of<char>(map, column);
        tiles = panel.count * 2 * TILES;
        done = 0;
        kept = panel.weights = (const char*)map.weights + first * TILES;
        if (P == BINARY) {
            kept = (const char*)map.weights + first / 8;
        } else if (P == INT8 && map.masks != nullptr) {
            kept = (const char*)map.weights + map.values[column / WIDE];
            masks = map.masks + first / 64;
        } else {
            return;
        }
        to = (int8_t*)panels + place;
        panel.weights = (const char*)to;
    }

    // Signs in the order of steps, two tiles each, into a ring that stays in the nearest cache: for weights that are
    // multiplied once. `first` is the panel's first tile, counted from the thread's first panel.
    SEC_MEMBER void go_round(int until, int8_t* ring, int first) {
        for (; done < until; done++) {
            const char* from = kept + (size_t)(done % 2 * (tiles / 2) + done / 2) * (TILE / 8);
            for (int i = 0; i < TILE / 8; i += 64) __builtin_prefetch(from + FURTHER + i);
            spread(from, TILE, ring + (first + done) % RING * TILE);
        }
    }

    SEC_MEMBER void go_on(int until) {
        for (; done < until; done++) {
            if (P == BINARY) {
                spread(kept, TILE, to);
                kept += TILE / 8;
                to += TILE;
            } else if (P == INT8 && masks != nullptr) {
                kept = (const char*)expand(masks, (const int8_t*)kept, TILE, to);
                masks += TILE / 64;
                to += TILE;
            } else {
                for (int i = 0; i < TILE; i += 64) __builtin_prefetch(kept + i, 0, 2);
                kept += TILE;
            }
        }
    }
};

// A block of 32 x 32 sums, written out row by row while the next one is computed.
template <Precision P, Activation A>
struct Finished {
    const int32_t* sums = nullptr;
    const float* scale = nullptr;
    int row = 0, rows = 0, column = 0, done = 0;
    vf gain[2], bias[2];

    SEC_INLINE void write(Finished& it, Rows to, int count) {
        const int end = least(it.rows, it.done + count);
        for (; it.done < end; it.done++) {
            const int32_t* from = it.sums + (it.done / 16) * 512 + (it.done % 16) * 16;
            const vf low = value(it, from, 0), high = value(it, from + 256, 1);
            const int row = it.row + it.done;
            if (P == BINARY) {
                finish<A>(to, row, it.column, low);
                finish<A>(to, row, it.column + LANES, high);
                continue;
            }
            uint16_t* at = (uint16_t*)to.data + (size_t)row * to.stride + it.column;
#ifdef __AVX512BF16__
            _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
            store(at, low);
            store(at + LANES, high);
#endif
        }
    }

    SEC_INLINE vf value(const Finished& it, const int32_t* from, int half) {
        const vi sums = *(const vi*)from;
        const vf whole = __builtin_convertvector(sums, vf);
        if (P == BINARY) return apart(whole * it.gain[half]) + it.bias[half];
        const vf found =
            P == INT8 ? whole * (it.gain[half] * it.scale[it.row + it.done]) + it.bias[half] : (vf)sums + it.bias[half];
        return activated<A, true>(found);
    }
};

template <Precision P, Activation A, bool SIGNED = true>
static void tile_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels,
                         int threads) {
    constexpr int TILES = P == BF16 ? 2 : 1;  // tiles of a block of 16 outputs
    const int bands = (rows + 31) / 32;
    const size_t stripe = (size_t)(map.deep / DEPTH) * TILES * TILE;  // 16 rows
    // Where a panel and 32 rows do not go into the nearest cache together, rows pass it by and the panel stays.
    const bool passing = bands > 1 && 4 * stripe > NEAREST;
    int free_column = 0;  // taken one ahead, so that each thread knows which panel comes next
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        configure();
        alignas(64) int32_t sums[2][4 * 256];
        int turn = 0, side = 0, first = 0;
        const size_t room = (size_t)WIDE * map.deep, mine = 2 * omp_get_thread_num() * room;
        const bool once = P == BINARY && bands == 1;
        int8_t* ring = once ? (int8_t*)panels + mine : nullptr;
        Coming<P> coming;
        auto take = [&] {
            const int column = __atomic_fetch_add(&free_column, WIDE, __ATOMIC_RELAXED);
            if (column < map.wide) coming.begin(map, column, panels, mine + (side ^= 1) * room);
            return column;
        };
        int column = take(), following;
        if (once)
            coming.go_round(least(RING - 2, coming.tiles), ring, 0);
        else if (coming.to != nullptr)
            coming.go_on(coming.tiles);
        for (; column < map.wide; column = following) {
            Coming<P> now = coming;
            const Panel<char> panel = now.panel;
            const int steps = panel.count * TILES, each = 32 / most(steps, 1) + 1;
            const char *low = panel.weights, *high = low + (size_t)steps * TILE;
            following = take();
            const int ahead = following < map.wide ? coming.tiles : 0;
            settle();
            Finished<P, A> last;
            last.scale = scale;
            last.column = column;
            for (int half = 0; half < 2; half++) {
                last.gain[half] = load(map.scale + column + half * LANES);
                last.bias[half] = load(map.bias + column + half * LANES);
            }
            for (int band = 0; band < bands; band++) {
                const int row = band * 32;
                const bool second = rows - row > 16;
                const char* top = (const char*)input + (size_t)(row / 16) * stripe;
                const char* bottom = top + (second ? stripe : 0);
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int k = 0; k < steps; k++) {
                    const size_t at = (size_t)k * TILE;
                    const size_t from = ((size_t)panel.steps[k / TILES] * TILES + k % TILES) * TILE;
                    _tile_loadd(6, once ? (const char*)ring + (first + 2 * k) % RING * TILE : low + at, 64);
                    if (passing) {
                        _tile_stream_loadd(4, top + from, 64);
                    } else {
                        _tile_loadd(4, top + from, 64);
                    }
                    _tile_loadd(7, once ? (const char*)ring + (first + 2 * k + 1) % RING * TILE : high + at, 64);
                    if (second && passing) {
                        _tile_stream_loadd(5, bottom + from, 64);
                    } else if (second) {
                        _tile_loadd(5, bottom + from, 64);
                    }
                    if constexpr (P != BF16 && !SIGNED) {
                        _tile_dpbusd(0, 4, 6);
                        _tile_dpbusd(1, 4, 7);
                        if (second) {
                            _tile_dpbusd(2, 5, 6);
                            _tile_dpbusd(3, 5, 7);
                        }
                    } else if constexpr (P != BF16) {
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
                    if (once) {
                        const int until = 2 * k + RING;  // over the two that were read just now
                        now.go_round(least(until, now.tiles), ring, first);
                        coming.go_round(least(until - now.tiles, ahead), ring, first + now.tiles);
                        settle();
                    } else {
                        coming.go_on(((band * steps + k + 1) * ahead) / (bands * steps));
                    }
                    if (last.sums != nullptr) last.write(last, to, each);
                }
                if (last.sums != nullptr) last.write(last, to, 32);
                int32_t* here = sums[turn ^= 1];
                _tile_stored(0, here, 64);
                _tile_stored(1, here + 256, 64);
                if (second) {
                    _tile_stored(2, here + 512, 64);
                    _tile_stored(3, here + 768, 64);
                }
                settle();
                last.sums = here;
                last.row = row;
                last.rows = least(32, rows - row);
                last.done = 0;
            }
            last.write(last, to, 32);
            if (coming.to != nullptr && !once) coming.go_on(ahead);  // of a panel without blocks
            first += now.tiles;
        }
        release();
    }
}

static void product(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, void* panels, int threads) {
    with_activation(activation, [&](auto known) {
        constexpr Activation A = decltype(known)::value;
        if (precision == INT8)
            tile_product<INT8, A>(input, scale, rows, map, to, panels, threads);
        else if (precision == BINARY && map.levels.low < 0)
            tile_product<BINARY, A, true>(input, scale, rows, map, to, panels, threads);
        else if (precision == BINARY)
            tile_product<BINARY, A, false>(input, scale, rows, map, to, panels, threads);
        else if (precision == BF16)
            tile_product<BF16, A>(input, scale, rows, map, to, panels, threads);
        else
            float_product<A, float>(input, rows, map, to, threads);
    });
}

// --- attention in tiles: heads whose width is a multiple of 32, of bfloat16 rows ----------------------------------

static size_t attention_scratch(int width, int tokens) {
    const size_t padded = up_to(tokens, 32);
    const size_t tiles = padded * width + padded * 16 + 16 * padded / 2 + 16 * (size_t)width + 2 * padded + 4 * 64;
    return up_to((int)most((int)tiles, (int)generic_attention_scratch(width, tokens)), 64);
}

// 16 keys of 32 entries as a tile: pairs of entries below each other. Keys from `count` on are 0.
SEC_INLINE void turn(const uint16_t* from, long stride, int count, uint32_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * 16, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * 16, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
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
        for (int part = 0; part < parts; part++)
            turn(keys + (size_t)j * stride + part * 32, stride, tokens - j, turned + ((size_t)(j / 16) * parts + part) * 256);
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
    float *held = found + (size_t)16 * width, *paid = run.begin_scores(held + padded, padded);
    for (int i = 0; i < tokens; i += 16) {
        const int count = least(16, tokens - i);
        const Keys seen = run.seen_by(first, tokens, i, count, 32);
        const uint16_t* query = queries + (size_t)i * stride;  // rows behind the last token are read and not used
        for (int j = seen.begin; j < seen.padded; j += 16) {
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
            const size_t at = (size_t)r * padded;
            float *row = scores + at;
            uint16_t* found_row = probabilities + at;
            inverse[r] = what.levels != nullptr ? run.softmax_levels(row, found_row, held, seen, h, i + r)
                                                : run.softmax_short(row, found_row, seen, h, i + r);
            if (paid != nullptr) run.count_in(found_row, what.levels != nullptr ? 1 : inverse[r], seen, tokens, i + r, paid);
        }
        settle();
        for (int c = 0; c < width / 16; c++) {
            _tile_zero(0);
            for (int j = seen.begin; j < seen.padded; j += 32) {
                _tile_loadd(4, probabilities + j, (long)padded * 2);
                _tile_loadd(6, paired + ((size_t)(j / 32) * (width / 16) + c) * 256, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, found + c * 16, width * 4);
        }
        settle();
        for (int r = 0; r < count; r++)
            for (int c = 0; c < width; c += LANES)
                run.write((size_t)(first + i + r) * to.stride + h * width + c, load(found + (size_t)r * width + c) * inverse[r],
                          LANES);
    }
    if (paid != nullptr) run.end_scores(paid, values, tokens, h, first);
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

const Kernels amx_kernels = {
    "amx", true, true, attention_scratch, pack, generic_pack_signs,
    prepare, product, attention, generic_add_norm,
    generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
