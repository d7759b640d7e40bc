// SIMD vectors of the widest kind the instruction set has (see isa.h), by the compiler's vector types: arithmetic is
// written with operators, and no intrinsic ties it to a processor, save where GCC 12 finds no instruction for a
// conversion. (GCC's loop vectoriser does not keep an array of sums in registers by itself.)
#pragma once

#include "numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tt {
namespace TT_ISA {

#if defined(__AVX512F__) || defined(TT_EMULATE)
#define TT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TT_VECTOR_BYTES 32
#else
#define TT_VECTOR_BYTES 16
#endif
#if TT_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

typedef float FloatVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef double DoubleVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef int32_t IntVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef uint32_t WordVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef uint64_t LongVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef float HalfFloats __attribute__((vector_size(TT_VECTOR_BYTES / 2), may_alias));
typedef uint32_t HalfWords __attribute__((vector_size(TT_VECTOR_BYTES / 2), may_alias));
typedef uint16_t HalfShorts __attribute__((vector_size(TT_VECTOR_BYTES / 2), may_alias));

template <class W>
struct VectorOf {
    using type = FloatVector;
};
template <>
struct VectorOf<double> {
    using type = DoubleVector;
};
template <class W>
using Vector = typename VectorOf<W>::type;
template <class W>
constexpr int lanes_of = TT_VECTOR_BYTES / int(sizeof(W));

template <class V>
inline V unaligned(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

// The larger in each lane; b where one is NaN.
template <class V>
inline V larger_of(V a, V b) {
    return a > b ? a : b;
}

// Elements widened, 16-bit words to 32 bits and float to double. With AVX2, GCC 12 makes one instruction of the loop
// and up to six of the conversion.
inline WordVector widened(HalfShorts narrow) {
#if defined(__AVX2__)
    WordVector wide{};
    for (int i = 0; i < TT_VECTOR_BYTES / 4; ++i) wide[i] = narrow[i];
    return wide;
#else
    return __builtin_convertvector(narrow, WordVector);
#endif
}
inline DoubleVector widened(HalfFloats narrow) {
#if defined(__AVX2__)
    DoubleVector wide{};
    for (int i = 0; i < TT_VECTOR_BYTES / 8; ++i) wide[i] = narrow[i];
    return wide;
#elif defined(__aarch64__) && TT_VECTOR_BYTES == 16
    return (DoubleVector)vcvt_f64_f32((float32x2_t)narrow);
#else
    return __builtin_convertvector(narrow, DoubleVector);
#endif
}

// One vector of W from memory that holds T.
template <class W, class T>
struct Load {
    static Vector<W> from(const T* p) {  // a double of float16: only a router's weights could be read so
        Vector<W> v{};
        for (int i = 0; i < lanes_of<W>; ++i) v[i] = W(widen(p[i]));
        return v;
    }
};
template <class W>
struct Load<W, W> {
    static Vector<W> from(const W* p) { return unaligned<Vector<W>>(p); }
};
template <>
struct Load<double, float> {
    static DoubleVector from(const float* p) { return widened(unaligned<HalfFloats>(p)); }
};
template <>
struct Load<double, bf16> {
    static DoubleVector from(const bf16* p) {
        HalfWords wide;
        for (int i = 0; i < lanes_of<double>; ++i) wide[i] = uint32_t(p[i].bits) << 16;
        return widened(HalfFloats(wide));
    }
};
template <>
struct Load<float, bf16> {
    static FloatVector from(const bf16* p) { return FloatVector(widened(unaligned<HalfShorts>(p)) << 16); }
};
template <>
struct Load<float, fp16> {
    static FloatVector from(const fp16* p) {
#if TT_VECTOR_BYTES == 64 && defined(__AVX512F__)
        return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)unaligned<HalfShorts>(p));
#elif TT_VECTOR_BYTES == 32
        return (FloatVector)_mm256_cvtph_ps((__m128i)unaligned<HalfShorts>(p));
#elif defined(__aarch64__) && TT_VECTOR_BYTES == 16
        return (FloatVector)vcvt_f32_f16((float16x4_t)unaligned<HalfShorts>(p));
#else
        const WordVector bits = widened(unaligned<HalfShorts>(p));
        const FloatVector scaled = FloatVector((bits & 0x7fff) << 13) * 0x1p112f;  // subnormal too
        const WordVector special =
            WordVector(IntVector(scaled >= FloatVector{} + 0x1p16f)) & 0x7f800000;  // infinity, NaN
        return FloatVector(WordVector(scaled) | special | ((bits & 0x8000) << 16));
#endif
    }
};

}  // namespace TT_ISA
}  // namespace tt
