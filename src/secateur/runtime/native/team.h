// How kernels share work among the threads of a pass.
#pragma once
#include "kernels.h"

namespace secateur {
namespace {

// Calls body(thread) in this thread and in those of the team that come in time.
template <class Body>
static inline void together(Team& team, Body body) {
    if (team.threads < 2) return body(0);
    team.share(team, [](void* what, int thread) { (*(Body*)what)(thread); }, &body);
}

// Calls body(i, thread) for each i below `count`; threads take `each` of them at a time, as they come.
template <class Body>
static inline void over(int count, int each, Team& team, Body body) {
    if (team.threads < 2 || count <= each) {
        for (int i = 0; i < count; i++) body(i, 0);
        return;
    }
    int taken = 0;
    together(team, [&](int thread) {
        for (;;) {
            const int from = __atomic_fetch_add(&taken, each, __ATOMIC_RELAXED);
            if (from >= count) return;
            for (int i = from; i < least(from + each, count); i++) body(i, thread);
        }
    });
}

}  // namespace
}  // namespace secateur
