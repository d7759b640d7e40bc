// Parallel loops and scratch memory, per instruction set (see isa.h).
#pragma once

#include <cstdint>
#include <cstdlib>

#include "threads.h"

namespace tt {
namespace TT_ISA {

// f(begin, end) over [0, n), in independent pieces of `grain`. A thread that is free takes half of its share of what
// is left: long runs of neighbours at first, single pieces in the end, when all should finish together.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, F f) {
    if (n <= 0) return;
    int64_t pieces = (n + grain - 1) / grain;
    int threads = pieces < max_threads() ? int(pieces) : max_threads();
    if (threads <= 1) return f(int64_t(0), n);
    struct Loop {
        F* f;
        int64_t n, grain, pieces, threads, next;
        bool take(int64_t& begin, int64_t& count) {
            begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
            do {  // a failure leaves in `begin` what another thread has made of it
                if (begin >= pieces) return false;
                count = (pieces - begin) / (2 * threads);
                if (count < 1) count = 1;
            } while (
                !__atomic_compare_exchange_n(&next, &begin, begin + count, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
            return true;
        }
        static void work(void* data) {
            Loop& loop = *static_cast<Loop*>(data);
            for (int64_t begin, count; loop.take(begin, count);) {
                const int64_t end = (begin + count) * loop.grain;
                (*loop.f)(begin* loop.grain, end < loop.n ? end : loop.n);
            }
        }
    } loop{&f, n, grain, pieces, threads, 0};
    run_on_threads(&Loop::work, &loop, threads);
}

// Uninitialised memory for the time of a scope, aligned to a cache line: room for a * b * ... numbers, the factors
// given apart so that a product beyond 64 bits is noticed. Where there is no such memory, out_of_memory() throws. (Not
// std::vector: see isa.h.)
template <class T>
class Scratch {
   public:
    template <class... Factors>
    explicit Scratch(Factors... factors) {
        size_t bytes = sizeof(T);
        if ((... || __builtin_mul_overflow(bytes, factors, &bytes)) || bytes > SIZE_MAX / 2) out_of_memory();
        bytes = (bytes + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
        if (data_ == nullptr) out_of_memory();
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
