// Kernels in the compiler's own vectors; a tier replaces what it can do better. Included once by each tier, which says how
// many floats its registers hold (SEC_LANES) and how many rows a product takes at a time (SEC_ROWS).
#include <math.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif

#include "kernels.h"

// What signed bytes are raised by where a product reads them without a sign.
#ifndef SEC_RAISED
#define SEC_RAISED 0
#endif

namespace secateur {
namespace {

constexpr int LANES = SEC_LANES;
constexpr int PANEL = 2 * LANES;  // outputs of a product in floats that are packed side by side
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1), may_alias));

#define SEC_INLINE static inline __attribute__((always_inline))
// Loops over sums that shall stay in registers: unless they are unrolled, the sums become an array on the stack.
#ifdef __clang__
#define SEC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEC_UNROLL _Pragma("GCC unroll 16")
#endif

SEC_INLINE vf splat(float x) { return x - vf{}; }
SEC_INLINE vf load(const float* p) { return *(const vf*)p; }
SEC_INLINE vf load(const uint16_t* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
SEC_INLINE void store(float* p, vf x) { *(vf*)p = x; }
SEC_INLINE void store(uint16_t* p, vf x) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
#endif
    vu bits = (vu)x;
    bits += 0x7fff + ((bits >> 16) & 1);
    *(vh*)p = __builtin_convertvector(bits >> 16, vh);
}
// Keeps a product from being fused with the sum that follows, where results shall be those of separate steps.
SEC_INLINE vf apart(vf x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}
SEC_INLINE float one(const float* p) { return *p; }
SEC_INLINE float one(const uint16_t* p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
SEC_INLINE void put(float* p, float x) { *p = x; }
SEC_INLINE void put(uint16_t* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
SEC_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
SEC_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
SEC_INLINE vf absolute(vf a) { return (vf)((vi)a & 0x7fffffff); }
SEC_INLINE vf nearest(vf a) {  // ties to even, for |a| below 2^22
    const vf magic = splat(12582912.0f);
    return (a + magic) - magic;
}
SEC_INLINE vi whole(vf a) {  // to the nearest, ties to even
#ifdef __AVX512F__
    return (vi)_mm512_cvtps_epi32((__m512)a);
#else
    return __builtin_convertvector(nearest(a), vi);
#endif
}
SEC_INLINE float total(vf a) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)a);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += a[i];
    return sum;
#endif
}
SEC_INLINE float highest(vf a) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)a);
#else
    float found = a[0];
    for (int i = 1; i < LANES; i++) found = a[i] > found ? a[i] : found;
    return found;
#endif
}
SEC_INLINE bool any_positive(vf a) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
#else
    return highest(a) > 0;
#endif
}
SEC_INLINE vf inverse_of(vf a) {  // to 14 bits, which is more than bfloat16 keeps
#ifdef __AVX512F__
    return (vf)_mm512_rcp14_ps((__m512)a);
#else
    return 1.0f / a;
#endif
}

// e^x by 2^n 2^f with a polynomial in f; relative error below 3e-7, 0 below -87.
SEC_INLINE vf exponential(vf x) {
#ifdef __AVX512F__
    const vf whole_part = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8);
    vf rest = x - whole_part * 0.693359375f;
    rest = rest + whole_part * 2.12194440e-4f;
    vf q = splat(1.9875691500e-4f);
    q = q * rest + 1.3981999507e-3f;
    q = q * rest + 8.3334519073e-3f;
    q = q * rest + 4.1665795894e-2f;
    q = q * rest + 1.6666665459e-1f;
    q = q * rest + 5.0000001201e-1f;
    q = q * rest * rest + rest + 1.0f;
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    return (vf)_mm512_maskz_scalef_ps(there, (__m512)q, (__m512)whole_part);
#endif
    vf inside = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    vf n = nearest(inside * 1.44269504f);
    vf f = inside - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf found = p * (vf)power;
    return x < splat(-87.0f) ? vf{} : found;
}

// x Φ(x), Φ by Abramowitz and Stegun 7.1.26: absolute error of the error function below 2e-7.
SEC_INLINE vf gelu(vf x) {
    vf z = absolute(x) * 0.70710678118f;
    vf t = 1.0f / (1.0f + z * 0.3275911f);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf tail = p * t * exponential(-z * z);  // 1 - erf z
    vf cumulative = x < vf{} ? 0.5f * tail : 1.0f - 0.5f * tail;
    return x * cumulative;
}

SEC_INLINE vf gelu_tanh(vf x) {
    vf u = x * (1.5957691216f + 0.0713548162726f * x * x);
    return x / (1.0f + exponential(-u));
}

// For results that are kept in bfloat16: 2^t with a relative error below 1e-4; t is at most 127.
SEC_INLINE vf power_short(vf t) {
#ifdef __AVX512F__
    const vf n = (vf)_mm512_roundscale_ps((__m512)t, 8);
#else
    t = larger(t, splat(-126.0f));
    const vf n = nearest(t);
#endif
    const vf f = t - n;
    vf p = splat(5.54880530e-2f);
    p = p * f + 2.42296219e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}
constexpr float LOG2_E = 1.44269504f;

// 2^t for t up to 0, with a relative error below 3e-7 and that of t; 0 below -126.
SEC_INLINE vf power(vf t) {
#ifdef __AVX512F__
    const vf n = (vf)_mm512_roundscale_ps((__m512)t, 8);
#else
    const vf low = larger(t, splat(-126.0f)), n = nearest(low);
#endif
    const vf f = t - n;
    vf p = splat(1.326472814e-3f);
    p = p * f + 9.671512832e-3f;
    p = p * f + 5.550733740e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (vf)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)n);
#else
    return t < splat(-126.0f) ? vf{} : p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// x / (1 + e^-u) with u(x) fitted to the logit of Φ: absolute error below 1e-4 max(1, |x|).
SEC_INLINE vf gelu_short(vf x) {
    const vf square = smaller(x * x, splat(64.0f));
    const vf slope = square * (7.03050432e-4f * LOG2_E) - 7.40114011e-2f * LOG2_E;
    const vf t = x * (square * slope - 1.59501564f * LOG2_E);
    return x * inverse_of(1.0f + power_short(smaller(t, splat(120.0f))));
}

SEC_INLINE vf gelu_tanh_short(vf x) {
    const vf t = x * (-1.5957691216f * LOG2_E - 0.0713548162726f * LOG2_E * x * x);
    return x * inverse_of(1.0f + power_short(smaller(t, splat(120.0f))));
}

template <Activation A, bool HALF>
SEC_INLINE vf activated(vf x) {
    if (A == GELU) return HALF ? gelu_short(x) : gelu(x);
    if (A == GELU_TANH) return HALF ? gelu_tanh_short(x) : gelu_tanh(x);
    if (A == RELU) return larger(x, vf{});
    return x;
}

// Calls `then` with an activation that the compiler knows.
template <Activation A>
struct Known {
    static constexpr Activation value = A;
};
template <class Then>
SEC_INLINE void with_activation(Activation activation, Then then) {
    switch (activation) {
        case GELU: return then(Known<GELU>{});
        case RELU: return then(Known<RELU>{});
        case GELU_TANH: return then(Known<GELU_TANH>{});
        default: return then(Known<NONE>{});
    }
}

// --- packing -------------------------------------------------------------------------------------------------------

static size_t generic_packed_bytes(Precision precision, int wide, int deep) {
    if (precision == BINARY) return (size_t)wide * deep / 8;
    return (size_t)wide * deep * (precision == FP32 ? 4 : precision == BF16 ? 2 : 1);
}

static float weight_at(const float* weight, const Map& map, int out, int in) {
    return out < map.out && in < map.in ? weight[(size_t)out * map.in + in] : 0.0f;
}

// Where a weight of one byte goes. Panels of 16 outputs, four inputs side by side, are what VNNI and AMX read; loops read
// an output's weights one behind the other.
SEC_INLINE size_t byte_place(const Map& map, int n, int k) {
#ifdef SEC_ROW_AFTER_ROW
    return (size_t)n * map.deep + k;
#else
    return (((size_t)(n / 16) * (map.deep / 4) + k / 4) * 16 + n % 16) * 4 + k % 4;
#endif
}

// Signs in the order of bytes, a bit each; what is beyond a map is -1.
static void generic_pack_signs(const uint64_t* words, Map& map) {
    uint8_t* to = (uint8_t*)map.weights;
    memset(to, 0, map.bytes);
    const int each = up_to(map.in, 64) / 64;
    for (int n = 0; n < map.wide; n++) {
        map.sums[n] = -map.deep;
        for (int k = 0; k < map.in && n < map.out; k++) {
            if (!(words[(size_t)n * each + k / 64] >> (k % 64) & 1)) continue;
            const size_t at = byte_place(map, n, k);
            to[at / 8] |= (uint8_t)(1 << at % 8);
            map.sums[n] += 2;
        }
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
        float factor = high > 0 ? 127 / high : 0;
        map.sums[n] = 0;
        for (int k = 0; k < map.deep; k++) {
            int8_t level = (int8_t)lrintf(weight_at(weight, map, n, k) * factor);
            map.sums[n] += level;
            to[byte_place(map, n, k)] = level;
        }
    }
}

// fp32 and bf16: panels of outputs, input after input.
[[maybe_unused]] static void generic_pack(Precision precision, const float* weight, Map& map) {
    if (precision == INT8) return pack_int8(weight, map);
    for (int n = 0; n < map.wide; n++)
        for (int k = 0; k < map.deep; k++) {
            size_t at = ((size_t)(n / PANEL) * map.deep + k) * PANEL + n % PANEL;
            float value = weight_at(weight, map, n, k);
            if (precision == FP32)
                ((float*)map.weights)[at] = value;
            else
                put((uint16_t*)map.weights + at, value);
        }
}

// --- rows into what a product reads --------------------------------------------------------------------------------

template <class From>
SEC_INLINE float largest(const From* from, int count) {
    vf high = {};
    int k = 0;
    for (; k + LANES <= count; k += LANES) high = larger(high, absolute(load(from + k)));
    float found = highest(high);
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
    for (int k = 0; k < map.deep; k += LANES) {
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
                         int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
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
    }
}

[[maybe_unused]] static void generic_prepare(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale,
                            int threads) {
    (from.half ? prepare_rows<uint16_t> : prepare_rows<float>)(precision, from, rows, map, input, scale, threads);
}

// --- products ------------------------------------------------------------------------------------------------------

// Writes results: as floats or halves, rounded to levels (which no map with an activation is asked for), or as the next
// map reads its rows.
template <Activation A>
SEC_INLINE void finish(Rows to, int row, int column, vf value) {
    if (to.next != nullptr) {
        const Levels& how = to.next->levels;
        const vf shift = how.shift != nullptr ? load(how.shift + column) : vf{};
        const vi found = level_of(activated<A, false>(value), shift, how) + raised(*to.next);
        *(vb*)((int8_t*)to.data + input_place(*to.next, row, column)) = __builtin_convertvector(found, vb);
        return;
    }
    if (to.levels != nullptr) value = __builtin_convertvector(level_of(value, vf{}, *to.levels), vf);
    if (to.half)
        store((uint16_t*)to.data + (size_t)row * to.stride + column, activated<A, true>(value));
    else
        store((float*)to.data + (size_t)row * to.stride + column, activated<A, false>(value));
}

// R rows times a panel of outputs.
template <int R, Activation A, class Value>
SEC_INLINE void float_panel(const Value* input, const Value* panel, int row, int column, const Map& map, Rows to) {
    vf sums[R][2];
    SEC_UNROLL for (int r = 0; r < R; r++) sums[r][0] = load(map.bias + column), sums[r][1] = load(map.bias + column + LANES);
    const Value* from = input + (size_t)row * map.deep;
    for (int k = 0; k < map.deep; k++) {
        vf low = load(panel + (size_t)k * PANEL), high = load(panel + (size_t)k * PANEL + LANES);
        SEC_UNROLL for (int r = 0; r < R; r++) {
            vf x = splat(one(from + (size_t)r * map.deep + k));
            sums[r][0] += x * low;
            sums[r][1] += x * high;
        }
    }
    SEC_UNROLL for (int r = 0; r < R; r++) {
        finish<A>(to, row + r, column, sums[r][0]);
        finish<A>(to, row + r, column + LANES, sums[r][1]);
    }
}

template <Activation A, class Value>
[[maybe_unused]] static void float_product(const void* input, int rows, const Map& map, Rows to, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int column = 0; column < map.wide; column += PANEL) {
        const Value* panel = (const Value*)map.weights + (size_t)column * map.deep;
        int row = 0;
        for (; row + SEC_ROWS <= rows; row += SEC_ROWS)
            float_panel<SEC_ROWS, A, Value>((const Value*)input, panel, row, column, map, to);
        for (; row < rows; row++) float_panel<1, A, Value>((const Value*)input, panel, row, column, map, to);
    }
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

// Calls `then` with the bytes of each `step` outputs' weights: those that are packed, or signs, spread out in `panels`.
template <class Then>
SEC_INLINE void over_panels(const Map& map, int step, void* panels, int threads, Then then) {
    const size_t panel = (size_t)step * map.deep;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int column = 0; column < map.wide; column += step) {
        const size_t from = (size_t)column * map.deep;
        const int8_t* weights = (const int8_t*)map.weights + from;
        if (map.precision == BINARY) {
            int8_t* here = (int8_t*)panels + (size_t)omp_get_thread_num() * 32 * map.deep;
            spread((const char*)map.weights + from / 8, panel, here);
            weights = here;
        }
        then(column, weights);
    }
}

// Products of inputs of one byte, with a sign or without, which a tier defines; one that has other products of its own says SEC_OWN_PRODUCT.
#ifndef SEC_OWN_PRODUCT
template <Activation A, bool SIGNED>
static void byte_product(const void* input, const float* scale, int rows, const Map& map, Rows to, void* panels, int threads);

static void product(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, void* panels, int threads) {
    with_activation(activation, [&](auto known) {
        constexpr Activation A = decltype(known)::value;
        if (precision == INT8 || (precision == BINARY && map.levels.low < 0))
            byte_product<A, true>(input, scale, rows, map, to, panels, threads);
        else if (precision == BINARY)
            byte_product<A, false>(input, scale, rows, map, to, panels, threads);
        else if (precision == BF16)
            float_product<A, uint16_t>(input, rows, map, to, threads);
        else
            float_product<A, float>(input, rows, map, to, threads);
    });
}
#endif

// --- attention -----------------------------------------------------------------------------------------------------

// Keys of an example that some of its queries see: from `begin` to `end`, in whole vectors to `padded`.
struct Keys {
    int first;  // row of the example's first token
    int begin, end, padded;
};

template <class Value>
struct AttentionRun {
    Rows qkv, to;
    const Attention& what;

    // One head of one example; `scratch` holds the keys, turned, four queries and four rows of probabilities.
    void head(int example, int h, float* scratch) const {
        const int first = what.starts[example], tokens = what.starts[example + 1] - first;
        const int width = what.width, padded = up_to(tokens, 2 * LANES), all = what.heads * width;
        const Value* queries = (const Value*)qkv.data + (size_t)first * qkv.stride + h * width;
        const Value *keys = queries + all, *values = keys + all;
        float *turned = scratch, *asked = turned + (size_t)width * padded, *rows = asked + 4 * (size_t)width;
        float *held = rows + 4 * (size_t)padded, *paid = begin_scores(held + padded, padded);
        for (int j = 0; j < tokens; j++)
            for (int d = 0; d < width; d++) turned[(size_t)d * padded + j] = one(keys + (size_t)j * qkv.stride + d);
        for (int d = 0; d < width; d++)
            for (int j = tokens; j < padded; j++) turned[(size_t)d * padded + j] = 0;
        for (int i = 0; i < tokens; i += 4) {
            const int count = least(4, tokens - i);
            const Keys seen = seen_by(first, tokens, i, count, 2 * LANES);
            for (int d = 0; d < width; d++)
                for (int r = 0; r < 4; r++)
                    asked[4 * d + r] = one(queries + (size_t)(i + least(r, count - 1)) * qkv.stride + d) * what.scaling;
            for (int j = seen.begin; j < seen.padded; j += 2 * LANES) {
                vf sums[4][2] = {};
                for (int d = 0; d < width; d++) {
                    const float* key = turned + (size_t)d * padded + j;
                    const vf low = load(key), high = load(key + LANES);
                    SEC_UNROLL for (int r = 0; r < 4; r++) {
                        sums[r][0] += low * asked[4 * d + r];
                        sums[r][1] += high * asked[4 * d + r];
                    }
                }
                SEC_UNROLL for (int r = 0; r < 4; r++) {
                    store(rows + (size_t)r * padded + j, sums[r][0]);
                    store(rows + (size_t)r * padded + j + LANES, sums[r][1]);
                }
            }
            float inverse[4] = {};
            for (int r = 0; r < count; r++) {
                float* row = rows + (size_t)r * padded;
                inverse[r] = what.levels != nullptr ? softmax_levels(row, row, held, seen, h, i + r)
                                                    : softmax(row, seen, h, i + r);
                if (paid != nullptr) count_in(row, inverse[r], seen, tokens, i + r, paid);
            }
            for (int c = 0; c < width; c += 2 * LANES) {
                const int next = c + LANES < width ? LANES : 0;  // the second half of the last columns may not be there
                vf sums[4][2] = {};
                for (int j = seen.begin; j < seen.end; j++) {
                    const Value* value = values + (size_t)j * qkv.stride + c;
                    const vf low = load(value), high = load(value + next);  // may read on into the slack
                    SEC_UNROLL for (int r = 0; r < 4; r++) {
                        sums[r][0] += low * rows[(size_t)r * padded + j];
                        sums[r][1] += high * rows[(size_t)r * padded + j];
                    }
                }
                SEC_UNROLL for (int r = 0; r < 4; r++) {
                    if (r >= count) break;
                    const size_t at = (size_t)(first + i + r) * to.stride + h * width + c;
                    write(at, sums[r][0] * inverse[r], width - c);
                    if (next > 0) write(at + LANES, sums[r][1] * inverse[r], width - c - LANES);
                }
            }
        }
        if (paid != nullptr) end_scores(paid, values, tokens, h, first);
    }

    // --- scores of tokens: what the queries that ask pay to each

    float* begin_scores(float* paid, int padded) const {
        if (what.scores == nullptr) return nullptr;
        memset(paid, 0, (size_t)padded * sizeof(float));
        return paid;
    }

    // Adds a query's probabilities, which are still to be multiplied by `inverse`, if it is one that asks: all of a short
    // text, those at s n / queries of a long one.
    template <class Probability>
    void count_in(const Probability* row, float inverse, const Keys& seen, int tokens, int query, float* paid) const {
        const long asking = what.queries, n = tokens;
        if (n > SHORT * asking) {
            const long s = (query * asking + n - 1) / n;
            if (s >= asking || s * n / asking != query) return;
        }
        const float own = paid[query];
        for (int j = seen.begin; j < seen.end; j += LANES) store(paid + j, load(paid + j) + load(row + j) * inverse);
        if (!what.diagonal) paid[query] = own;
    }

    void end_scores(const float* paid, const Value* values, int tokens, int h, int first) const {
        float* to = what.scores + (size_t)h * what.score_stride + first;
        for (int j = 0; j < tokens; j++)
            to[j] = what.by_value ? paid[j] * sqrtf(squares(values + (size_t)j * qkv.stride)) : paid[j];
    }

    float squares(const Value* value) const {
        vf sum = {};
        int d = 0;
        for (; d + LANES <= what.width; d += LANES) sum += load(value + d) * load(value + d);
        float found = total(sum);
        for (; d < what.width; d++) found += one(value + d) * one(value + d);
        return found;
    }

    void write(size_t at, vf found, int left) const {
        to.half ? write_into((uint16_t*)to.data + at, found, left) : write_into((float*)to.data + at, found, left);
    }

    template <class Out>
    static inline void write_into(Out* out, vf found, int left) {
        if (left >= LANES) return store(out, found);
        for (int d = 0; d < left; d++) put(out + d, found[d]);
    }

    // What `count` queries from i on see, in steps of `step` keys.
    Keys seen_by(int first, int tokens, int i, int count, int step) const {
        if (what.window < 0) return {first, 0, tokens, up_to(tokens, step)};
        const int begin = reaching(first, tokens, place_of(first, i) - what.window);
        const int end = reaching(first, tokens, place_of(first, i + count - 1) + what.window + 1);
        return {first, begin / step * step, end, up_to(end, step)};
    }

    int place_of(int first, int i) const { return what.places != nullptr ? what.places[first + i] : i; }

    // The first of an example's tokens that is at a place or behind it.
    int reaching(int first, int tokens, int place) const {
        if (what.places == nullptr) return least(most(place, 0), tokens);
        int low = 0;
        for (int high = tokens; low < high;) {
            const int middle = (low + high) / 2;
            if (what.places[first + middle] < place)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    // Exponentials in place, 0 where a key is not seen; the inverse of their sum. Scores are scaled already.
    float softmax(float* row, const Keys& seen, int h, int query) const {
        place(row, seen, h, query);
        vf high = splat(-INFINITY);
        for (int j = seen.begin; j < seen.padded; j += LANES) high = larger(high, load(row + j));
        const float top = highest(high);
        vf sum = {};
        for (int j = seen.begin; j < seen.padded; j += LANES) {
            const vf below = load(row + j) - top;
            vf found = sizeof(Value) == 2 ? power_short(larger(below * LOG2_E, splat(-126.0f))) : exponential(below);
            if (what.window >= 0) found = below < splat(-87.0f) ? vf{} : found;  // else sums begin as slow denormals
            store(row + j, found);
            sum += found;
        }
        return 1.0f / total(sum);
    }

    // The same from scores that are not scaled yet, into bfloat16.
    [[maybe_unused]] float softmax_short(float* row, uint16_t* into, const Keys& seen, int h, int query) const {
        float scaling = what.scaling * LOG2_E;
        if (what.relative != nullptr) {
            for (int j = seen.begin; j < seen.padded; j += LANES) store(row + j, load(row + j) * what.scaling);
            scaling = LOG2_E;
        }
        place(row, seen, h, query);
        vf high = splat(-INFINITY);
        for (int j = seen.begin; j < seen.padded; j += LANES) high = larger(high, load(row + j));
        const float top = highest(high) * scaling;
        vf sum = {};
        for (int j = seen.begin; j < seen.padded; j += LANES) {
            vf found = power_short(larger(load(row + j) * scaling - top, splat(-126.0f)));
            store(into + j, found);
            sum += found;
        }
        return 1.0f / total(sum);
    }

    // Levels of the probabilities, from whole scores; what the whole context is to be multiplied by. Where single
    // precision cannot tell which level is reached, the row is computed again in double.
    template <class Level>
    float softmax_levels(float* row, Level* into, float* held, const Keys& seen, int h, int query) const {
        const Levels& how = what.levels->probabilities;
        const int begin = seen.begin, padded = seen.padded;
        float scale = what.levels->scores;  // that scores are still to be multiplied by
        if (what.relative != nullptr) {
            for (int j = begin; j < padded; j += LANES) store(row + j, load(row + j) * scale);
            scale = 1;
        }
        place(row, seen, h, query);
        vf high = splat(-INFINITY);
        for (int j = begin; j < padded; j += LANES) high = larger(high, load(row + j) * scale);
        const float top = highest(high);
        if (!(how.high == 1 ? one_bit(row, into, begin, padded, scale, top) : more_bits(row, into, held, begin, padded, scale, top)))
            in_double(row, into, begin, padded, scale, top);
        return what.levels->context;
    }

    // e^s >= alpha Z / 2: a comparison of scores. Returns whether it is sure of all of them.
    template <class Level>
    bool one_bit(const float* row, Level* into, int begin, int padded, float scale, float top) const {
        vf sum = {};
        for (int j = begin; j < padded; j += LANES) sum += power((apart(load(row + j) * scale) - top) * LOG2_E);
        const float least_score = logf(total(sum) * what.levels->probabilities.alpha * 0.5f);
        const float width = 4e-6f + 4e-7f * fabsf(least_score);
        vf unsure = splat(-1.0f);
        for (int j = begin; j < padded; j += LANES)
            unsure = larger(unsure, width - absolute(apart(load(row + j) * scale) - top - least_score));
        if (any_positive(unsure)) return false;
        for (int j = begin; j < padded; j += LANES)
            store(into + j, apart(load(row + j) * scale) - top >= least_score ? splat(1.0f) : vf{});
        return true;
    }

    // The same for levels up to 255.
    template <class Level>
    bool more_bits(const float* row, Level* into, float* held, int begin, int padded, float scale, float top) const {
        const Levels& how = what.levels->probabilities;
        const float most = (float)how.high;
        vf sum = {};
        for (int j = begin; j < padded; j += LANES) {
            const vf found = power((apart(load(row + j) * scale) - top) * LOG2_E);
            store(held + j, found);
            sum += found;
        }
        const float factor = 1.0f / (total(sum) * how.alpha);
        vf unsure = splat(-1.0f);
        for (int j = begin; j < padded; j += LANES) {
            const vf u = smaller(load(held + j) * factor, splat(most + 1)), t = u + 0.5f;
            unsure = larger(unsure, u * 3e-6f + 1e-6f - absolute(t - nearest(t)));
            const vf level = __builtin_convertvector(__builtin_convertvector(smaller(t, splat(most)), vi), vf);
            store(sizeof(Level) == 2 ? into + j : (Level*)held + j, level);
        }
        if (any_positive(unsure)) return false;
        if (sizeof(Level) == 4) memcpy(into + begin, held + begin, (size_t)(padded - begin) * sizeof(float));
        return true;
    }

    template <class Level>
    void in_double(const float* row, Level* into, int begin, int padded, float scale, float top) const {
        const Levels& how = what.levels->probabilities;
        double all = 0;
        for (int j = begin; j < padded; j++) all += exp((double)(row[j] * scale) - (double)top);
        for (int j = begin; j < padded; j++) {
            const double u = exp((double)(row[j] * scale) - (double)top) / all / (double)how.alpha;
            const double level = floor((u < how.high ? u : how.high) + 0.5);
            put(into + j, (float)(level < how.high ? level : how.high));
        }
    }

    // Adds the relative positions' bias, and takes what is outside of the window or behind the last key out.
    void place(float* row, const Keys& seen, int h, int query) const {
        if (what.relative != nullptr) {
            const float* bias = what.relative + (size_t)h * (2 * what.reach + 1);
            const int here = place_of(seen.first, query);
            for (int j = seen.begin; j < seen.end; j++) {
                int apart = place_of(seen.first, j) - here;
                apart = apart < -what.reach ? -what.reach : apart > what.reach ? what.reach : apart;
                row[j] += bias[apart + what.reach];
            }
        }
        if (what.window >= 0) {
            const int here = place_of(seen.first, query);
            const int begin = reaching(seen.first, seen.end, here - what.window);
            const int end = reaching(seen.first, seen.end, here + what.window + 1);
            for (int j = seen.begin; j < begin; j++) row[j] = -INFINITY;
            for (int j = end; j < seen.end; j++) row[j] = -INFINITY;
        }
        for (int j = seen.end; j < seen.padded; j++) row[j] = -INFINITY;
    }
};

static size_t generic_attention_scratch(int width, int tokens) {
    return (size_t)(width + 6) * up_to(tokens, 2 * LANES) + 4 * (size_t)width + 4 * LANES;
}

template <class Value>
static void attend(Rows qkv, const Attention& what, Rows to, int threads) {
    const AttentionRun<Value> run{qkv, to, what};
    const int jobs = what.examples * what.heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int job = 0; job < jobs; job++)
        run.head(job / what.heads, job % what.heads, what.scratch + what.scratch_each * omp_get_thread_num());
}

static void generic_attention(Rows qkv, const Attention& what, Rows to, int threads) {
    (qkv.half ? attend<uint16_t> : attend<float>)(qkv, what, to, threads);
}

// --- residual sums and norms ---------------------------------------------------------------------------------------

template <class Value>
SEC_INLINE void norm_row(float* x, const Value* y, const float* bias, int hidden, const float* gain, const float* shift,
                         float epsilon, float* to) {
    const int whole_part = hidden / LANES * LANES;
    vf sum = {};
    float rest = 0;
    for (int k = 0; k < whole_part; k += LANES) {
        vf added = load(x + k) + (y != nullptr ? load(y + k) : bias != nullptr ? load(bias + k) : vf{});
        store(x + k, added);
        sum += added;
    }
    for (int k = whole_part; k < hidden; k++)
        rest += x[k] += y != nullptr ? one(y + k) : bias != nullptr ? bias[k] : 0.0f;
    const float mean = (total(sum) + rest) / hidden;
    vf squares = {};
    rest = 0;
    for (int k = 0; k < whole_part; k += LANES) {
        vf below = load(x + k) - mean;
        squares += below * below;
    }
    for (int k = whole_part; k < hidden; k++) rest += (x[k] - mean) * (x[k] - mean);
    const float inverse = 1.0f / sqrtf((total(squares) + rest) / hidden + epsilon);
    for (int k = 0; k < whole_part; k += LANES)
        store(to + k, (load(x + k) - mean) * inverse * load(gain + k) + load(shift + k));
    for (int k = whole_part; k < hidden; k++) to[k] = (x[k] - mean) * inverse * gain[k] + shift[k];
}

static void generic_add_norm(float* x, const Rows* y, const float* bias, int rows, int hidden, const float* gain,
                             const float* shift, float epsilon, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        float* row = x + (size_t)m * hidden;
        if (y != nullptr && y->half)
            norm_row(row, (const uint16_t*)y->data + (size_t)m * y->stride, bias, hidden, gain, shift, epsilon,
                     row);
        else
            norm_row(row, y ? (const float*)y->data + (size_t)m * y->stride : nullptr, bias, hidden, gain, shift, epsilon,
                     row);
    }
}

// --- what layers whose norms precede their blocks need besides ----------------------------------------------------

static void generic_norm(float* x, int rows, int hidden, const float* gain, const float* shift, float epsilon, float* to,
                         int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        const size_t at = (size_t)m * hidden;
        norm_row<float>(x + at, nullptr, nullptr, hidden, gain, shift, epsilon, to + at);
    }
}

template <class Value>
SEC_INLINE void add_row(float* x, const Value* y, int hidden) {
    int k = 0;
    for (; k + LANES <= hidden; k += LANES) store(x + k, load(x + k) + load(y + k));
    for (; k < hidden; k++) x[k] += one(y + k);
}

static void generic_add(float* x, const Rows* y, const float* bias, int rows, int hidden, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        float* row = x + (size_t)m * hidden;
        if (y == nullptr)
            add_row(row, bias, hidden);
        else if (y->half)
            add_row(row, (const uint16_t*)y->data + (size_t)m * y->stride, hidden);
        else
            add_row(row, (const float*)y->data + (size_t)m * y->stride, hidden);
    }
}

// Entry k and entry k + half turn by one angle.
template <class Value>
SEC_INLINE void rotate_head(Value* x, const float* cosines, const float* sines, int half) {
    int k = 0;
    for (; k + LANES <= half; k += LANES) {
        const vf low = load(x + k), high = load(x + half + k), cosine = load(cosines + k), sine = load(sines + k);
        store(x + k, low * cosine - high * sine);
        store(x + half + k, high * cosine + low * sine);
    }
    for (; k < half; k++) {
        const float low = one(x + k), high = one(x + half + k);
        put(x + k, low * cosines[k] - high * sines[k]);
        put(x + half + k, high * cosines[k] + low * sines[k]);
    }
}

// The place of a row's token in its example.
static int place_of_row(const Attention& what, int row) {
    if (what.places != nullptr) return what.places[row];
    int low = 0;
    for (int high = what.examples; high - low > 1;) {
        const int middle = (low + high) / 2;
        (what.starts[middle] <= row ? low : high) = middle;
    }
    return row - what.starts[low];
}

template <class Value>
static void rotate_rows(Rows qkv, const Attention& what, int threads) {
    const int rows = what.starts[what.examples], half = what.width / 2;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        const float* cosines = what.rotary + (size_t)place_of_row(what, m) * what.width;
        Value* row = (Value*)qkv.data + (size_t)m * qkv.stride;
        for (int h = 0; h < 2 * what.heads; h++) rotate_head(row + h * what.width, cosines, cosines + half, half);
    }
}

static void generic_rotate(Rows qkv, const Attention& what, int threads) {
    (qkv.half ? rotate_rows<uint16_t> : rotate_rows<float>)(qkv, what, threads);
}

template <class Value>
static void multiply_rows(Rows x, Rows by, int rows, int count, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) {
        Value* row = (Value*)x.data + (size_t)m * x.stride;
        const Value* factors = (const Value*)by.data + (size_t)m * by.stride;
        int k = 0;
        for (; k + LANES <= count; k += LANES) store(row + k, load(row + k) * load(factors + k));
        for (; k < count; k++) put(row + k, one(row + k) * one(factors + k));
    }
}

static void generic_multiply(Rows x, Rows by, int rows, int count, int threads) {
    (x.half ? multiply_rows<uint16_t> : multiply_rows<float>)(x, by, rows, count, threads);
}

}  // namespace
}  // namespace secateur
