// The bfloat16 dot-product instruction of AVX512-BF16 behind one function. Kernels that use it stand under
// `#if defined(TT_BF16_DOT)`, beside a path for processors without it.
//
// The emulation computes the same numbers with any vector unit, so that such kernels also run, slowly, where the tests
// are (setup.py, TT_EMULATE): the instruction adds the odd product first, fuses each multiplication with its addition,
// and takes subnormal inputs and results for zeros.
#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define TT_BF16_DOT
#elif defined(TT_EMULATE)
#include "flushed_fma.h"
#define TT_BF16_DOT
#endif

#if defined(TT_BF16_DOT)
namespace tt {
namespace TT_ISA {

static_assert(TT_VECTOR_BYTES == 64, "the instruction has 16 sums");

// sum[i] + a[2i+1] b[2i+1] + a[2i] b[2i], with two bfloat16 numbers in each 32-bit word of a and b, the even one low.
#if !defined(__AVX512BF16__)
[[gnu::noinline]]  // it is large, and used in loops that are unrolled
#endif
inline FloatVector bf16_dot(FloatVector sum, WordVector a, WordVector b) {
#if defined(__AVX512BF16__)
    return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    return flushed_fma(a << 16, b << 16, flushed_fma(a & 0xffff0000u, b & 0xffff0000u, flushed(sum)));
#endif
}

}  // namespace TT_ISA
}  // namespace tt
#endif
