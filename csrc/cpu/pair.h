// Pairs of SIMD vectors, per instruction set (see isa.h). Addresses must be aligned to a vector.
#pragma once

#include "exponential.h"

namespace tt {
namespace TT_ISA {

// Two vectors, the unit of work here: enough independent sums to hide a multiply-add's latency.
template <class W>
struct Pair {
    using Vector = tt::TT_ISA::Vector<W>;
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

template <class W>
inline Pair<W> exp_negative(const Pair<W>& a) {
    return {exp_negative(a.x), exp_negative(a.y)};
}

}  // namespace TT_ISA
}  // namespace tt
