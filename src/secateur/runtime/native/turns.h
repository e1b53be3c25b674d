// Where an activation reaches a value.
#pragma once
#include <math.h>

#include "kernels.h"

namespace secateur {
namespace {

// As single precision has it: 1 + erf and 1 + tanh end in 0, so that what is far below 0 becomes 0.
double activation_of(Activation activation, double x) {
    if (activation == GELU) return 0.5 * x * (1.0f + (float)erf(x * 0.70710678118654752));
    if (activation == GELU_TANH) return 0.5 * x * (1.0f + (float)tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    return x > 0 ? x : 0;
}

// The first number from `low` to `high` that is beyond a turn; `low` is not, `high` is.
template <class Beyond>
float turn_between(float low, float high, Beyond beyond) {
    for (;;) {
        const float middle = low + (high - low) / 2;
        if (middle <= low || middle >= high) return high;
        (beyond(middle) ? high : low) = middle;
    }
}

// The activation is at least `value` for arguments up to `below` and from `above` on.
void reached(Activation activation, double value, float& below, float& above) {
    const float bottom = activation == RELU ? 0 : activation == GELU ? -0.751791525f : -0.752461433f;  // it rises from there
    auto high_enough = [&](double x) { return activation_of(activation, x) >= value; };
    below = above = -INFINITY;
    if (high_enough(bottom)) return;
    above = turn_between(bottom, fmaxf((float)value, 0) + 1, high_enough);
    if (value <= 0) below = -turn_between(-bottom, 40, [&](float x) { return high_enough(-x); });
}

}  // namespace
}  // namespace secateur
