// Threads that stay: they spin for the next job for a while, then sleep; and a barrier among them.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace openelm {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int threads) : threads(threads), shares(threads) {
        for (int k = 1; k < threads; k++) workers.emplace_back([this, k] { serve(k); });
    }
    ~Pool() {
        ending = true;
        job.fetch_add(1);
        job.notify_all();
        for (auto& worker : workers) worker.join();
    }
    Pool(const Pool&) = delete;

    // body(thread) on every thread, the caller's being thread 0; returns when all have finished. One caller at a time.
    void run(const std::function<void(int)>& body) {
        work = &body;
        job.fetch_add(1, std::memory_order_release);
        job.notify_all();
        body(0);
        barrier();
    }

    // Returns when all threads have come to it; what they wrote before is then seen by all.
    void barrier() {
        const unsigned before = phase.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == before; spins++)
            if (spins < 2000) pause_cpu();
            else std::this_thread::yield();  // another program has the other thread's core
    }

    // Called on all threads at once, deals n pieces out: body(piece) for each, once. Who is done with a share of their
    // own helps the neighbours: seldom are two threads equally fast. Between two deals stands a barrier.
    template <class Body>
    void deal(int thread, long n, Body body) {
        Share& own = shares[thread];
        const int turn = own.turn ^= 1;
        own.dealt[1 - turn].store(0, std::memory_order_relaxed);  // for the next deal; nobody is in the last any more
        for (int k = 0; k < std::min(threads, 4); k++) {
            const int whose = (thread + k) % threads;
            std::atomic<long>& dealt = shares[whose].dealt[turn];
            const long first = n * whose / threads, count = n * (whose + 1) / threads - first;
            for (long i; (i = dealt.load(std::memory_order_relaxed)) < count;) {
                const long some = std::max(1L, (count - i) / 4);
                i = dealt.fetch_add(some, std::memory_order_relaxed);
                for (long piece = i; piece < std::min(i + some, count); piece++) body(first + piece);
            }
        }
    }

    const int threads;

  private:
    struct alignas(64) Share {
        std::atomic<long> dealt[2] = {0, 0};
        int turn = 0;
    };

    void serve(int thread) {
        using clock = std::chrono::steady_clock;
        for (unsigned seen = 0;; seen++) {
            const auto until = clock::now() + std::chrono::microseconds(500);
            while (job.load(std::memory_order_acquire) == seen && clock::now() < until)
                for (int k = 0; k < 16; k++) pause_cpu();
            job.wait(seen, std::memory_order_acquire);
            if (ending) return;
            (*work)(thread);
            barrier();
        }
    }

    std::vector<Share> shares;
    std::vector<std::thread> workers;
    const std::function<void(int)>* work = nullptr;
    std::atomic<bool> ending{false};
    alignas(64) std::atomic<unsigned> job{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> phase{0};
};

}  // namespace openelm
