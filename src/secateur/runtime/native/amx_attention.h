// Attention in tiles, of heads whose width is a multiple of 32 and of bfloat16 rows; and what tiles need.
#pragma once
#include "generic.h"

namespace secateur {
namespace {

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
    const int asking = least(tokens, what.queries_read);
    for (int i = 0; i < asking; i += 16) {
        const int count = least(16, asking - i);
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

static void attention(Rows qkv, const Attention& what, Rows to, Team& team) {
    if (!qkv.half || what.width % 32) return generic_attention(qkv, what, to, team);
    const int jobs = what.examples * what.heads;
    int taken = 0;
    together(team, [&](int thread) {
        configure();
        for (int job; (job = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < jobs;)
            head_in_tiles(qkv, what, to, job / what.heads, job % what.heads, what.scratch + what.scratch_each * thread);
        release();
    });
}

}  // namespace
}  // namespace secateur
