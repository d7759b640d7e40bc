// SIMD vectors of the widest kind the instruction set has (see isa.h), by the compiler's vector types: arithmetic is
// written with operators, and no intrinsic ties it to a processor. Addresses must be aligned to a vector.
#pragma once

#include <cmath>
#include <cstdint>

namespace tt {
namespace TT_ISA {

#if defined(__AVX512F__)
#define TT_VECTOR_BYTES 64
#elif defined(__AVX__)
#define TT_VECTOR_BYTES 32
#else
#define TT_VECTOR_BYTES 16
#endif

typedef float FloatVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef double DoubleVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef int32_t IntVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
typedef uint32_t WordVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));

template <class W>
struct VectorOf {
    using type = FloatVector;
};
template <>
struct VectorOf<double> {
    using type = DoubleVector;
};

// Two vectors, the unit of work here: enough independent sums to hide a multiply-add's latency.
template <class W>
struct Pair {
    using Vector = typename VectorOf<W>::type;
    static constexpr int64_t lanes = 2 * TT_VECTOR_BYTES / int64_t(sizeof(W));
    Vector x, y;
};

template <class W>
inline Pair<W> load_pair(const W* from) {
    using Vector = typename Pair<W>::Vector;
    const Vector* vectors = reinterpret_cast<const Vector*>(from);
    return {vectors[0], vectors[1]};
}
template <class W>
inline void store_pair(W* to, const Pair<W>& pair) {
    using Vector = typename Pair<W>::Vector;
    Vector* vectors = reinterpret_cast<Vector*>(to);
    vectors[0] = pair.x;
    vectors[1] = pair.y;
}
template <class W>
inline void fill_pair(W* to, W value) {
    for (int64_t i = 0; i < Pair<W>::lanes; ++i) to[i] = value;
}

template <class W>
inline Pair<W> operator+(const Pair<W>& a, const Pair<W>& b) {
    return {a.x + b.x, a.y + b.y};
}
template <class W>
inline Pair<W> operator-(const Pair<W>& a, const Pair<W>& b) {
    return {a.x - b.x, a.y - b.y};
}
template <class W>
inline Pair<W> operator*(const Pair<W>& a, const Pair<W>& b) {
    return {a.x * b.x, a.y * b.y};
}
template <class W>
inline Pair<W> operator/(const Pair<W>& a, const Pair<W>& b) {
    return {a.x / b.x, a.y / b.y};
}
template <class W>
inline Pair<W> operator*(W a, const Pair<W>& b) {
    return {a * b.x, a * b.y};
}
template <class W>
inline Pair<W> larger(const Pair<W>& a, const Pair<W>& b) {
    return {a.x > b.x ? a.x : b.x, a.y > b.y ? a.y : b.y};
}
template <class W>
inline Pair<W> replaced(const Pair<W>& a, W value, W by) {  // a, with `by` where it is `value`
    typename Pair<W>::Vector zero{};
    return {a.x == value + zero ? by + zero : a.x, a.y == value + zero ? by + zero : a.y};
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.3, where the result would be subnormal. x is split into
// n log 2 + r, |r| <= log(2)/2, where seven terms of the power series suffice; 2^n is put together from its exponent.
inline FloatVector exp_negative(FloatVector x) {
    constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
    FloatVector shifted = x * 1.44269504f + round;
    FloatVector n = shifted - round;
    FloatVector r = x - n * 0x1.62ep-1f;  // log 2 in two parts, the first short, so that n times it is exact
    r = r - n * float(0.693147180559945309 - 0x1.62ep-1);
    FloatVector series = r * (1.f / 5040) + 1.f / 720;
    series = series * r + 1.f / 120;
    series = series * r + 1.f / 24;
    series = series * r + 1.f / 6;
    series = series * r + 0.5f;
    series = series * (r * r) + r + 1.f;
    WordVector power = ((WordVector)shifted << 23) + 0x3f800000u;  // wraps where the result is 0 anyway
    FloatVector zero{};
    return x < zero - 87.3f ? zero : series * (FloatVector)power;
}
inline DoubleVector exp_negative(DoubleVector x) {
    for (int i = 0; i < int(sizeof(x) / sizeof(double)); ++i) x[i] = std::exp(x[i]);
    return x;
}
template <class W>
inline Pair<W> exp_negative(const Pair<W>& a) {
    return {exp_negative(a.x), exp_negative(a.y)};
}

}  // namespace TT_ISA
}  // namespace tt
