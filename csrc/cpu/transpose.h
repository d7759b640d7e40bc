// Transposition of matrices by SIMD vectors, per instruction set (see isa.h).
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

template <class V, class I>
[[gnu::always_inline]] inline V shuffled(V x, V y, I from) {  // `from` is constant
#if defined(__clang__)
    constexpr int n = int(sizeof(V) / sizeof(x[0]));
    V to;
    for (int i = 0; i < n; ++i) to[i] = from[i] < n ? x[from[i]] : y[from[i] - n];
    return to;
#else
    return __builtin_shuffle(x, y, from);
#endif
}

// Elements of two vectors in turn: the first halves, then the second halves.
template <class V>
[[gnu::always_inline]] inline void interleave(V& a, V& b) {
    constexpr int n = int(sizeof(V) / sizeof(a[0]));
    const V x = a, y = b;
    decltype(a < b) low, high;
    for (int i = 0; i < n; ++i) {
        low[i] = i / 2 + i % 2 * n;
        high[i] = (n + i) / 2 + i % 2 * n;
    }
    a = shuffled(x, y, low);
    b = shuffled(x, y, high);
}

// The sums of the elements of each of n vectors of n, in their order: rows[0][i] of rows[i].
template <class V, int n>
[[gnu::always_inline]] inline V sums_across(V (&rows)[n]) {
#pragma GCC unroll 4
    for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            interleave(rows[i], rows[i + half]);
            rows[i] += rows[i + half];
        }
    return rows[0];
}

// Within every 128 bits of two vectors, their elements in turn: those of the low halves, then of the high ones.
template <class V>
[[gnu::always_inline]] inline void interleave_in_lanes(V& a, V& b) {
    constexpr int n = int(sizeof(V) / sizeof(a[0])), lane = int(16 / sizeof(a[0]));
    const V x = a, y = b;
    decltype(a < b) low, high;
    for (int i = 0; i < n; ++i) {
        low[i] = i / lane * lane + i % lane / 2 + i % 2 * n;
        high[i] = low[i] + lane / 2;
    }
    a = shuffled(x, y, low);
    b = shuffled(x, y, high);
}
template <class V>
[[gnu::always_inline]] inline void interleave_pairs(V& a, V& b) {  // the same with pairs of elements
    LongVector x = (LongVector)a, y = (LongVector)b;
    interleave_in_lanes(x, y);
    a = (V)x, b = (V)y;
}
// The even ones of both vectors' pieces of 128 bits, then the odd ones.
template <class V>
[[gnu::always_inline]] inline void deal_lanes(V& a, V& b) {
    constexpr int n = int(sizeof(V) / sizeof(a[0])), lane = int(16 / sizeof(a[0]));
    const V x = a, y = b;
    decltype(a < b) even, odd;
    for (int i = 0; i < n; ++i) {
        even[i] = i / lane * 2 * lane + i % lane;
        odd[i] = even[i] + lane;
    }
    a = shuffled(x, y, even);
    b = shuffled(x, y, odd);
}

// A square of numbers, rows to columns, by shuffles within 128 bits first: processors do more of these at a time.
template <class V, int n>
[[gnu::always_inline]] inline void transpose(V (&rows)[n]) {
    constexpr int lane = int(16 / sizeof(rows[0][0])), lanes = n / lane;
    V columns[n];  // [c * lanes + g]: in piece j of 128 bits, column j * lane + c of the rows from g * lane on
#pragma GCC unroll 16
    for (int g = 0; g < lanes; ++g) {
        V *r = rows + g * lane, *to = columns + g;
        if constexpr (lane == 4) {
            interleave_in_lanes(r[0], r[1]);
            interleave_in_lanes(r[2], r[3]);
            interleave_pairs(r[0], r[2]);
            interleave_pairs(r[1], r[3]);
            to[0] = r[0], to[lanes] = r[2], to[2 * lanes] = r[1], to[3 * lanes] = r[3];
        } else {
            interleave_in_lanes(r[0], r[1]);
            to[0] = r[0], to[lanes] = r[1];
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < lane; ++c) {
        V *of = columns + c * lanes, *to = rows + c;
        if constexpr (lanes == 4) {
            deal_lanes(of[0], of[1]);
            deal_lanes(of[2], of[3]);
            deal_lanes(of[0], of[2]);
            deal_lanes(of[1], of[3]);
            to[0] = of[0], to[lane] = of[1], to[2 * lane] = of[2], to[3 * lane] = of[3];
        } else if constexpr (lanes == 2) {
            deal_lanes(of[0], of[1]);
            to[0] = of[0], to[lane] = of[1];
        } else {
            to[0] = of[0];
        }
    }
}

// The whole matrix; rows and columns are multiples of a vector.
template <class W>
void transpose(W* to, int64_t to_stride, const W* from, int64_t from_stride, int64_t rows, int64_t columns) {
    constexpr int lanes = lanes_of<W>;
    for (int64_t i = 0; i < rows; i += lanes)
        for (int64_t j = 0; j < columns; j += lanes) {
            Vector<W> block[lanes];
            for (int k = 0; k < lanes; ++k) block[k] = unaligned<Vector<W>>(from + (i + k) * from_stride + j);
            transpose(block);
            for (int k = 0; k < lanes; ++k) std::memcpy(to + (j + k) * to_stride + i, &block[k], sizeof(block[k]));
        }
}

}  // namespace TT_ISA
}  // namespace tt
