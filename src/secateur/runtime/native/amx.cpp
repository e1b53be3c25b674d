// The AMX tier: int8 and bfloat16 products and attention in tiles of 16 rows of 64 bytes. fp32 is that of AVX-512.
#define SEC_OWN_PRODUCT
#define SEC_TILES
#define SEC_LANES 16
#define SEC_ROWS 8
#include "amx_attention.h"
#include "generic.h"

namespace secateur {
namespace {

constexpr int TILE = 1024;  // bytes

static void pack(Precision precision, const float* weight, Map& map) {
    if (precision != BF16) return generic_pack(precision, weight, map);
    auto place = [](int n, int k, int) {  // pairs of inputs side by side
        return ((size_t)(k / 32) * 2 + n / 16) * 512 + k % 32 / 2 * 32 + n % 16 * 2 + k % 2;
    };
    for (int n = 0; n < map.wide; n++)
        over_inputs(map, n, place, [&](int k, size_t at) { put((uint16_t*)map.weights + at, weight_at(weight, map, n, k)); });
}

// Rows of bfloat16 in tiles: 16 rows of 64 bytes, then the next 64 bytes of the same rows.
template <class From>
static void prepare_halves(Rows from, int rows, const Map& map, void* input, Team& team) {
    const int steps = map.deep / 32;
    over(rows, 16, team, [&](int m, int) {
        const From* row = (const From*)from.data + (size_t)m * from.stride;
        for (int k = 0; k < map.deep; k += LANES) {
            uint16_t* at = (uint16_t*)((char*)input + ((size_t)(m / 16) * steps + k / 32) * TILE + m % 16 * 64) + k % 32;
            if (k + LANES <= map.in) {
                store(at, load(row + k));
            } else {
                for (int i = 0; i < LANES; i++) put(at + i, k + i < map.in ? one(row + k + i) : 0.0f);
            }
        }
    });
}

static void prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale, Team& team) {
    if (precision != BF16) return generic_prepare(precision, from, rows, map, input, scale, team);
    (from.half ? prepare_halves<uint16_t> : prepare_halves<float>)(from, rows, map, input, team);
}

constexpr size_t NEAREST = 40 << 10;  // bytes of the nearest cache that tiles may fill
constexpr int RING = 8;               // tiles
constexpr int FURTHER = 3072;         // bytes from the signs that are spread out to those that are asked for

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

    // Into a ring that stays in the nearest cache: for weights that are multiplied once. `before`: tiles of the panels before.
    SEC_MEMBER void go_round(int until, int8_t* ring, int before) {
        for (; done < until; done++) spread_out(ring + (before + done) % RING * TILE);
    }

    SEC_MEMBER void go_on(int until) {
        for (; done < until; done++) {
            if (to != nullptr) {
                spread_out(to);
                to += TILE;
            } else {
                for (int i = 0; i < TILE; i += 64) __builtin_prefetch(kept + i, 0, 2);
                kept += TILE;
            }
        }
    }

    SEC_MEMBER void spread_out(int8_t* tile) {
        if (P == BINARY) {
            for (int i = 0; i < TILE / 8; i += 64) __builtin_prefetch(kept + FURTHER + i);
            spread(kept, TILE, tile);
            kept += TILE / 8;
        } else {
            kept = (const char*)expand(masks, (const int8_t*)kept, TILE, tile);
            masks += TILE / 64;
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

    SEC_MEMBER void write(Rows to, int count) {
        const int end = least(rows, done + count);
        for (; done < end; done++) {
            const int32_t* from = sums + (done / 16) * 512 + (done % 16) * 16;
            const vf low = value(from, 0), high = value(from + 256, 1);
            if (P == BINARY) {
                finish<A>(to, row + done, column, low);
                finish<A>(to, row + done, column + LANES, high);
                continue;
            }
            uint16_t* at = (uint16_t*)to.data + (size_t)(row + done) * to.stride + column;
#ifdef __AVX512BF16__
            _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
            store(at, low);
            store(at + LANES, high);
#endif
        }
    }

    SEC_MEMBER vf value(const int32_t* from, int half) const {
        const vi bits = *(const vi*)from;
        const vf whole = __builtin_convertvector(bits, vf);
        if (P == BINARY) return apart(whole * gain[half]) + bias[half];
        const vf found = P == INT8 ? whole * (gain[half] * scale[row + done]) + bias[half] : (vf)bits + bias[half];
        return activated<A, true>(found);
    }
};

template <Precision P, Activation A, bool SIGNED = true>
static void tile_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels,
                         Team& team) {
    constexpr int TILES = P == BF16 ? 2 : 1;  // tiles of a block of 16 outputs
    const int bands = (rows + 31) / 32;
    const size_t stripe = (size_t)(map.deep / DEPTH) * TILES * TILE;  // 16 rows
    // Where a panel and 32 rows do not go into the nearest cache together, rows pass it by: of up to 1,280 bytes of inputs
    // the panel stays.
    const bool passing = bands > 1 && 4 * stripe > NEAREST;
    int free_column = 0;  // taken one ahead, so that each thread knows which panel comes next
    together(team, [&](int thread) {
        configure();
        alignas(64) int32_t sums[2][4 * 256];
        alignas(64) int8_t ring[RING * TILE];
        int turn = 0, side = 0, before = 0;  // tiles of the panels before
        const size_t room = (size_t)WIDE * map.deep, mine = 2 * thread * room;
        const bool once = bands == 1 && (P == BINARY || (P == INT8 && map.masks != nullptr));
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
                    const char* weights = panel.weights + (size_t)2 * k * TILE;
                    const size_t from = ((size_t)panel.steps[k / TILES] * TILES + k % TILES) * TILE;
                    _tile_loadd(6, once ? (const char*)ring + (before + 2 * k) % RING * TILE : weights, 64);
                    if (passing) {
                        _tile_stream_loadd(4, top + from, 64);
                    } else {
                        _tile_loadd(4, top + from, 64);
                    }
                    _tile_loadd(7, once ? (const char*)ring + (before + 2 * k + 1) % RING * TILE : weights + TILE, 64);
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
                        const int until = 2 * k + RING;  // over the two of the step before, which is settled
                        now.go_round(least(until, now.tiles), ring, before);
                        coming.go_round(least(until - now.tiles, ahead), ring, before + now.tiles);
                        settle();
                    } else {
                        coming.go_on(((band * steps + k + 1) * ahead) / (bands * steps));
                    }
                    if (last.sums != nullptr) last.write(to, each);
                }
                if (last.sums != nullptr) last.write(to, 32);
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
            last.write(to, 32);
            if (steps == 0 && once) coming.go_round(least(RING - 2, ahead), ring, before);
            if (steps == 0 && !once && coming.to != nullptr) coming.go_on(ahead);
            before += now.tiles;
        }
        release();
    });
}

static void product(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, void* panels, Team& team) {
    with_activation(activation, [&](auto known) {
        constexpr Activation A = decltype(known)::value;
        if (precision == INT8)
            tile_product<INT8, A>(input, scale, rows, map, to, panels, team);
        else if (precision == BINARY && map.levels.low < 0)
            tile_product<BINARY, A, true>(input, scale, rows, map, to, panels, team);
        else if (precision == BINARY)
            tile_product<BINARY, A, false>(input, scale, rows, map, to, panels, team);
        else if (precision == BF16)
            tile_product<BF16, A>(input, scale, rows, map, to, panels, team);
        else
            float_product<A, float>(input, rows, map, to, team);
    });
}

}  // namespace

const Kernels amx_kernels = {
    "amx", true, true, attention_scratch, pack, generic_pack_signs,
    prepare, product, attention, generic_add_norm,
    generic_add, generic_norm, generic_rotate, generic_multiply};

}  // namespace secateur
