// Runs a kernel that was compiled for the host: a fibre for each thread, one block after the other in a shuffled order.
//
// A thread runs until it must wait for others; what waits is decided here, so every rule of CUDA's can be checked: a
// barrier or shuffle that only part of the block or warp reaches, or at different lines, is an error and never a
// deadlock. Shared memory is filled with ones (NaN) at a block's start.
//
// Races: with -fsanitize=thread the compiler announces every access to memory. Its runtime is not linked; the hooks at
// the end are, and they know which barriers lie between two accesses, instead of locks. Two threads that touch the same
// byte of shared memory, one of them writing, are in order if the block's barrier lies between, or in the same warp
// __syncwarp. Shuffles and votes order nothing, as CUDA has it. Atomic operations race only with plain ones. The hooks
// also stop a write to anything but shared memory, the arrays and a thread's own stack, before it does harm.
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace simt {

struct Index {
    unsigned x, y, z;
};
Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t stack_bytes = 64 * 1024;
enum class State { ready, at_block_barrier, at_warp, done };

struct Thread {
    ucontext_t context;
    State state;
    int line;        // of what it waits at
    bool barrier;    // of the warp, or an exchange
    uint64_t value;  // brought to an exchange
};

struct Warp {
    uint64_t values[32];
    unsigned barriers;  // passed
};

enum Kind { reading, writing, atomic };

// Who touched a byte of shared memory since the block's last barrier.
struct Touched {
    unsigned block_epoch = 0;
    unsigned warps[3] = {};  // by kind
};
struct TouchedByWarp {
    unsigned block_epoch = 0, barriers = 0;
    unsigned lanes[3] = {};
};

ucontext_t scheduler;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<char> stacks;
char* shared = nullptr;
int64_t shared_bytes = 0;
int current = -1;
unsigned block_epoch = 0;
std::string failure;
std::vector<Touched> touched;
std::vector<TouchedByWarp> touched_by_warp;
bool detecting = false;

void (*kernel)(void**);
void** arguments;
const int64_t* arrays;  // address and size of each
int array_count;

void fail(const char* format, ...) {
    if (!failure.empty()) return;
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    failure = text;
}

void wait() {
    swapcontext(&threads[current].context, &scheduler);
}

void fibre() {
    kernel(arguments);
    threads[current].state = State::done;
    wait();
}

// After a failure nothing goes on: the fibres are left as they are.
[[noreturn]] void stop() {
    for (;;) wait();
}

void resume(int t) {
    current = t;
    thread_index = {unsigned(t), 0, 0};
    swapcontext(&scheduler, &threads[t].context);
    current = -1;
}

// Lets those go on that everyone has come for. False if there are none.
bool release(int n) {
    bool any = false;
    for (int w = 0; w < n / 32; ++w) {
        Thread* lanes = &threads[w * 32];
        bool all = true;
        for (int i = 0; i < 32; ++i) all = all && lanes[i].state == State::at_warp;
        if (!all) continue;
        for (int i = 1; i < 32; ++i) {
            if (lanes[i].line != lanes[0].line || lanes[i].barrier != lanes[0].barrier) {
                fail("block %u, warp %d: lane 0 waits at line %d, lane %d at line %d", block_index.x, w, lanes[0].line,
                     i, lanes[i].line);
                return false;
            }
        }
        for (int i = 0; i < 32; ++i) {
            warps[w].values[i] = lanes[i].value;
            lanes[i].state = State::ready;
        }
        if (lanes[0].barrier) ++warps[w].barriers;
        any = true;
    }
    bool all = true;
    for (int t = 0; t < n; ++t) all = all && threads[t].state == State::at_block_barrier;
    if (all) {
        for (int t = 1; t < n; ++t) {
            if (threads[t].line != threads[0].line) {
                fail("block %u: thread 0 waits at line %d, thread %d at line %d", block_index.x, threads[0].line, t,
                     threads[t].line);
                return false;
            }
        }
        for (int t = 0; t < n; ++t) threads[t].state = State::ready;
        ++block_epoch;
        any = true;
    }
    return any;
}

void run_block(int n, std::mt19937& random) {
    memset(shared, 0xff, size_t(shared_bytes));
    ++block_epoch;
    std::vector<int> order(n);
    for (int t = 0; t < n; ++t) {
        order[t] = t;
        Thread& thread = threads[t];
        thread.state = State::ready;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = &stacks[t * stack_bytes];
        thread.context.uc_stack.ss_size = stack_bytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, fibre, 0);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        int done = 0;
        for (int t : order) {
            if (threads[t].state == State::ready) resume(t);
            if (!failure.empty()) return;
            done += threads[t].state == State::done;
        }
        if (done == n) return;
        if (!release(n)) {
            for (int t = 0; t < n; ++t) {
                if (threads[t].state == State::done) continue;
                const bool block = threads[t].state == State::at_block_barrier;
                fail("block %u: thread %d waits at line %d for its %s, part of which never comes", block_index.x, t,
                     threads[t].line, block ? "block" : "warp");
            }
            return;
        }
    }
}

bool inside(const char* at, const char* start, int64_t size) {
    return at >= start && at < start + size;
}

void access(const void* address, int64_t size, Kind kind) {
    if (!detecting || current < 0) return;
    const char* where = static_cast<const char*>(address);
    if (!inside(where, shared, shared_bytes)) {
        bool known = kind == reading || inside(where, stacks.data(), int64_t(stacks.size()));
        for (int i = 0; i < array_count; ++i)
            known = known || inside(where, reinterpret_cast<char*>(arrays[2 * i]), arrays[2 * i + 1]);
        if (known) return;
        fail("block %u, thread %d: a write outside of every array", block_index.x, current);
        stop();
    }
    const int64_t start = where - shared;
    const int w = current / 32, lane = current % 32;
    for (int64_t at = start; at < std::min(start + size, shared_bytes); ++at) {
        Touched& byte = touched[at];
        if (byte.block_epoch != block_epoch) byte = Touched{block_epoch, {}};
        TouchedByWarp& own = touched_by_warp[at * int64_t(warps.size()) + w];
        if (own.block_epoch != block_epoch || own.barriers != warps[w].barriers)
            own = TouchedByWarp{block_epoch, warps[w].barriers, {}};
        for (int other = reading; other <= atomic; ++other) {
            if (kind == other && kind != writing) continue;  // two readers, two atomic operations
            if (byte.warps[other] & ~(1u << w) || own.lanes[other] & ~(1u << lane)) {
                fail(
                    "race: block %u, thread %d: byte %lld of shared memory was touched by another thread, with no "
                    "barrier between",
                    block_index.x, current, (long long)at);
                stop();
            }
        }
        byte.warps[kind] |= 1u << w;
        own.lanes[kind] |= 1u << lane;
    }
}

void meet(unsigned mask, bool barrier, uint64_t value, int line) {
    if (mask != 0xffffffffu) {
        fail("line %d: expected the mask of a whole warp, got %x", line, mask);
        stop();
    }
    Thread& thread = threads[current];
    thread.line = line;
    thread.barrier = barrier;
    thread.value = value;
    thread.state = State::at_warp;
    wait();
}

}  // namespace

void* shared_memory() {
    return shared;
}
int lane() {
    return int(thread_index.x % 32);
}
void block_barrier(int line) {
    threads[current].line = line;
    threads[current].state = State::at_block_barrier;
    wait();
}
void warp_barrier(unsigned mask, int line) {
    meet(mask, true, 0, line);
}
const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
    meet(mask, false, value, line);
    return warps[current / 32].values;
}
void atomic_access(const void* address, int size) {
    access(address, size, atomic);
}
void trap(int line) {
    fail("block %u, thread %d: trap at line %d", block_index.x, current, line);
    stop();
}

}  // namespace simt

// Returns what went wrong, or null. `detect`: report races, if the kernel was compiled for it.
extern "C" const char* simt_launch(void (*call)(void**), void** arguments, int grid, int block, int64_t shared_bytes,
                                   int64_t seed, int detect, const int64_t* arrays, int array_count) {
    using namespace simt;
    failure.clear();
    simt::arrays = arrays;
    simt::array_count = array_count;
    if (block % 32 || block < 32 || block > 1024 || grid < 1 || shared_bytes < 0) {
        fail("expected 32, 64, ... 1024 threads and at least one block, got %d and %d", block, grid);
        return failure.c_str();
    }
    kernel = call;
    simt::arguments = arguments;
    threads.resize(size_t(block));
    warps.assign(size_t(block / 32), Warp{});
    stacks.resize(stack_bytes * size_t(block));
    shared = static_cast<char*>(malloc(size_t(shared_bytes)));  // of its exact size, for AddressSanitizer
    simt::shared_bytes = shared_bytes;
    detecting = detect != 0;
    if (detecting) {
        touched.assign(size_t(shared_bytes), Touched{});
        touched_by_warp.assign(size_t(shared_bytes) * size_t(block / 32), TouchedByWarp{});
    }
    block_size = {unsigned(block), 1, 1};
    grid_size = {unsigned(grid), 1, 1};
    std::mt19937 random{unsigned(seed)};
    std::vector<int> order(static_cast<size_t>(grid));
    for (int b = 0; b < grid; ++b) order[size_t(b)] = b;
    std::shuffle(order.begin(), order.end(), random);
    for (int b : order) {
        block_index = {unsigned(b), 0, 0};
        run_block(block, random);
        if (!failure.empty()) break;
    }
    free(shared);
    return failure.empty() ? nullptr : failure.c_str();
}

// What -fsanitize=thread calls.
#define HOOK(size)                                           \
    extern "C" void __tsan_read##size(void* at) {            \
        simt::access(at, size, simt::reading);               \
    }                                                        \
    extern "C" void __tsan_write##size(void* at) {           \
        simt::access(at, size, simt::writing);               \
    }                                                        \
    extern "C" void __tsan_unaligned_read##size(void* at) {  \
        simt::access(at, size, simt::reading);               \
    }                                                        \
    extern "C" void __tsan_unaligned_write##size(void* at) { \
        simt::access(at, size, simt::writing);               \
    }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
extern "C" void __tsan_read_range(void* at, size_t size) {
    simt::access(at, int64_t(size), simt::reading);
}
extern "C" void __tsan_write_range(void* at, size_t size) {
    simt::access(at, int64_t(size), simt::writing);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
