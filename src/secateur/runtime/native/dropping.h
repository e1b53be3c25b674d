// Token elimination within a pass: which tokens of each example a layer hands on, and where they were. Included once, by
// the engine.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"
#include "secateur.h"

namespace secateur {

// The tokens that are left of a chunk of examples; they lie one behind the other.
class Tokens {
  public:
    Tokens(const int32_t* begins, int examples, const sec_dropping* given) : how(given) {
        starts.assign(begins, begins + examples + 1);
        entered = count();
        if (how == nullptr) return;
        for (int i = 0; i < examples; i++) {
            lengths.push_back(starts[i + 1] - starts[i]);
            for (int32_t t = starts[i]; t < starts[i + 1]; t++) {
                places.push_back(t - starts[i]);
                rows.push_back(t);
            }
        }
    }

    int examples() const { return (int)starts.size() - 1; }
    int count() const { return starts.back(); }
    bool all_there() const { return how == nullptr || count() == entered; }

    // Whether a layer's attention is to score: it has a choice, or its scores are averaged into later ones.
    bool scored(int layer) const {
        if (how == nullptr) return false;
        if (how->beta > 0) return first_only(layer) == EVERY;
        for (int i = 0; i < examples(); i++) {
            const int32_t wanted = target(layer, i);
            if (wanted > how->first + how->last && wanted < starts[i + 1] - starts[i]) return true;
        }
        return false;
    }

    // How many of each example's first tokens are all that a layer hands on; EVERY where others are among them.
    int first_only(int layer) const {
        if (how == nullptr || how->every) return EVERY;
        for (int i = 0; i < examples(); i++)
            if (target(layer, i) > how->first) return EVERY;
        return how->first;
    }

    // Choose what a layer hands on. `scores`: of each head, `stride` apart, to be multiplied by `unit`; none where nothing
    // was scored. Returns whether any token goes; `kept` then holds the rows, of those that there were, that stay.
    bool choose(int layer, const double* scores, int heads, int stride, float unit) {
        if (how == nullptr) return false;
        average(scores, heads, stride, unit);
        bool shorter = false;
        for (int i = 0; i < examples(); i++) shorter |= target(layer, i) < starts[i + 1] - starts[i];
        if (!shorter) return false;
        kept.clear();
        std::vector<int32_t> order;
        std::vector<int32_t> now(1, 0);
        for (int i = 0; i < examples(); i++) {
            const int32_t begin = starts[i], tokens = starts[i + 1] - begin;
            const int32_t count = target(layer, i), first = least(how->first, count);
            const int32_t last = least(how->last, count - first);
            const size_t from = kept.size();
            for (int32_t t = 0; t < first; t++) kept.push_back(begin + t);
            if (count < tokens) {  // the best ones between the ends, the earlier where they are equal
                order.clear();
                for (int32_t t = first; t < tokens - last; t++) order.push_back(begin + t);
                auto better = [&](int32_t a, int32_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); };
                const auto end = order.begin() + (count - first - last);
                std::nth_element(order.begin(), end, order.end(), better);
                kept.insert(kept.end(), order.begin(), end);
            } else {
                for (int32_t t = first; t < tokens - last; t++) kept.push_back(begin + t);
            }
            for (int32_t t = tokens - last; t < tokens; t++) kept.push_back(begin + t);
            std::sort(kept.begin() + (long)from, kept.end());
            now.push_back((int32_t)kept.size());
        }
        starts = now;
        gone.clear();
        for (size_t t = 0, next = 0; t < rows.size(); t++) {
            if (next < kept.size() && (size_t)kept[next] == t)
                next++;
            else
                gone.emplace_back(t, rows[t]);
        }
        take(places);
        take(rows);
        take(score);
        return true;
    }

    // Rows of results, brought together.
    void shorten(void* data, size_t bytes) const {
        char* to = (char*)data;
        for (size_t t = 0; t < kept.size(); t++)
            if ((size_t)kept[t] != t) memcpy(to + t * bytes, to + kept[t] * bytes, bytes);
    }

    std::vector<int32_t> starts;  // of each example, and the end
    std::vector<int32_t> places;  // of each token within its example, as given
    std::vector<int32_t> rows;    // of each token within the chunk, as given
    std::vector<int32_t> kept;    // by the last choice: rows that stayed
    std::vector<std::pair<size_t, size_t>> gone;  // and those that went, with where they were in the chunk as given

  private:
    int32_t target(int layer, int example) const {
        const int32_t ends = how->first + how->last;
        const int32_t wanted = (int32_t)ceil(how->shares[layer] * lengths[example] - 1e-6);
        return least(starts[example + 1] - starts[example], most(ends, wanted));
    }

    // Mean of the heads' scores, averaged with those of the layers before. Heads are summed up in double: scores of levels
    // that are equal shall be so in any order.
    void average(const double* scores, int heads, int stride, float unit) {
        if (scores == nullptr) {
            if (how->beta == 0 || score.empty()) score.assign(count(), 0.0f);
            return;
        }
        std::vector<float> fresh(count());
        for (int i = 0; i < examples(); i++) {
            const int32_t begin = starts[i], end = starts[i + 1];
            float sum = 0, before = 0;
            for (int32_t t = begin; t < end; t++) {
                double all = 0;
                for (int h = 0; h < heads; h++) all += scores[(size_t)h * stride + t];
                fresh[t] = (float)all;
                sum += fresh[t];
                if (!score.empty()) before += score[t];
            }
            const float tiny = 1.17549435e-38f;
            const int asking = end - begin > SHORT * how->queries ? how->queries : end - begin;
            const float size = how->by_value ? most_of(sum, tiny) : (float)heads * asking / unit;
            for (int32_t t = begin; t < end; t++) {
                fresh[t] /= size;
                if (how->beta > 0 && !score.empty())
                    fresh[t] = how->beta * score[t] / most_of(before, tiny) + (1 - how->beta) * fresh[t];
            }
        }
        score.swap(fresh);
    }

    static float most_of(float a, float b) { return a > b ? a : b; }

    template <class Value>
    void take(std::vector<Value>& of) const {
        for (size_t t = 0; t < kept.size(); t++) of[t] = of[kept[t]];
        of.resize(kept.size());
    }

    const sec_dropping* how;
    int entered;                   // tokens
    std::vector<int32_t> lengths;  // as given
    std::vector<float> score;
};

}  // namespace secateur
