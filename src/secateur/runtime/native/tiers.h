// Which tiers this build and this machine have. Included once, by the engine.
#pragma once
#if defined(SEC_AVX2) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace secateur {
namespace {

enum Tier { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

// Whether bytes can be spread out by a mask; asked only where AVX-512 is there.
bool expands() {
#if defined(SEC_AVX512) && defined(__linux__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 6 & 1);  // VBMI2
#else
    return false;
#endif
}

#if defined(SEC_AVX2) && defined(__linux__)
unsigned long long enabled_state() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

Tier best_tier() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1) || !(c >> 12 & 1)) return PORTABLE;  // OSXSAVE, FMA
    const unsigned long long state = enabled_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return PORTABLE;
#ifdef SEC_AVX512
    const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    if ((state & 0xe6) != 0xe6 || (b & wide) != wide || !(c >> 11 & 1)) return AVX2;
#ifdef SEC_AMX
    if ((d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1)) {  // AMX: bf16, tiles, int8
        const long request = 0x1023, tiles = 18;            // ARCH_REQ_XCOMP_PERM, XTILEDATA
        const bool halves = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
        if (halves && syscall(SYS_arch_prctl, request, tiles) == 0) return AMX;
    }
#endif
    return AVX512;
#else
    return AVX2;
#endif
}
#else
Tier best_tier() { return PORTABLE; }
#endif

const Kernels& kernels_of(int tier) {
    switch (tier) {
#ifdef SEC_AMX
        case AMX: return amx_kernels;
#endif
#ifdef SEC_AVX512
        case AVX512: return avx512_kernels;
#endif
#ifdef SEC_AVX2
        case AVX2: return avx2_kernels;
#endif
        default: return portable_kernels;
    }
}

}  // namespace
}  // namespace secateur
