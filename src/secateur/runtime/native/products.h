// Linear maps: weights packed in the order in which they are multiplied, rows brought into it, and products.
#pragma once
#include "vectors.h"

namespace secateur {
namespace {

// --- packing -------------------------------------------------------------------------------------------------------

static float weight_at(const float* weight, const Map& map, int out, int in) {
    return out < map.out && in < map.in ? weight[(size_t)out * map.in + in] : 0.0f;
}

// What is there of a panel's weights.
template <class Value>
struct Panel {
    const Value* weights;
    const int32_t* steps;  // where the inputs of each block begin, in blocks
    int count;             // of blocks

    // The weights of the panel's outputs from n on, where those of `n` lie one behind the other.
    const Value* from(int n) const { return weights + (size_t)n * count * DEPTH; }
};

template <class Value>
SEC_INLINE Panel<Value> panel_of(const Map& map, int column) {
    const int32_t* found = map.blocks + column / WIDE;
    return {(const Value*)map.weights + (size_t)found[0] * WIDE * DEPTH, map.steps + found[0], found[1] - found[0]};
}

// Calls `then` with each input of which output n has a weight, and where that goes: `place` says so within a panel.
template <class Place, class Then>
SEC_INLINE void over_inputs(const Map& map, int n, Place place, Then then) {
    const int begin = map.blocks[n / WIDE], count = map.blocks[n / WIDE + 1] - begin;
    for (int k = 0; k < count * DEPTH; k++)
        then(map.steps[begin + k / DEPTH] * DEPTH + k % DEPTH,
             (size_t)begin * WIDE * DEPTH + place(n % WIDE, k, count * DEPTH));
}

// Where a weight of one byte goes in its panel of `deep` inputs. 16 outputs, four inputs side by side, are what VNNI and
// AMX read; loops read an output's weights one behind the other.
SEC_INLINE size_t byte_place(int n, int k, int deep) {
#ifdef SEC_ROW_AFTER_ROW
    return (size_t)n * deep + k;
#elif defined SEC_TILES  // of each 64 inputs a tile for either half of the outputs
    return ((size_t)(k / 64) * 2 + n / 16) * 1024 + k % 64 / 4 * 64 + n % 16 * 4 + k % 4;
#else
    return (((size_t)(n / 16) * (deep / 4) + k / 4) * 16 + n % 16) * 4 + k % 4;
#endif
}

// And one that is multiplied as a float: outputs side by side, input after input.
SEC_INLINE size_t float_place(int n, int k, int deep) { return ((size_t)(n / PANEL) * deep + k) * PANEL + n % PANEL; }

// Signs in the order of bytes, a bit each; what is beyond a map is -1.
static void generic_pack_signs(const uint64_t* words, Map& map) {
    uint8_t* to = (uint8_t*)map.weights;
    memset(to, 0, (size_t)map.wide * map.deep / 8);
    const int each = up_to(map.in, 64) / 64;
    for (int n = 0; n < map.wide; n++) {
        map.sums[n] = -map.deep;
        over_inputs(map, n, byte_place, [&](int k, size_t at) {
            if (n >= map.out || k >= map.in || !(words[(size_t)n * each + k / 64] >> (k % 64) & 1)) return;
            to[at / 8] |= (uint8_t)(1 << at % 8);
            map.sums[n] += 2;
        });
    }
}

// Signs as bytes -1 and 1; `count` is a multiple of 64.
SEC_INLINE void spread(const void* signs, size_t count, int8_t* to) {
#ifdef __AVX512BW__
    const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
    for (size_t i = 0; i < count / 64; i++)
        _mm512_storeu_si512(to + 64 * i, _mm512_mask_blend_epi8(((const __mmask64*)signs)[i], minus, plus));
#else
    for (size_t i = 0; i < count / 8; i++) {
        // every byte gets all eight bits, keeps its own, and is 1 where that is set: then 2 x - 1
        const uint64_t all = (uint64_t)((const uint8_t*)signs)[i] * 0x0101010101010101u & 0x8040201008040201u;
        const uint64_t ones = ((((all & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu) | all) >> 7) & 0x0101010101010101u;
        const uint64_t bytes = ones | (0x0101010101010101u - ones) * 0xff;
        memcpy(to + 8 * i, &bytes, 8);
    }
#endif
}

// int8: a scale for each output.
static void pack_int8(const float* weight, Map& map) {
    int8_t* to = (int8_t*)map.weights;
    for (int n = 0; n < map.wide; n++) {
        float high = 0;
        for (int k = 0; k < map.in; k++) {
            float size = fabsf(weight_at(weight, map, n, k));
            high = size > high ? size : high;
        }
        map.scale[n] = high / 127;
        map.sums[n] = 0;
        const float factor = high > 0 ? 127 / high : 0;
        over_inputs(map, n, byte_place, [&](int k, size_t at) {
            to[at] = (int8_t)lrintf(weight_at(weight, map, n, k) * factor);
            map.sums[n] += to[at];
        });
    }
}

[[maybe_unused]] static void generic_pack(Precision precision, const float* weight, Map& map) {
    if (precision == INT8) return pack_int8(weight, map);
    for (int n = 0; n < map.wide; n++)
        over_inputs(map, n, float_place, [&](int k, size_t at) {
            if (precision == FP32)
                ((float*)map.weights)[at] = weight_at(weight, map, n, k);
            else
                put((uint16_t*)map.weights + at, weight_at(weight, map, n, k));
        });
}

// --- rows into what a product reads --------------------------------------------------------------------------------

// The largest size among numbers: without their signs they are in the order of the whole numbers that their bits make.
SEC_INLINE float largest(const float* from, int count) {
    vi high[2] = {};
    int k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES)
        for (int i = 0; i < 2; i++) {
            const vi bits = *(const vi*)(from + k + i * LANES) & 0x7fffffff;
            high[i] = bits > high[i] ? bits : high[i];
        }
    float found = highest((vf)(high[0] > high[1] ? high[0] : high[1]));
    for (; k < count; k++) found = fabsf(from[k]) > found ? fabsf(from[k]) : found;
    return found;
}
SEC_INLINE float largest(const uint16_t* from, int count) {
    typedef uint16_t vw __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
    vw high = {};
    int k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES) {
        const vw bits = *(const vw*)(from + k) & 0x7fff;
        high = bits > high ? bits : high;
    }
    float found = highest(larger((vf)((vu)high & 0xffff0000), (vf)((vu)high << 16)));
    for (; k < count; k++) found = fabsf(one(from + k)) > found ? fabsf(one(from + k)) : found;
    return found;
}

// Where a product reads byte k of a row.
SEC_INLINE size_t input_place(const Map& map, int row, int k) {
#ifdef SEC_TILES  // 16 rows of 64 bytes, then the next 64 bytes of the same rows
    return ((size_t)(row / 16) * (map.deep / 64) + k / 64) * 1024 + (size_t)(row % 16) * 64 + k % 64;
#else
    return (size_t)row * map.deep + k;
#endif
}

// A row times a factor, in whole numbers, as an int8 map reads them.
template <class From>
SEC_INLINE void quantise(const From* from, int row, const Map& map, float factor, void* input) {
    const int count = map.in;
    int k = 0;
#ifdef __AVX512BW__
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing goes by lanes
    for (; k + 64 <= count; k += 64) {
        __m512i found[4];
        for (int i = 0; i < 4; i++) found[i] = (__m512i)whole(load(from + k + 16 * i) * factor);
        const __m512i low = _mm512_packs_epi32(found[0], found[1]), high = _mm512_packs_epi32(found[2], found[3]);
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
        _mm512_storeu_si512((int8_t*)input + input_place(map, row, k), _mm512_add_epi8(bytes, _mm512_set1_epi8((char)SEC_RAISED)));
    }
#endif
    for (; k < map.deep; k += LANES) {
        float held[LANES] = {};
        vf x;
        if (k + LANES <= count) {
            x = load(from + k);
        } else {
            for (int i = k; i < count; i++) held[i - k] = one(from + i);
            x = load(held);
        }
        *(vb*)((int8_t*)input + input_place(map, row, k)) = __builtin_convertvector(whole(x * factor) + SEC_RAISED, vb);
    }
}

SEC_INLINE int raised(const Map& map) { return map.precision == BINARY && map.levels.low == 0 ? 0 : SEC_RAISED; }

SEC_INLINE vi level_of(vf x, vf shift, const Levels& how) {
    x -= shift;
    if (how.sign) return (x >= 0) ? vi{} + 1 : vi{} - 1;
    const vf low = splat((float)how.low), high = splat((float)how.high);
    vf t = smaller(larger(x * how.inverse, low), high) + 0.5f;
    // a product with the inverse may miss the quotient by two of its last bits: where that counts, divide
    const float unsure = 4e-7f * (how.high - how.low + 1);
    if (any_positive(splat(unsure) - absolute(t - nearest(t)))) t = smaller(larger(x / how.alpha, low), high) + 0.5f;
    vi found = __builtin_convertvector(t, vi);
    found += __builtin_convertvector(found, vf) > t;  // towards 0 is above, of negative ones
    return found > how.high ? vi{} + how.high : found;
}

// Levels of a row as a binary map reads them, 0 behind its end.
template <class From>
SEC_INLINE void round_row(const From* from, int row, const Map& map, void* input) {
    const Levels& how = map.levels;
    const int count = map.in;
    for (int k = 0; k < map.deep; k += LANES) {
        float held[LANES] = {}, moved[LANES] = {};
        vi found;
        if (k + LANES <= count) {
            found = level_of(load(from + k), how.shift != nullptr ? load(how.shift + k) : vf{}, how);
        } else {
            for (int i = k; i < count; i++) held[i - k] = one(from + i);
            for (int i = k; i < count && how.shift != nullptr; i++) moved[i - k] = how.shift[i];
            found = level_of(load(held), load(moved), how);
            for (int i = 0; i < LANES; i++)
                if (k + i >= count) found[i] = 0;
        }
        *(vb*)((int8_t*)input + input_place(map, row, k)) = __builtin_convertvector(found + raised(map), vb);
    }
}

template <class From>
static void prepare_rows(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale,
                         Team& team) {
    over(rows, 16, team, [&](int m, int) {
        const From* row = (const From*)from.data + (size_t)m * from.stride;
        if (precision == BINARY) {
            round_row(row, m, map, input);
        } else if (precision == INT8) {
            float high = largest(row, map.in);
            scale[m] = high / 127;
            quantise(row, m, map, high > 0 ? 127 / high : 0, input);
        } else if (precision == BF16) {
            uint16_t* to = (uint16_t*)input + (size_t)m * map.deep;
            int k = 0;
            for (; k + LANES <= map.in; k += LANES) store(to + k, load(row + k));
            for (; k < map.in; k++) put(to + k, one(row + k));
            for (; k < map.deep; k++) to[k] = 0;
        } else {
            float* to = (float*)input + (size_t)m * map.deep;
            int k = 0;
            for (; k + LANES <= map.in; k += LANES) store(to + k, load(row + k));
            for (; k < map.in; k++) to[k] = one(row + k);
            for (; k < map.deep; k++) to[k] = 0;
        }
    });
}

[[maybe_unused]] static void generic_prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale,
                            Team& team) {
    (from.half ? prepare_rows<uint16_t> : prepare_rows<float>)(precision, from, rows, map, input, scale, team);
}

// --- products ------------------------------------------------------------------------------------------------------

// Writes results: as floats or halves, rounded to levels (which no map with an activation is asked for), or as the next
// map reads its rows.
template <Activation A>
SEC_INLINE void finish(Rows to, int row, int column, vf value) {
    if (to.next != nullptr) {
        const Levels& how = to.next->levels;
        vb* at = (vb*)((int8_t*)to.data + input_place(*to.next, row, column));
        if (how.above != nullptr) {
            const vi upper = (value >= load(how.above + column)) | (value <= load(how.below + column));
            *at = __builtin_convertvector((upper ? vi{} + how.high : vi{} + how.low) + raised(*to.next), vb);
            return;
        }
        const vf shift = how.shift != nullptr ? load(how.shift + column) : vf{};
        const vi found = level_of(activated<A, false>(value), shift, how) + raised(*to.next);
        *at = __builtin_convertvector(found, vb);
        return;
    }
    if (to.levels != nullptr && to.levels->sign)  // without whole numbers between
        value = value >= 0 ? splat(1.0f) : splat(-1.0f);
    else if (to.levels != nullptr)
        value = __builtin_convertvector(level_of(value, vf{}, *to.levels), vf);
    if (to.half)
        store((uint16_t*)to.data + (size_t)row * to.stride + column, activated<A, true>(value));
    else
        store((float*)to.data + (size_t)row * to.stride + column, activated<A, false>(value));
}

// R rows times PANEL outputs.
template <int R, Activation A, class Value>
SEC_INLINE void float_panel(const Value* input, const Panel<Value>& panel, int row, int column, const Map& map, Rows to) {
    vf sums[R][2];
    SEC_UNROLL for (int r = 0; r < R; r++) sums[r][0] = load(map.bias + column), sums[r][1] = load(map.bias + column + LANES);
    const Value* weights = panel.from(column % WIDE);
    const Value* from = input + (size_t)row * map.deep;
    for (int block = 0; block < panel.count; block++) {
        const int begin = panel.steps[block] * DEPTH;
        for (int k = begin; k < begin + DEPTH; k++, weights += PANEL) {
            const vf low = load(weights), high = load(weights + LANES);
            SEC_UNROLL for (int r = 0; r < R; r++) {
                const vf x = splat(one(from + (size_t)r * map.deep + k));
                sums[r][0] += x * low;
                sums[r][1] += x * high;
            }
        }
    }
    SEC_UNROLL for (int r = 0; r < R; r++) {
        finish<A>(to, row + r, column, sums[r][0]);
        finish<A>(to, row + r, column + LANES, sums[r][1]);
    }
}

template <Activation A, class Value>
[[maybe_unused]] static void float_product(const void* input, int rows, const Map& map, Rows to, Team& team) {
    over(map.wide / PANEL, 1, team, [&](int i, int) {
        const int column = i * PANEL;
        const Panel<Value> panel = panel_of<Value>(map, column);
        int row = 0;
        for (; row + SEC_ROWS <= rows; row += SEC_ROWS)
            float_panel<SEC_ROWS, A, Value>((const Value*)input, panel, row, column, map, to);
        for (; row < rows; row++) float_panel<1, A, Value>((const Value*)input, panel, row, column, map, to);
    });
}

// Sums of whole products, with scales and bias; `scale` is that of each row, of int8 maps.
template <Activation A>
[[maybe_unused]] SEC_INLINE void finish_whole(vi sums, const float* scale, int row, int column, const Map& map, Rows to) {
    const vf whole = __builtin_convertvector(sums, vf), bias = load(map.bias + column);
    if (map.precision == BINARY) return finish<A>(to, row, column, apart(whole * load(map.scale + column)) + bias);
    finish<A>(to, row, column, whole * (load(map.scale + column) * scale[row]) + bias);
}
template <Activation A>
[[maybe_unused]] SEC_INLINE void finish_whole(const int32_t* sums, const float* scale, int row, int column, const Map& map,
                                              Rows to) {
    for (int n = 0; n < 16; n += LANES) finish_whole<A>(*(const vi*)(sums + n), scale, row, column + n, map, to);
}

#ifdef __AVX512BW__
// Bytes of which only those that are not 0 are kept; `count` is a multiple of 64. Returns where what is kept goes on.
__attribute__((target("avx512vbmi2"))) static const int8_t* expand(const uint64_t* masks, const int8_t* kept, size_t count, int8_t* to) {
    for (size_t i = 0; i < count / 64; i++) {
        _mm512_storeu_si512(to + 64 * i, _mm512_maskz_expandloadu_epi8(masks[i], kept));
        kept += __builtin_popcountll(masks[i]);
    }
    return kept;
}
#endif

// Weights of one byte of the panel that a column begins, as they are packed, or spread out `here` if they are kept in fewer.
SEC_INLINE Panel<int8_t> bytes_of(const Map& map, int column, int8_t* here) {
    Panel<int8_t> panel = panel_of<int8_t>(map, column);
    if (map.precision != BINARY && map.masks == nullptr) return panel;
    const size_t count = (size_t)panel.count * WIDE * DEPTH;
    if (map.precision == BINARY) {
        spread((const char*)map.weights + (size_t)column * map.deep / 8, count, here);
    }
#ifdef __AVX512BW__
    if (map.masks != nullptr) {
        const uint64_t* masks = map.masks + (size_t)map.blocks[column / WIDE] * WIDE;
        expand(masks, (const int8_t*)map.weights + map.values[column / WIDE], count, here);
    }
#endif
    panel.weights = here;
    return panel;
}

// Calls `then` with each panel's weights of one byte.
template <class Then>
[[maybe_unused]] SEC_INLINE void over_panels(const Map& map, void* panels, Team& team, Then then) {
    over(map.wide / WIDE, 1, team, [&](int i, int thread) {
        int8_t* here = (int8_t*)panels + (size_t)thread * WIDE * map.deep;
        then(i * WIDE, bytes_of(map, i * WIDE, here));
    });
}

// Products of inputs of one byte, with a sign or without, which a tier defines; one that has other products of its own says SEC_OWN_PRODUCT.
#ifndef SEC_OWN_PRODUCT
template <Activation A, bool SIGNED>
static void byte_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels, Team& team);

static void product(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, void* panels, Team& team) {
    with_activation(activation, [&](auto known) {
        constexpr Activation A = decltype(known)::value;
        if (precision == INT8 || (precision == BINARY && map.levels.low < 0))
            byte_product<A, true>(input, scale, rows, map, to, panels, team);
        else if (precision == BINARY)
            byte_product<A, false>(input, scale, rows, map, to, panels, team);
        else if (precision == BF16)
            float_product<A, uint16_t>(input, rows, map, to, team);
        else
            float_product<A, float>(input, rows, map, to, team);
    });
}
#endif

}  // namespace
}  // namespace secateur
