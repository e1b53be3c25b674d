// What an encoder keeps for its life: packed maps, without those zeros that it pays to leave out.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "secateur.h"
#include "tiers.h"
#include "turns.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace secateur {

constexpr size_t LARGE = 1 << 21;  // bytes of a large page
constexpr double MASKED = 0.75;    // share of its bytes below which a map has to come for its zeros to be left out

struct Freed {
    void operator()(void* p) const { free(p); }
};
using Memory = std::unique_ptr<char, Freed>;

Memory allocate(size_t bytes) {
    const size_t page = bytes >= LARGE ? LARGE : 64;
    void* found = aligned_alloc(page, (bytes + SLACK + page - 1) / page * page);
    if (found == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == LARGE) madvise(found, bytes, MADV_HUGEPAGE);  // weights are read from end to end: fewer page walks
#endif
    return Memory(static_cast<char*>(found));
}

class Storage {
  public:
    int64_t bytes = 0, maps = 0, masked = 0, blocks = 0, all_blocks = 0;
    bool needs_panels = false;  // some map is kept in fewer bytes than are multiplied

    Map packed(const sec_map& given, Precision precision, const Kernels& kernels) {
        Map map;
        map.precision = given.signs != nullptr ? BINARY : precision;
        map.out = given.out;
        map.in = given.in;
        map.wide = up_to(given.out, WIDE);
        map.deep = up_to(given.in, DEPTH);
        map.bias = floats(given.bias, given.out, map.wide);
        if (map.precision == INT8 || map.precision == BINARY) {
            map.scale = floats(given.scale, given.out, map.wide);
            map.sums = (int32_t*)hold((size_t)map.wide * sizeof(int32_t));
        } else {
            map.scale = map.bias;  // is read, and not used
        }
        if (map.precision == BINARY) {
            map.levels = levels_of(given.levels, given.in);
            needs_panels = true;
        }
        find_blocks(given, map);
        const size_t count = (size_t)map.blocks[map.wide / WIDE] * WIDE * DEPTH;
        if (map.precision == BINARY) {
            map.weights = hold(count / 8);
            kernels.pack_signs(given.signs, map);
        } else if (map.precision == INT8 && kernels.masks && expands()) {
            const Memory plain = allocate(count);
            map.weights = plain.get();
            kernels.pack(INT8, given.weight, map);
            keep_bytes(plain.get(), count, map);
        } else {
            map.weights = hold(count * (map.precision == FP32 ? 4 : map.precision == BF16 ? 2 : 1));
            kernels.pack(map.precision, given.weight, map);
        }
        maps++;
        return map;
    }

    // Of a binary map that reads two levels behind an activation: the sums at which they change, so that the activation
    // itself is not computed.
    void find_turns(Map& map, Activation activation) {
        Levels& how = map.levels;
        if (map.precision != BINARY || how.high - how.low != (how.sign ? 2 : 1)) return;
        std::vector<float> below(map.in), above(map.in);
        const float middle = how.sign ? 0 : how.alpha * (how.low + 0.5f);
        float last = 0;
        for (int k = 0; k < map.in; k++) {
            const float shift = how.shift != nullptr ? how.shift[k] : 0;
            if (k > 0 && shift == last)
                below[k] = below[k - 1], above[k] = above[k - 1];
            else
                reached(activation, (double)shift + middle, below[k], above[k]);
            last = shift;
        }
        how.below = floats(below.data(), map.in, map.deep);
        how.above = floats(above.data(), map.in, map.deep);
    }

    Levels levels_of(const sec_levels& given, int columns) {
        Levels found;
        found.alpha = given.alpha;
        found.inverse = 1 / given.alpha;
        found.shift = given.shift != nullptr ? floats(given.shift, columns, up_to(columns, DEPTH)) : nullptr;
        found.low = given.low;
        found.high = given.high;
        found.sign = given.sign;
        return found;
    }

  private:
    std::vector<Memory> held;
    char* free_from = nullptr;
    size_t left = 0;

    // The blocks of a map that are not all 0, of the panels' outputs one after the other.
    void find_blocks(const sec_map& given, Map& map) {
        const int across = map.deep / DEPTH, panels = map.wide / WIDE;
        auto empty = [&](int panel, int step) {
            if (given.signs != nullptr) return false;
            const int from = step * DEPTH, to = least(from + DEPTH, given.in);
            for (int n = panel * WIDE; n < least((panel + 1) * WIDE, given.out); n++)
                for (int k = from; k < to; k++)
                    if (given.weight[(size_t)n * given.in + k] != 0) return false;
            return true;
        };
        std::vector<int32_t> steps;
        map.blocks = (int32_t*)hold((size_t)(panels + 1) * sizeof(int32_t));
        map.blocks[0] = 0;
        for (int panel = 0; panel < panels; panel++) {
            for (int step = 0; step < across; step++)
                if (!empty(panel, step)) steps.push_back(step);
            map.blocks[panel + 1] = (int32_t)steps.size();
        }
        map.steps = (int32_t*)hold(steps.size() * sizeof(int32_t));
        if (!steps.empty()) memcpy(map.steps, steps.data(), steps.size() * sizeof(int32_t));
        blocks += (int64_t)steps.size();
        all_blocks += (int64_t)across * panels;
    }

    // Keeps packed bytes: those that are not 0 and where they are, if that takes clearly fewer.
    void keep_bytes(const char* plain, size_t count, Map& map) {
        size_t there = 0;
        for (size_t i = 0; i < count; i++) there += plain[i] != 0;
        if ((double)(there + count / 8) >= MASKED * (double)count) {
            map.weights = hold(count);
            memcpy(map.weights, plain, count);
            return;
        }
        map.weights = hold(there);
        map.masks = (uint64_t*)hold(count / 8);
        map.values = (size_t*)hold((size_t)(map.wide / WIDE) * sizeof(size_t));
        memset(map.masks, 0, count / 8);
        char* to = (char*)map.weights;
        for (int panel = 0; panel < map.wide / WIDE; panel++) {
            map.values[panel] = to - (char*)map.weights;
            const size_t begin = (size_t)map.blocks[panel] * WIDE * DEPTH, end = (size_t)map.blocks[panel + 1] * WIDE * DEPTH;
            for (size_t i = begin; i < end; i++) {
                if (plain[i] == 0) continue;
                map.masks[i / 64] |= (uint64_t)1 << i % 64;
                *to++ = plain[i];
            }
        }
        needs_panels = true;
        masked++;
    }

    // A copy, padded with zeros; zeros of null.
    float* floats(const float* from, int count, int padded) {
        float* to = (float*)hold((size_t)padded * sizeof(float));
        memset(to, 0, (size_t)padded * sizeof(float));
        if (from != nullptr) memcpy(to, from, (size_t)count * sizeof(float));
        return to;
    }

    // Memory for the encoder's life, from blocks of large pages.
    void* hold(size_t size) {
        size = (size + 63) / 64 * 64;
        bytes += (int64_t)size;
        if (size > left) {
            const size_t block = size > 4 * LARGE ? size : 4 * LARGE;
            held.push_back(allocate(block));
            free_from = held.back().get();
            left = block;
        }
        char* found = free_from;
        free_from += size;
        left -= size;
        return found;
    }
};

}  // namespace secateur
