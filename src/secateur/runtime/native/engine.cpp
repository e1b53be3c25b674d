// The C interface: what is checked before an encoder is made, and how a batch is cut into passes.
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "encoder.h"

static constexpr int CHUNK = 256;  // tokens of whole examples that go through the layers together, so that they stay in cache
static constexpr int MOST_ENTERING = 512;  // where most of them go on the way

static bool is(const sec_map& map, int out, int in) {
    return map.out == out && map.in == in && (map.signs == nullptr || map.scale != nullptr);
}

static bool attends(const sec_config& config, const sec_layer& layer, int all) {
    if (!layer.split) return is(layer.qkv, 3 * all, config.hidden);
    bool found = config.precision == FP32;  // what is rounded comes as floats
    for (const sec_map& part : layer.parts) found = found && is(part, all, config.hidden);
    return found;
}

static bool fits(const sec_config& config, const sec_layer& layer) {
    const int all = layer.heads * layer.head_width;
    const bool attention = layer.skip_attention || (is(layer.out, config.hidden, all) &&
                                                    (layer.heads == 0 || attends(config, layer, all)));
    const bool inner = layer.skip_feed_forward ||
                       (is(layer.down, config.hidden, layer.neurons) &&
                        (layer.neurons == 0 || is(layer.up, layer.neurons, config.hidden)));
    const bool gated = layer.gate.weight == nullptr || is(layer.gate, layer.neurons, config.hidden);
    const bool turned = layer.rotary == nullptr || layer.head_width % 2 == 0;
    return attention && inner && gated && turned;
}

// A word's row.
static void look_up(const sec_tables& tables, int64_t id, float* row) {
    const int width = tables.width;
    if (tables.word_bits == 32) {
        memcpy(row, (const float*)tables.words + (size_t)id * width, (size_t)width * sizeof(float));
    } else if (tables.word_bits == 8) {
        const int8_t* whole = (const int8_t*)tables.words + (size_t)id * width;
        for (int k = 0; k < width; k++) row[k] = (float)whole[k] * tables.word_scale[id];
    } else {
        const uint64_t* signs = (const uint64_t*)tables.words + (size_t)id * (up_to(width, 64) / 64);
        for (int k = 0; k < width; k++) row[k] = signs[k / 64] >> (k % 64) & 1 ? tables.word_scale[id] : -tables.word_scale[id];
    }
}

// Tokens that may enter together, so that about CHUNK of them are there in the middle layers. Those that hand on first
// tokens alone come last and do not count.
static int32_t entering(int layers, const sec_dropping* dropping) {
    double sum = 0;
    int counted = 0;
    for (int i = 0; dropping != nullptr && i < layers; i++) {
        sum += dropping->shares[i];
        counted += dropping->shares[i] > 0;
    }
    return counted == 0 ? CHUNK : least(MOST_ENTERING, (int)(CHUNK * counted / sum));
}

extern "C" {

int32_t sec_best_tier(void) {
    static const int32_t best = best_tier();
    return best;
}

sec_encoder* sec_open(const sec_config* config, const sec_layer* layers, char* why, int32_t size) {
    auto refuse = [&](const char* reason) {
        snprintf(why, size, "%s", reason);
        return nullptr;
    };
    if (config->hidden < 1) return refuse("the hidden size is not positive");
    for (int i = 0; i < config->layers; i++)
        if (!fits(*config, layers[i])) return refuse("the shapes of a layer do not fit each other");
    if (config->precision < 0 || config->precision > 2) return refuse("unknown precision");
    if (config->activation < 1 || config->activation > 3) return refuse("unknown activation");
    if (config->tier > sec_best_tier()) return refuse("this machine or this build has not that tier");
    try {
        auto made = std::make_unique<sec_encoder>();
        made->config = *config;
        made->tier = config->tier < 0 ? sec_best_tier() : config->tier;
        made->kernels = &kernels_of(made->tier);
        for (int i = 0; i < config->layers; i++) made->add(layers[i]);
        made->last = made->norm_of(config->last);
        return made.release();
    } catch (const std::bad_alloc&) {
        return refuse("not enough memory");
    }
}

void sec_close(sec_encoder* encoder) { delete encoder; }
int32_t sec_tier(const sec_encoder* encoder) { return encoder->tier; }
int64_t sec_bytes(const sec_encoder* encoder) { return encoder->storage.bytes; }
void sec_storage(const sec_encoder* encoder, int64_t* found) {
    const Storage& kept = encoder->storage;
    const int64_t held[] = {kept.maps, kept.masked, kept.blocks, kept.all_blocks};
    memcpy(found, held, sizeof held);
}

int32_t sec_embed(sec_encoder* encoder, const sec_tables* tables, const int64_t* ids, const int64_t* types,
                  const int32_t* starts, int32_t examples, float* x, int32_t threads) {
    const int width = tables->width;
    for (int32_t i = 0; i < examples; i++)  // before any row is written
        if (starts[i + 1] <= starts[i] || starts[i + 1] - starts[i] > tables->places - tables->offset) return 2;
    for (int32_t i = 0; i < examples; i++) {
        for (int32_t t = starts[i]; t < starts[i + 1]; t++) {
            if (ids[t] < 0 || ids[t] >= tables->vocabulary) return 1;
            float* row = x + (size_t)t * width;
            look_up(*tables, ids[t], row);
            if (tables->positions != nullptr) {
                const float* place = tables->positions + (size_t)(t - starts[i] + tables->offset) * width;
                for (int k = 0; k < width; k++) row[k] += place[k];
            }
            if (tables->types == nullptr) continue;
            const int64_t kind = types == nullptr ? 0 : types[t];
            if (kind < 0 || kind >= tables->kinds) return 3;
            const float* type = tables->types + (size_t)kind * width;
            for (int k = 0; k < width; k++) row[k] += type[k];
        }
    }
    const sec_norm& norm = tables->norm;
    try {
        encoder->with_team(threads, [&](Team& team) {
            encoder->kernels->add_norm(x, nullptr, nullptr, starts[examples], width, norm.gain, norm.shift, norm.epsilon, team);
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 4;
    }
}

int32_t sec_run(sec_encoder* encoder, float* x, const int32_t* starts, int32_t examples, int32_t threads,
                const sec_dropping* dropping) {
    try {
        size_t longest = 0, most_tokens = 0;
        const int32_t chunk = entering(encoder->config.layers, dropping);
        std::vector<int32_t> ends;  // of chunks, in examples
        for (int32_t begin = 0; begin < examples;) {
            int32_t end = begin + 1;
            while (end < examples && starts[end + 1] - starts[begin] <= chunk) end++;
            most_tokens = most((int)most_tokens, starts[end] - starts[begin]);
            ends.push_back(end);
            begin = end;
        }
        for (int32_t i = 0; i < examples; i++) longest = most((int)longest, starts[i + 1] - starts[i]);
        if (most_tokens == 0) return 0;
        // Enough chunks for all threads: each takes whole ones, and none waits for another within a layer.
        const int chunks = (int)ends.size(), outer = chunks >= threads ? threads : 1, inner = outer > 1 ? 1 : threads;
        std::vector<std::unique_ptr<Workspace>> work;
        for (int i = 0; i < outer; i++) work.push_back(encoder->workspace(most_tokens, longest, inner));
        std::vector<std::vector<int32_t>> inside;  // where examples begin, from the beginning of their chunk
        for (int i = 0, begin = 0; i < chunks; begin = ends[i++]) {
            inside.emplace_back(starts + begin, starts + ends[i] + 1);
            for (int32_t& place : inside.back()) place -= starts[begin];
        }
        auto pass = [&](int i, Team& team, Workspace& spare) {
            const int32_t begin = i > 0 ? ends[i - 1] : 0;
            float* rows = x + (size_t)starts[begin] * encoder->config.hidden;
            encoder->run(rows, inside[i].data(), ends[i] - begin, team, dropping, spare);
        };
        std::atomic<bool> short_of_memory{false};
        encoder->with_team(threads, [&](Team& team) {
            if (outer == 1) {
                for (int i = 0; i < chunks; i++) pass(i, team, *work[0]);
                return;
            }
            over(chunks, 1, team, [&](int i, int thread) {
                Team alone{1, nullptr};
                try {
                    pass(i, alone, *work[thread]);
                } catch (const std::bad_alloc&) {  // may not leave a thread
                    short_of_memory = true;
                }
            });
        });
        if (short_of_memory) throw std::bad_alloc();
        std::lock_guard<std::mutex> guard(encoder->lock);
        for (auto& each : work) encoder->spare.push_back(std::move(each));
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

int32_t sec_add(sec_encoder* encoder, const sec_map* map) {
    try {
        encoder->beside.push_back(encoder->storage_beside.packed(*map, FP32, *encoder->kernels));
        return (int32_t)encoder->beside.size() - 1;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

int32_t sec_apply(sec_encoder* encoder, int32_t number, const float* x, int32_t rows, float* to, int32_t threads) {
    try {
        const Map& map = encoder->beside[number];
        const Memory input = allocate((size_t)rows * map.deep * sizeof(float));
        const Memory found = allocate((size_t)rows * map.wide * sizeof(float));
        encoder->with_team(threads, [&](Team& team) {
            const Rows from{(void*)x, map.in, false}, whole{found.get(), map.wide, false};
            encoder->kernels->prepare(FP32, from, rows, map, input.get(), nullptr, team);
            encoder->kernels->product(FP32, input.get(), nullptr, rows, map, NONE, whole, nullptr, team);
        });
        for (int m = 0; m < rows; m++)
            memcpy(to + (size_t)m * map.out, (const float*)found.get() + (size_t)m * map.wide, (size_t)map.out * sizeof(float));
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // extern "C"
