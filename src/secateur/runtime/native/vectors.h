// Vectors of the compiler, as wide as the tier's registers (SEC_LANES), and functions of them.
#pragma once
#include <math.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "kernels.h"
#include "team.h"

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
#define SEC_MEMBER inline __attribute__((always_inline))
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
    const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8);
#else
    const vf given = x;
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const vf n = nearest(x * 1.44269504f);
#endif
    vf f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
#ifdef __AVX512F__
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    return (vf)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)n);
#else
    return given < splat(-87.0f) ? vf{} : p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// x Φ(x), Φ by Abramowitz and Stegun 7.1.26: absolute error of the error function below 2e-7. As in torch, 1 + erf ends in
// 0, so that -0 is reached far below 0, and with it a level that begins at 0.
SEC_INLINE vf gelu(vf x) {
    vf z = absolute(x) * 0.70710678118f;
    vf t = 1.0f / (1.0f + z * 0.3275911f);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf erf = 1.0f - p * t * exponential(-z * z);
    return x * (0.5f * (x < vf{} ? 1.0f - erf : 1.0f + erf));
}

SEC_INLINE vf gelu_tanh(vf x) {
    vf u = x * (1.5957691216f + 0.0713548162726f * x * x);
    const vf tanh = 2.0f / (1.0f + exponential(-u)) - 1.0f;
    return x * (0.5f * (1.0f + tanh));
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

}  // namespace
}  // namespace secateur
