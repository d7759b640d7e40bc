// Stands in for CUDA's built-ins when g++ compiles csrc/cuda/*.cu: exactly those that the kernels use. Included before
// the kernel's source; executor.cpp is behind it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace simt {

struct Index {
    unsigned x, y, z;
};

// Set by the executor whenever a thread goes on.
extern Index thread_index, block_index, block_size, grid_size;

void* shared_memory();
void block_barrier(int line);
void warp_barrier(unsigned mask, int line);
// What every lane of the warp brought to the same line, once all have: 32 values of 8 bytes.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);
// Before an atomic operation, for the detector of races.
void atomic_access(const void* address, int size);
void trap(int line);
int lane();

template <class T>
uint64_t packed(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T unpacked(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int step, int line) {
    return unpacked<T>(exchange(mask, packed(value), line)[lane() ^ step]);
}
template <class T>
T shuffle_up(unsigned mask, T value, int step, int line) {
    const uint64_t* all = exchange(mask, packed(value), line);
    return lane() >= step ? unpacked<T>(all[lane() - step]) : value;
}
template <class F>
unsigned lanes_where(const uint64_t* all, F is) {
    unsigned found = 0;
    for (int i = 0; i < 32; ++i) found |= unsigned(is(all[i])) << i;
    return found;
}
inline unsigned ballot(unsigned mask, bool yes, int line) {
    return lanes_where(exchange(mask, yes, line), [](uint64_t x) { return x != 0; });
}
template <class T>
unsigned match_any(unsigned mask, T value, int line) {
    const uint64_t mine = packed(value);
    return lanes_where(exchange(mask, mine, line), [=](uint64_t x) { return x == mine; });
}
inline unsigned reduce_max(unsigned mask, unsigned value, int line) {
    const uint64_t* all = exchange(mask, value, line);
    unsigned best = 0;
    for (int i = 0; i < 32; ++i) best = all[i] > best ? unsigned(all[i]) : best;
    return best;
}
inline unsigned reduce_min(unsigned mask, unsigned value, int line) {
    return ~reduce_max(mask, ~value, line);
}

inline float larger(float a, float b) {
    return a != a || a > b ? a : b;
}

// How Python calls a kernel: pointers to its arguments, as cuLaunchKernel takes them.
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}
template <class... A>
constexpr int count(void (*)(A...)) {
    return sizeof...(A);
}

}  // namespace simt

#define __global__
#define __device__
#define __launch_bounds__(...)
#ifndef SIMT_APPROXIMATE
#define EXP2(x) std::exp2(x)
#endif
#define LARGER(a, b) simt::larger(a, b)
#define SHARED_MEMORY(name) uint64* const name = static_cast<uint64*>(simt::shared_memory())
#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

#define __syncthreads() simt::block_barrier(__LINE__)
#define __syncwarp() simt::warp_barrier(0xffffffffu, __LINE__)
#define __trap() simt::trap(__LINE__)
#define __shfl_xor_sync(mask, value, step) simt::shuffle_xor(mask, value, step, __LINE__)
#define __shfl_up_sync(mask, value, step) simt::shuffle_up(mask, value, step, __LINE__)
#define __ballot_sync(mask, yes) simt::ballot(mask, yes, __LINE__)
#define __match_any_sync(mask, value) simt::match_any(mask, value, __LINE__)
#define __reduce_max_sync(mask, value) simt::reduce_max(mask, value, __LINE__)
#define __reduce_min_sync(mask, value) simt::reduce_min(mask, value, __LINE__)

// One thread runs at a time, so plain operations are atomic; the detector of races is told of them as one.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* at, T value) {
    simt::atomic_access(at, sizeof(T));
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T sum = old + value;
    std::memcpy(at, &sum, sizeof(T));
    return old;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicOr(T* at, T value) {
    simt::atomic_access(at, sizeof(T));
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T both = old | value;
    std::memcpy(at, &both, sizeof(T));
    return old;
}

template <class T>
__attribute__((no_sanitize("thread"))) T atomicMax(T* at, T value) {
    simt::atomic_access(at, sizeof(T));
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T most = value > old ? value : old;
    std::memcpy(at, &most, sizeof(T));
    return old;
}

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline float __uint_as_float(unsigned x) {
    return simt::unpacked<float>(x);
}
inline unsigned __float_as_uint(float x) {
    return unsigned(simt::packed(x));
}
inline double __longlong_as_double(long long x) {
    return simt::unpacked<double>(uint64_t(x));
}
inline long long __double_as_longlong(double x) {
    return (long long)simt::packed(x);
}
inline double cospi(double x) {
    return std::cos(3.141592653589793 * x);
}
inline double sinpi(double x) {
    return std::sin(3.141592653589793 * x);
}
using std::exp;

#ifdef SIMT_APPROXIMATE
// Functions that CUDA does not round correctly (C++ Programming Guide, mathematical functions: 1 unit in the last place
// of expf, logf, exp, log; 2 of log1pf and ex2.approx) err by up to two here: by 1.5 before rounding, up or down by the
// operand's bits, so that the same number always has the same result. 0 and what is not finite stay as they are.
namespace simt {

inline bool drawn(uint64_t bits) {
    bits *= 0x9e3779b97f4a7c15u;
    return (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9u >> 63;
}
template <class T>
T approximated(long double exact, T operand) {
    const T nearest = T(exact);
    if (nearest == 0 || nearest - nearest != 0) return nearest;
    const long double unit = std::nextafter(std::fabs(nearest), T(INFINITY)) - std::fabs(nearest);
    return T(exact + (drawn(packed(operand)) ? 1.5L : -1.5L) * unit);
}
#define SIMT_FUNCTION(name, type, function)                                      \
    inline type name(type x) {                                                   \
        return x == 0 ? function(x) : approximated(function((long double)x), x); \
    }
SIMT_FUNCTION(near_exp, float, std::exp)
SIMT_FUNCTION(near_exp, double, std::exp)
SIMT_FUNCTION(near_log, float, std::log)
SIMT_FUNCTION(near_log, double, std::log)
SIMT_FUNCTION(near_log1p, float, std::log1p)
SIMT_FUNCTION(near_log1p, double, std::log1p)
inline float near_exp2(float x) {  // ex2.approx.ftz
    const float result = x == 0 ? 1 : approximated(std::exp2((long double)x), x);
    return std::fabs(result) < 0x1p-126f ? 0 : result;
}

}  // namespace simt

#define EXP2(x) simt::near_exp2(x)
#define expf(x) simt::near_exp(float(x))
#define logf(x) simt::near_log(float(x))
#define log1pf(x) simt::near_log1p(float(x))
#define exp(x) simt::near_exp(double(x))
#define log(x) simt::near_log(double(x))
#define log1p(x) simt::near_log1p(double(x))
#endif

// At the end of a translation unit, for each of its kernels.
#define SIMT_EXPORT(kernel)                                \
    extern "C" void simt_call_##kernel(void** arguments) { \
        simt::call(kernel, arguments);                     \
    }                                                      \
    extern "C" int simt_count_##kernel() {                 \
        return simt::count(kernel);                        \
    }
