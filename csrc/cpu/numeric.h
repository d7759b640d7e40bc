// Number types and element access, per instruction set (see isa.h). bfloat16 and float16 are storage; arithmetic is
// float (double for double), and `rounded<T>` says what a value is once stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "view.h"

// F16C converts by one instruction, and so does every 64-bit Arm. With the compiler's own type, _Float16, which g++ 12
// and clang 15 brought to x86, loops of it are vectorised.
#if defined(__F16C__) && (defined(__clang__) ? __clang_major__ >= 15 : __GNUC__ >= 12)
#define TT_FLOAT16 _Float16
#elif defined(__aarch64__)
#define TT_FLOAT16 __fp16
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace tt {
namespace TT_ISA {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float widen(float x) {
    return x;
}
inline double widen(double x) {
    return x;
}
inline float widen(bf16 x) {
    return bit_cast<float>(uint32_t(x.bits) << 16);
}
inline float widen(fp16 x) {
#if defined(TT_FLOAT16)
    return float(bit_cast<TT_FLOAT16>(x.bits));
#elif defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    float scaled = bit_cast<float>(rest) * 0x1p112f;  // also right for subnormal numbers
    if ((x.bits & 0x7c00) == 0x7c00) return bit_cast<float>(sign | 0x7f800000 | rest);  // infinity, NaN
    return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
#endif
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
    static float from(float x) { return x; }
};
template <>
struct Narrow<double> {
    static double from(double x) { return x; }
};
template <>
struct Narrow<bf16> {  // to nearest, ties to even; NaN stays NaN
    static bf16 from(float x) {
        uint32_t bits = bit_cast<uint32_t>(x);
        uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return {uint16_t(x != x ? 0x7fc0 | (bits >> 16) : nearest)};
    }
};
template <>
struct Narrow<fp16> {
    static fp16 from(float x) {
#if defined(TT_FLOAT16)
        return {bit_cast<uint16_t>(TT_FLOAT16(x))};
#elif defined(__F16C__)
        return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
        uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
        if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
        if (magnitude < 0x38800000) {                                   // subnormal: the adder rounds
            float shifted = bit_cast<float>(magnitude) + 0.5f;
            return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
        }
        return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
#endif
    }
};

template <class T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
inline T narrow(Wide<T> x) {
    return Narrow<T>::from(x);
}
template <class T>
inline Wide<T> rounded(Wide<T> x) {
    return widen(narrow<T>(x));
}

template <class T>
struct Type {
    using type = T;
};

// Calls f(Type<T>{}) with the view's floating element type: the one switch from dtype to template parameter.
template <class F>
inline void for_float(DType dtype, F f) {
    switch (dtype) {
        case DType::float64: return f(Type<double>{});
        case DType::float32: return f(Type<float>{});
        case DType::bfloat16: return f(Type<bf16>{});
        case DType::float16: return f(Type<fp16>{});
        default: return;  // the public function accepts no other
    }
}

// As for_float; float64, which is for checking gradients and not for speed, is left to the portable baseline: it would
// be a third of every object file. `baseline` calls that.
template <class F, class Baseline>
inline void for_fast(DType dtype, F f, Baseline baseline) {
#if defined(TT_FLOAT64)
    (void)baseline;
    for_float(dtype, f);
#else
    switch (dtype) {
        case DType::float64: return baseline();
        case DType::float32: return f(Type<float>{});
        case DType::bfloat16: return f(Type<bf16>{});
        case DType::float16: return f(Type<fp16>{});
        default: return;
    }
#endif
}

// Copies n elements of a view's dtype, starting `offset` elements in, to floats (or doubles).
template <class W>
inline void load(W* out, const View& view, int64_t offset, int64_t n) {
    for_float(view.dtype, [=](auto type) {
        using T = typename decltype(type)::type;
        const T* from = view.as<T>() + offset;
        for (int64_t i = 0; i < n; ++i) out[i] = W(widen(from[i]));
    });
}

// An index tensor's entry, int32 or int64.
inline int64_t index_at(const View& view, int64_t i) {
    i *= view.stride[0];
    return view.dtype == DType::int64 ? view.as<int64_t>()[i] : int64_t(view.as<int32_t>()[i]);
}

constexpr int64_t up_to(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

template <class T>
inline T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
    return a < b ? b : a;
}

}  // namespace TT_ISA
}  // namespace tt
