// Threads that share the passes of one caller at a time. They look out for work while a pass goes on and sleep otherwise.
// Nobody waits for one that has not begun: one that is kept away, by other jobs or by waking up, delays no pass.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace secateur {

constexpr int LOOKS = 1024;         // at what is waited for, before others are let on the core
constexpr int LINGER = 4 * LOOKS;   // looks after a pass before a thread goes to sleep: a fifth of a millisecond

static inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What threads share. A number is odd while a job is open to whoever comes.
class Crew {
  public:
    explicit Crew(int count) {
        sigset_t all, before;
        sigfillset(&all);
        for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) sigdelset(&all, own);  // which a thread causes itself
        pthread_sigmask(SIG_SETMASK, &all, &before);  // others are for the threads that there were
        try {
            for (int thread = 1; thread < count; thread++) threads.emplace_back([this, thread] { work(thread); });
        } catch (const std::exception&) {  // fewer then: no thread or no memory for one
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Crew() {
        {
            std::lock_guard<std::mutex> guard(lock);
            leaving = true;
        }
        wake.notify_all();
        for (std::thread& thread : threads) thread.join();
    }

    void begin() {
        std::lock_guard<std::mutex> guard(lock);
        passing = true;
        if (asleep == 0) return;
        leave_this_core();
        wake.notify_all();
    }

    void end() { passing = false; }

    void share(Job given, void* about) {
        job = given;
        what = about;
        number++;
        given(about, 0);
        number++;
        for (int looks = 1; inside > 0; looks++) looks % LOOKS ? rest() : (void)sched_yield();
    }

  private:
    std::vector<std::thread> threads;
    std::mutex lock;
    std::condition_variable wake;
    std::atomic<bool> passing{false}, leaving{false};
    std::atomic<uint32_t> number{0};
    std::atomic<int> inside{0};
    int asleep = 0;
    Job job = nullptr;
    void* what = nullptr;

    // Kernels wake threads on the core of whoever wakes them, where others seem to be away as idle ones of virtual machines
    // do; there they would wait for milliseconds.
    void leave_this_core() {
#ifdef __linux__
        cpu_set_t others;
        if (sched_getaffinity(0, sizeof others, &others) != 0) return;
        CPU_CLR(sched_getcpu(), &others);
        if (CPU_COUNT(&others) < (int)threads.size()) return;  // some will have to share a core
        for (std::thread& thread : threads) pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
#endif
    }

    void work(int thread) {
        for (uint32_t last = 0; const uint32_t open = next(last); last = open) {
            inside++;
            if (number == open) job(what, thread);  // else it was closed before this thread came in
            inside--;
        }
    }

    // The number of an open job that is not the last one; 0 when threads are to leave.
    uint32_t next(uint32_t last) {
        for (int looks = 1; !leaving; looks++) {
            const uint32_t found = number;
            if (found % 2 && found != last) return found;
            if (looks < LINGER || passing) {
                looks % LOOKS ? rest() : (void)sched_yield();
                if (passing) looks = looks % LOOKS;
                continue;
            }
            std::unique_lock<std::mutex> guard(lock);
            asleep++;
            wake.wait(guard, [this] { return passing || leaving; });
            asleep--;
            looks = 0;
        }
        return 0;
    }
};

struct Workers : Team {
    std::unique_ptr<Crew> crew;
    pid_t owner = getpid();

    explicit Workers(int count) : Team{count, hand_out}, crew(count > 1 ? new Crew(count) : nullptr) {}
    ~Workers() {
        if (abandoned()) (void)crew.release();  // whose threads a fork has not: nothing there can be waited for
    }
    bool abandoned() const { return owner != getpid(); }

    static void hand_out(Team& team, Job job, void* what) { ((Workers&)team).crew->share(job, what); }
};

}  // namespace secateur
