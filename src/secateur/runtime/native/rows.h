// What is done to rows between products: residual sums and norms, rotary positions, gates.
#pragma once
#include "vectors.h"

namespace secateur {
namespace {

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
                             const float* shift, float epsilon, Team& team) {
    over(rows, 16, team, [&](int m, int) {
        float* row = x + (size_t)m * hidden;
        if (y != nullptr && y->half)
            norm_row(row, (const uint16_t*)y->data + (size_t)m * y->stride, bias, hidden, gain, shift, epsilon,
                     row);
        else
            norm_row(row, y ? (const float*)y->data + (size_t)m * y->stride : nullptr, bias, hidden, gain, shift, epsilon,
                     row);
    });
}

// --- what layers whose norms precede their blocks need besides ----------------------------------------------------

static void generic_norm(float* x, int rows, int hidden, const float* gain, const float* shift, float epsilon, float* to,
                         Team& team) {
    over(rows, 16, team, [&](int m, int) {
        const size_t at = (size_t)m * hidden;
        norm_row<float>(x + at, nullptr, nullptr, hidden, gain, shift, epsilon, to + at);
    });
}

template <class Value>
SEC_INLINE void add_row(float* x, const Value* y, int hidden) {
    int k = 0;
    for (; k + LANES <= hidden; k += LANES) store(x + k, load(x + k) + load(y + k));
    for (; k < hidden; k++) x[k] += one(y + k);
}

static void generic_add(float* x, const Rows* y, const float* bias, int rows, int hidden, Team& team) {
    over(rows, 16, team, [&](int m, int) {
        float* row = x + (size_t)m * hidden;
        if (y == nullptr)
            add_row(row, bias, hidden);
        else if (y->half)
            add_row(row, (const uint16_t*)y->data + (size_t)m * y->stride, hidden);
        else
            add_row(row, (const float*)y->data + (size_t)m * y->stride, hidden);
    });
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
static void rotate_rows(Rows qkv, const Attention& what, Team& team) {
    const int rows = what.starts[what.examples], half = what.width / 2;
    over(rows, 16, team, [&](int m, int) {
        const float* cosines = what.rotary + (size_t)place_of_row(what, m) * what.width;
        Value* row = (Value*)qkv.data + (size_t)m * qkv.stride;
        for (int h = 0; h < 2 * what.heads; h++) rotate_head(row + h * what.width, cosines, cosines + half, half);
    });
}

static void generic_rotate(Rows qkv, const Attention& what, Team& team) {
    (qkv.half ? rotate_rows<uint16_t> : rotate_rows<float>)(qkv, what, team);
}

template <class Value>
static void multiply_rows(Rows x, Rows by, int rows, int count, Team& team) {
    over(rows, 16, team, [&](int m, int) {
        Value* row = (Value*)x.data + (size_t)m * x.stride;
        const Value* factors = (const Value*)by.data + (size_t)m * by.stride;
        int k = 0;
        for (; k + LANES <= count; k += LANES) store(row + k, load(row + k) * load(factors + k));
        for (; k < count; k++) put(row + k, one(row + k) * one(factors + k));
    });
}

static void generic_multiply(Rows x, Rows by, int rows, int count, Team& team) {
    (x.half ? multiply_rows<uint16_t> : multiply_rows<float>)(x, by, rows, count, team);
}

}  // namespace
}  // namespace secateur
