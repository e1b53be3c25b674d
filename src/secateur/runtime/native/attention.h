// Attention of one example and head after another, and the scores of tokens that it gives.
#pragma once
#include "vectors.h"

namespace secateur {
namespace {

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
        const int asking = least(tokens, what.queries_read);
        for (int i = 0; i < asking; i += 4) {
            const int count = least(4, asking - i);
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
                if (paid != nullptr) count_in(row, what.levels != nullptr ? 1 : inverse[r], seen, tokens, i + r, paid);
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
    // text, those at s n / queries of a long one. Levels are added up as they are: whole numbers are exact.
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
        double* to = what.scores + (size_t)h * what.score_stride + first;
        for (int j = 0; j < tokens; j++)
            to[j] = what.by_value ? paid[j] * sqrt((double)squares(values + (size_t)j * qkv.stride)) : paid[j];
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
static void attend(Rows qkv, const Attention& what, Rows to, Team& team) {
    const AttentionRun<Value> run{qkv, to, what};
    over(what.examples * what.heads, 1, team, [&](int job, int thread) {
        run.head(job / what.heads, job % what.heads, what.scratch + what.scratch_each * thread);
    });
}

static void generic_attention(Rows qkv, const Attention& what, Rows to, Team& team) {
    (qkv.half ? attend<uint16_t> : attend<float>)(qkv, what, to, team);
}

}  // namespace
}  // namespace secateur
