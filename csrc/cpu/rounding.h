// Storing SIMD vectors in an element type, and what rounding to it leaves of them, per instruction set (see isa.h).
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

inline HalfShorts narrowed(WordVector wide) {  // words below 2^16; GCC 12 makes a dozen instructions of the conversion
#if defined(__AVX2__) && TT_VECTOR_BYTES == 32
    const __m256i both = (__m256i)wide;
    return (HalfShorts)_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#else
    return __builtin_convertvector(wide, HalfShorts);
#endif
}

// rounded(x): x as a stored X would be read again. store(to, x): writes a vector.
template <class X>
struct Rounding {  // float and double
    static Vector<X> rounded(Vector<X> x) { return x; }
    static void store(X* to, Vector<X> x) { std::memcpy(to, &x, sizeof(x)); }
};

template <>
struct Rounding<bf16> {  // to nearest, ties to even; NaN stays NaN
    static WordVector nearest(FloatVector x) {
        const WordVector bits = (WordVector)x;
        return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    }
    static FloatVector rounded(FloatVector x) { return (FloatVector)(nearest(x) & 0xffff0000u); }
    static void store(bf16* to, FloatVector x) {
        const HalfShorts narrow = narrowed(nearest(x) >> 16);
        std::memcpy(to, &narrow, sizeof(narrow));
    }
};

template <>
struct Rounding<fp16> {
    static HalfShorts nearest(FloatVector x) {
#if TT_VECTOR_BYTES == 64 && defined(__AVX512F__)
        return (HalfShorts)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif TT_VECTOR_BYTES == 32
        return (HalfShorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__) && TT_VECTOR_BYTES == 16
        return (HalfShorts)vcvt_f16_f32((float32x4_t)x);
#else  // as Narrow<fp16>
        const WordVector bits = (WordVector)x, magnitude = bits & 0x7fffffffu;
        const WordVector subnormal = (WordVector)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
        WordVector half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        half = magnitude < 0x38800000u ? subnormal : half;
        half = magnitude >= 0x477ff000u ? WordVector{} + 0x7c00u : half;
        half = magnitude > 0x7f800000u ? WordVector{} + 0x7e00u : half;
        return narrowed(((bits >> 16) & 0x8000u) | half);
#endif
    }
    static FloatVector rounded(FloatVector x) {
        const HalfShorts narrow = nearest(x);
        fp16 stored[lanes_of<float>];
        std::memcpy(stored, &narrow, sizeof(narrow));
        return Load<float, fp16>::from(stored);
    }
    static void store(fp16* to, FloatVector x) {
        const HalfShorts narrow = nearest(x);
        std::memcpy(to, &narrow, sizeof(narrow));
    }
};

// The same rounding, also where the vector is wider than Y's own arithmetic.
template <class Y>
inline FloatVector rounded_to(FloatVector x) {
    return Rounding<Y>::rounded(x);
}
template <class Y>
inline DoubleVector rounded_to(DoubleVector x) {
    for (int i = 0; i < lanes_of<double>; ++i) x[i] = double(rounded<Y>(Wide<Y>(x[i])));
    return x;
}

// A vector's worth of elements: all of them, or the first few.
template <class W>
struct Whole {
    constexpr operator int64_t() const { return lanes_of<W>; }
};

template <class W, class T>
inline Vector<W> load_some(const T* from, Whole<W>) {
    return Load<W, T>::from(from);
}
template <class W, class T>
inline Vector<W> load_some(const T* from, int64_t n) {  // zeros behind them
    T all[lanes_of<W>] = {};
    for (int64_t i = 0; i < n; ++i) all[i] = from[i];
    return Load<W, T>::from(all);
}
template <class X>
inline void store_some(X* to, Vector<Wide<X>> x, Whole<Wide<X>>) {
    Rounding<X>::store(to, x);
}
template <class X>
inline void store_some(X* to, Vector<Wide<X>> x, int64_t n) {
    X all[lanes_of<Wide<X>>];
    Rounding<X>::store(all, x);
    for (int64_t i = 0; i < n; ++i) to[i] = all[i];
}

// f(i, n) for the vectors of W that cover [0, size): n elements from i on, and n is Whole<W> for all but the last.
template <class W, class F>
inline void for_vectors(int64_t size, F f) {
    int64_t i = 0;
    for (; i + lanes_of<W> <= size; i += lanes_of<W>) f(i, Whole<W>());
    if (i < size) f(i, size - i);
}

// The sum of a vector's elements, in double.
template <class V>
inline double sum_of(V v) {
    double sum = 0;
    for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) sum += double(v[i]);
    return sum;
}

}  // namespace TT_ISA
}  // namespace tt
