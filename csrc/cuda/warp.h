// What kernels in CUDA C++ share: integer types, stored number types, an order of numbers as unsigned integers, and
// reductions of a warp.
//
// The subset of the language that kernels keep to, so that tests/simt can run them on a host: no headers but these;
// arguments are pointers, 64-bit integers and doubles; blocks are whole warps in one dimension; shared memory is
// dynamic, declared by SHARED_MEMORY; shuffles and votes are of whole warps.
#pragma once

using int64 = long long;
using uint64 = unsigned long long;

constexpr unsigned whole_warp = 0xffffffffu;
constexpr int lanes = 32;

#ifndef SHARED_MEMORY
#define SHARED_MEMORY(name) extern __shared__ __align__(16) uint64 name[]
#endif

// --- numbers --------------------------------------------------------------------------------------------------------

// The order of DTYPES in twotower_kernels/cuda/build.py.
enum : int64 { type_float64, type_float32, type_bfloat16, type_float16, type_int64, type_int32 };

__device__ inline float widen_bf16(unsigned short bits) {
    return __uint_as_float(unsigned(bits) << 16);
}

__device__ inline float widen_fp16(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    if ((bits & 0x7c00u) == 0x7c00u) return __uint_as_float(sign | 0x7f800000u | rest);  // infinity, NaN
    const float scaled = __uint_as_float(rest) * 5.192296858534828e33f;                  // 2^112; right for subnormals
    return __uint_as_float(sign | __float_as_uint(scaled));
}

// Element i of an array of floating numbers.
template <class W>
__device__ inline W number_at(const void* array, int64 type, int64 i) {
    if (type == type_float64) return W(static_cast<const double*>(array)[i]);
    if (type == type_float32) return W(static_cast<const float*>(array)[i]);
    const unsigned short bits = static_cast<const unsigned short*>(array)[i];
    return W(type == type_bfloat16 ? widen_bf16(bits) : widen_fp16(bits));
}

// Unsigned integers in the order of numbers: both zeros are equal, every NaN is the largest, and 0 is below them all.
__device__ inline unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return x != x ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64 ordered(double x) {
    const uint64 bits = uint64(__double_as_longlong(x + 0.0));
    return x != x ? ~0ull : bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}

// The number that was ordered.
__device__ inline float number(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ inline double number(uint64 key) {
    return __longlong_as_double(int64(key >> 63 ? key & 0x7fffffffffffffffull : ~key));
}

#ifndef EXP2
// 2^x within 2 units in the last place, in one instruction; 0 where the result would be subnormal.
__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#define EXP2(x) exp2_approximate(x)
#endif

#ifndef LARGER
// The larger of two; NaN if one of them is. One instruction, as fmaxf, which passes NaN over.
__device__ inline float larger_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
#define LARGER(a, b) larger_or_nan(a, b)
#endif

// --- memory ---------------------------------------------------------------------------------------------------------

// Asks for memory to be in the L2 soon, which nothing waits for. GPUs before sm_90 have no such instruction.
__device__ inline void prefetch([[maybe_unused]] const void* start, [[maybe_unused]] int64 bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const uint64 begin = reinterpret_cast<uint64>(start), first = (begin + 15) / 16 * 16;
    const int64 whole = int64((begin + bytes) / 16 * 16 - first);
    if (whole > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(unsigned(whole)));
#endif
}

// Lets a kernel behind this one begin that was launched for it (programmatic dependent launch), and that waits for the
// end of this one by itself. To any other it means nothing.
__device__ inline void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- warps ----------------------------------------------------------------------------------------------------------

__device__ inline int lane_id() {
    return int(threadIdx.x) % lanes;
}
__device__ inline int warp_id() {
    return int(threadIdx.x) / lanes;
}

__device__ inline unsigned warp_max(unsigned x) {
    return __reduce_max_sync(whole_warp, x);
}
// Two reductions in hardware are faster than five rounds of shuffles.
__device__ inline uint64 warp_max(uint64 x) {
    const unsigned high = unsigned(x >> 32), most = warp_max(high);
    return uint64(most) << 32 | warp_max(high == most ? unsigned(x) : 0u);
}

// The same bits in every lane: each round adds the same two numbers in both.
template <class W>
__device__ inline W warp_sum(W x) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
    return x;
}

// Sum over the lanes below this one.
template <class W>
__device__ inline W sum_below(W x) {
    W sum = x;
    for (int step = 1; step < lanes; step *= 2) {
        const W other = __shfl_up_sync(whole_warp, sum, step);
        if (lane_id() >= step) sum += other;
    }
    return sum - x;
}

// By one warp: offsets[i] = counts(0) + ... + counts(i - 1), in shared memory and, all 64 bits wide, outside, there for
// i = n too, unless the pointers to there are null. `counts` may read `offsets`.
template <class Count>
__device__ inline void scan(const Count& counts, int n, unsigned* offsets, int64* counts_out, int64* offsets_out) {
    const int each = (n + lanes - 1) / lanes, first = lane_id() * each;
    const int last = first + each < n ? first + each : n;
    unsigned mine = 0;
#pragma unroll 1
    for (int i = first; i < last; ++i) mine += counts(i);
    unsigned sum = sum_below(mine);
#pragma unroll 1
    for (int i = first; i < last; ++i) {
        const unsigned count = counts(i);
        offsets[i] = sum;
        if (counts_out) {
            counts_out[i] = count;
            offsets_out[i] = sum;
        }
        sum += count;
    }
    if (counts_out && lane_id() == lanes - 1) offsets_out[n] = sum;
}
