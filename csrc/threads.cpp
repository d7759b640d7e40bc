#include "cpu/threads.h"

#include <dlfcn.h>

#include <atomic>
#include <new>

namespace tt {

namespace {
// Looked up once, by name: whichever OpenMP library the process has. GNU's and LLVM's both export these.
struct Pool {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*max_threads)();
    int (*in_parallel)();
    Pool()
        : parallel(find<decltype(parallel)>("GOMP_parallel")),
          max_threads(find<decltype(max_threads)>("omp_get_max_threads")),
          in_parallel(find<decltype(in_parallel)>("omp_in_parallel")) {}
    explicit operator bool() const { return parallel && max_threads && in_parallel; }

   private:
    template <class F>
    static F find(const char* name) {
        return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    }
};

const Pool& pool() {
    static Pool found;
    return found;
}
}  // namespace

int max_threads() {
    return pool() && !pool().in_parallel() ? pool().max_threads() : 1;
}

void run_on_threads(void (*work)(void*), void* data, int threads) {
    if (!pool()) return work(data);
    // No exception may pass through the pool.
    struct Team {
        void (*work)(void*);
        void* data;
        std::atomic<bool> out_of_memory{false};
        static void member(void* team) {
            Team& t = *static_cast<Team*>(team);
            try {
                t.work(t.data);
            } catch (const std::bad_alloc&) {
                t.out_of_memory = true;
            }
        }
    } team{work, data};
    pool().parallel(&Team::member, &team, unsigned(threads), 0);
    if (team.out_of_memory) out_of_memory();
}

void out_of_memory() {
    throw std::bad_alloc();
}

}  // namespace tt
