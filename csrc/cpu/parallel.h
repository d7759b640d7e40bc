// Parallel loops and scratch memory, per instruction set (see isa.h).
#pragma once

#include <cstdint>
#include <cstdlib>

#include "threads.h"

namespace tt {
namespace TT_ISA {

// f(begin, end) over [0, n) in pieces of `grain`, handed out as threads become free. Pieces must be independent.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, F f) {
    if (n <= 0) return;
    int64_t pieces = (n + grain - 1) / grain;
    int threads = pieces < max_threads() ? int(pieces) : max_threads();
    if (threads <= 1) return f(int64_t(0), n);
    struct Loop {
        F* f;
        int64_t n, grain, next;
        static void work(void* data) {
            Loop& loop = *static_cast<Loop*>(data);
            for (;;) {
                int64_t begin = __atomic_fetch_add(&loop.next, loop.grain, __ATOMIC_RELAXED);
                if (begin >= loop.n) return;
                (*loop.f)(begin, begin + loop.grain < loop.n ? begin + loop.grain : loop.n);
            }
        }
    } loop{&f, n, grain, 0};
    run_on_threads(&Loop::work, &loop, threads);
}

// Uninitialised memory for the time of a scope, aligned to a cache line. (Not std::vector: see isa.h.)
template <class T>
class Scratch {
   public:
    explicit Scratch(int64_t n) {
        size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
        if (data_ == nullptr) std::abort();  // out of memory for a few rows: nothing could be told to anyone
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() { return data_; }

   private:
    T* data_;
};

}  // namespace TT_ISA
}  // namespace tt
