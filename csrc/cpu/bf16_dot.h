// The bfloat16 dot-product instructions of AVX512-BF16 and of Arm's BF16 behind one function. Kernels that use it stand
// under `#if defined(TT_BF16_DOT)`, beside a path for processors without it.
//
// Arm's bfdot adds the two products first, then the sum to the addend. Products are exact, each addition is rounded to
// odd (what is inexact gets the neighbour whose last bit is 1: up to a unit in the last place off, to either side
// alike), and subnormal inputs and results are zeros (Arm Architecture Reference Manual, DDI 0487, BFDOT and
// shared/functions/float/bfloat, BFDotAdd: with FPCR.EBF 0, as processes have it on Linux and macOS).
//
// The emulation computes the same numbers with any vector unit, so that such kernels also run, slowly, where the tests
// are (setup.py, TT_EMULATE): the instruction adds the odd product first, fuses each multiplication with its addition,
// and takes subnormal inputs and results for zeros.
#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define TT_BF16_DOT
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define TT_BF16_DOT
#elif defined(TT_EMULATE)
#include "flushed_fma.h"
#define TT_BF16_DOT
#endif

#if defined(TT_BF16_DOT)
namespace tt {
namespace TT_ISA {

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
static_assert(TT_VECTOR_BYTES == 16, "the instruction has 4 sums");
#else
static_assert(TT_VECTOR_BYTES == 64, "the instruction has 16 sums");
#endif

// sum[i] + a[2i+1] b[2i+1] + a[2i] b[2i], with two bfloat16 numbers in each 32-bit word of a and b, the even one low.
#if !defined(__AVX512BF16__) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
[[gnu::noinline]]  // it is large, and used in loops that are unrolled
#endif
inline FloatVector bf16_dot(FloatVector sum, WordVector a, WordVector b) {
#if defined(__AVX512BF16__)
    return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (FloatVector)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    return flushed_fma(a << 16, b << 16, flushed_fma(a & 0xffff0000u, b & 0xffff0000u, flushed(sum)));
#endif
}

// A word that is multiplied with all of a vector: Arm's instruction takes it from one place of a register.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef uint32x2_t RepeatedWord;
inline RepeatedWord repeated(uint32_t x) {
    return RepeatedWord{x, 0};
}
inline FloatVector bf16_dot(FloatVector sum, WordVector a, RepeatedWord b) {
    return (FloatVector)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x4_t)b, 0);
}
inline FloatVector bf16_dot(FloatVector sum, RepeatedWord a, WordVector b) {
    return bf16_dot(sum, b, a);
}
#else
typedef WordVector RepeatedWord;
inline RepeatedWord repeated(uint32_t x) {
    return x - WordVector{};
}
#endif

}  // namespace TT_ISA
}  // namespace tt
#endif
