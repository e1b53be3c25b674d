// The encoder: its layers, and a pass of a few examples through them. Knows no instructions of its own. Included once, by
// the engine.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <mutex>
#include <vector>

#include "dropping.h"
#include "kernels.h"
#include "secateur.h"
#include "storage.h"
#include "team.h"
#include "workers.h"

namespace secateur {

struct Norm {
    std::vector<float> gain, shift;
    float epsilon = 0;
};

struct Layer {
    sec_layer given;
    Map qkv, out, up, down, parts[3];
    Levels operands[3];  // queries, keys and values are rounded to
    AttentionLevels levels;
    Norm after_attention, after_feed_forward;
    std::vector<float> relative;
    Norm before_attention, before_feed_forward;
    Map gate;
};

// What one pass needs; kept for the next one.
struct Workspace {
    size_t tokens = 0, longest = 0;
    int threads = 0;
    Memory input, scale, wide, context, narrow, scratch, scores, last, panels, rounded, normed;
};

}  // namespace secateur

using namespace secateur;

struct sec_encoder {
    sec_config config;
    int tier;
    const Kernels* kernels;
    std::vector<Layer> layers;
    Storage storage, storage_beside;
    std::vector<Map> beside;  // maps of embeddings and heads
    int widest = 0, deepest = 0, widest_context = 0, widest_head = 0, most_heads = 0;
    Norm last;
    bool norms_before = false;
    std::mutex lock;
    std::vector<std::unique_ptr<Workspace>> spare;
    std::vector<std::unique_ptr<Workers>> resting;

    Precision precision() const { return (Precision)config.precision; }
    bool half() const { return config.precision != FP32; }
    size_t entry() const { return half() ? 2 : 4; }

    Map packed(const sec_map& given) {
        const Map map = storage.packed(given, precision(), *kernels);
        widest = most(widest, map.wide);
        deepest = most(deepest, map.deep);
        return map;
    }

    Norm norm_of(const sec_norm& given) const {
        if (given.gain == nullptr) return {};
        return {{given.gain, given.gain + config.hidden}, {given.shift, given.shift + config.hidden}, given.epsilon};
    }

    void add(const sec_layer& given) {
        Layer layer{given, {}, {}, {}, {}, {}, {}, {}, norm_of(given.after_attention), norm_of(given.after_feed_forward), {},
                    norm_of(given.before_attention), norm_of(given.before_feed_forward), {}};
        if (!given.skip_attention) {
            if (given.heads > 0 && !given.split) layer.qkv = packed(given.qkv);
            for (int i = 0; i < 3 && given.heads > 0 && given.split; i++) layer.parts[i] = packed(given.parts[i]);
            if (given.heads > 0 && given.split) widest = most(widest, 3 * layer.parts[0].wide);
            for (int i = 0; i < 3; i++) layer.operands[i] = storage.levels_of(given.operands[i], 0);
            layer.levels = {storage.levels_of(given.probabilities, 0), given.scores, given.context};
            layer.out = packed(given.out);
        }
        if (!given.skip_feed_forward) {
            if (given.neurons > 0) layer.up = packed(given.up);
            if (given.neurons > 0 && given.gate.weight != nullptr) layer.gate = packed(given.gate);
            layer.down = packed(given.down);
            storage.find_turns(layer.down, (Activation)config.activation);
            widest = most(widest, layer.up.wide + layer.gate.wide);
        }
        if (given.relative != nullptr)
            layer.relative.assign(given.relative, given.relative + (size_t)given.heads * (2 * config.reach + 1));
        widest_context = most(widest_context, up_to(given.heads * given.head_width, 16));
        widest_head = most(widest_head, given.head_width);
        most_heads = most(most_heads, given.heads);
        norms_before |= !layer.before_attention.gain.empty() || !layer.before_feed_forward.gain.empty();
        layers.push_back(std::move(layer));
    }

    std::unique_ptr<Workspace> workspace(size_t tokens, size_t longest, int threads) {
        std::unique_ptr<Workspace> found;
        {
            std::lock_guard<std::mutex> guard(lock);
            if (!spare.empty()) found = std::move(spare.back()), spare.pop_back();
        }
        if (found == nullptr) found = std::make_unique<Workspace>();
        if (found->tokens >= tokens && found->longest >= longest && found->threads >= threads) return found;
        const size_t rows = up_to((int)tokens, BAND) + BAND;
        const size_t each = kernels->attention_scratch(most(widest_head, 1), (int)longest);
        Workspace fresh;
        fresh.tokens = tokens;
        fresh.longest = longest;
        fresh.threads = threads;
        fresh.input = allocate(rows * deepest * (config.precision == INT8 ? 1 : entry()));
        if (storage.needs_panels) fresh.panels = allocate((size_t)threads * 2 * WIDE * deepest);
        if (storage.needs_panels) fresh.rounded = allocate(rows * deepest);
        fresh.scale = allocate(rows * sizeof(float));
        fresh.wide = allocate(rows * widest * entry());
        fresh.context = allocate(rows * widest_context * entry());
        fresh.narrow = allocate(rows * up_to(config.hidden, WIDE) * entry());
        fresh.scratch = allocate(each * threads * sizeof(float));
        fresh.scores = allocate(rows * most_heads * sizeof(double));
        fresh.last = allocate(rows * config.hidden * sizeof(float));
        if (norms_before) fresh.normed = allocate(rows * config.hidden * sizeof(float));
        *found = std::move(fresh);
        return found;
    }

    // So many threads, this one among them, for `then`; they rest until the next call.
    template <class Then>
    void with_team(int threads, Then then) {
        Team alone{1, nullptr};
        if (threads < 2) return then(alone);
        std::unique_ptr<Workers> found;
        std::vector<std::unique_ptr<Workers>> others;  // of another number leave
        {
            std::lock_guard<std::mutex> guard(lock);
            while (found == nullptr && !resting.empty()) {
                const bool fits = resting.back()->threads == threads && !resting.back()->abandoned();
                if (fits) found = std::move(resting.back());
                if (!fits) others.push_back(std::move(resting.back()));
                resting.pop_back();
            }
        }
        if (found == nullptr) found = std::make_unique<Workers>(threads);
        found->crew->begin();
        then(*found);
        found->crew->end();
        std::lock_guard<std::mutex> guard(lock);
        resting.push_back(std::move(found));
    }

    // Queries, keys and values side by side, rounded if attention is on levels.
    template <class Through>
    Rows operands(const Layer& layer, Rows stream, Workspace& work, Through through) const {
        const sec_layer& given = layer.given;
        if (!given.split) {
            const Rows qkv{work.wide.get(), layer.qkv.wide, half()};
            through(layer.qkv, stream, NONE, qkv);
            return qkv;
        }
        const bool halves = half() || (given.rounded && kernels->halves);
        const int each = given.heads * given.head_width, stride = 3 * layer.parts[0].wide;
        const size_t bytes = halves ? 2 : 4;
        const Rows all{work.wide.get(), stride, halves};
        for (int i = 0; i < 3; i++) {  // in turn: padded columns of one are written over by the next
            const Levels* how = given.rounded ? &layer.operands[i] : nullptr;
            through(layer.parts[i], stream, NONE, Rows{(char*)all.data + i * each * bytes, stride, halves, how});
        }
        return all;
    }

    void run(float* x, const int32_t* starts, int examples, Team& team, const sec_dropping* dropping, Workspace& work) const {
        const int given_rows = starts[examples], hidden = config.hidden;
        const bool every = dropping != nullptr && dropping->every;
        int rows = given_rows;
        Tokens tokens(starts, examples, dropping);
        void* input = work.input.get();
        float* scale = (float*)work.scale.get();
        float* states = (float*)work.last.get();
        const size_t bytes = (size_t)hidden * sizeof(float);
        const Rows stream{x, hidden, false};
        const Rows narrow{work.narrow.get(), up_to(hidden, WIDE), half()};
        auto multiply = [&](const Map& map, const void* from, Activation activation, Rows to) {
            kernels->product(map.precision, from, scale, rows, map, activation, to, work.panels.get(), team);
        };
        auto through = [&](const Map& map, Rows from, Activation activation, Rows to) {
            kernels->prepare(map.precision, from, rows, map, input, scale, team);
            multiply(map, input, activation, to);
        };
        auto before = [&](const Norm& norm) {  // what a block reads of the stream
            if (norm.gain.empty()) return stream;
            float* to = (float*)work.normed.get();
            kernels->norm(x, rows, hidden, norm.gain.data(), norm.shift.data(), norm.epsilon, to, team);
            return Rows{to, hidden, false};
        };
        auto settle = [&](const Norm& norm, const Rows* y, const float* bias) {
            if (norm.gain.empty()) return kernels->add(x, y, bias, rows, hidden, team);
            kernels->add_norm(x, y, bias, rows, hidden, norm.gain.data(), norm.shift.data(), norm.epsilon, team);
        };
        for (int index = 0; index < (int)layers.size(); index++) {
            const Layer& layer = layers[index];
            const sec_layer& given = layer.given;
            const bool attends = !given.skip_attention && given.heads > 0;
            double* scores = attends && tokens.scored(index) ? (double*)work.scores.get() : nullptr;
            const float unit = given.rounded ? layer.levels.probabilities.alpha : 1;
            const Rows context{work.context.get(), up_to(given.heads * given.head_width, 16), half()};
            // Tokens go behind the attention that scores them; if their last states are wanted, once they have these.
            auto drop = [&] {
                if (!tokens.choose(index, scores, given.heads, given_rows, unit)) return;
                if (every)
                    for (const auto& [at, row] : tokens.gone) memcpy(states + row * hidden, x + at * hidden, bytes);
                tokens.shorten(x, bytes);
                if (attends && !every) tokens.shorten(context.data, context.stride * entry());
                rows = tokens.count();
            };
            if (attends) {
                const Rows qkv = operands(layer, before(layer.before_attention), work, through);
                const size_t each = kernels->attention_scratch(given.head_width, (int)work.longest);
                const Attention what{given.heads, given.head_width, examples, config.reach,
                                     given.rounded ? 1.0f : given.scaling,
                                     layer.relative.empty() ? nullptr : layer.relative.data(), tokens.starts.data(),
                                     (float*)work.scratch.get(), each,
                                     tokens.all_there() ? nullptr : tokens.places.data(), given.rotary, given.window,
                                     scores, given_rows, scores != nullptr ? dropping->queries : 0,
                                     scores != nullptr && dropping->by_value, scores != nullptr && dropping->diagonal,
                                     given.rounded ? &layer.levels : nullptr,
                                     scores != nullptr ? EVERY : tokens.first_only(index)};
                if (given.rotary != nullptr) kernels->rotate(qkv, what, team);
                kernels->attention(qkv, what, context, team);
            }
            if (dropping != nullptr && !every) drop();
            if (attends) {
                through(layer.out, context, NONE, narrow);
                settle(layer.after_attention, &narrow, nullptr);
            } else if (!given.skip_attention) {
                settle(layer.after_attention, nullptr, layer.out.bias);
            }
            if (every) drop();
            if (!given.skip_feed_forward && given.neurons > 0) {
                const auto activation = (Activation)config.activation;
                const Rows read = before(layer.before_feed_forward);
                if (layer.down.precision == BINARY && layer.up.precision == BINARY && layer.down.in == layer.down.deep) {
                    const Rows rounded{work.rounded.get(), 0, false, nullptr, &layer.down};
                    through(layer.up, read, activation, rounded);
                    multiply(layer.down, rounded.data, NONE, narrow);
                } else {
                    const Rows neurons{work.wide.get(), layer.up.wide + layer.gate.wide, half()};
                    through(layer.up, read, activation, neurons);
                    if (layer.gate.wide > 0) {  // reads what the other map reads, beside which its results are put
                        const Rows gates{(char*)neurons.data + layer.up.wide * entry(), neurons.stride, half()};
                        multiply(layer.gate, input, NONE, gates);
                        kernels->multiply(neurons, gates, rows, given.neurons, team);
                    }
                    through(layer.down, neurons, NONE, narrow);
                }
                settle(layer.after_feed_forward, &narrow, nullptr);
            } else if (!given.skip_feed_forward) {
                settle(layer.after_feed_forward, nullptr, layer.down.bias);
            }
        }
        if (every) {
            for (int t = 0; t < rows; t++) memcpy(states + tokens.rows[t] * (size_t)hidden, x + (size_t)t * hidden, bytes);
            memcpy(x, states, (size_t)given_rows * bytes);
        } else if (rows < given_rows) {  // first tokens back to where they were, the last example's first
            for (int i = examples - 1; i >= 0; i--)
                memmove(x + (size_t)starts[i] * hidden, x + (size_t)tokens.starts[i] * hidden, bytes);
        }
        rows = given_rows;
        if (!last.gain.empty()) settle(last, nullptr, nullptr);
    }
};
