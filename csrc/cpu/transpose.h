// Transposition of matrices by SIMD vectors, per instruction set (see isa.h).
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

// Elements of two vectors in turn: the first halves, then the second halves.
template <class V>
inline void interleave(V& a, V& b) {
    constexpr int n = int(sizeof(V) / sizeof(a[0]));
    const V x = a, y = b;
#if defined(__clang__)
    for (int i = 0; i < n; ++i) {
        a[i] = i % 2 ? y[i / 2] : x[i / 2];
        b[i] = i % 2 ? y[(n + i) / 2] : x[(n + i) / 2];
    }
#else
    decltype(a < b) low, high;
    for (int i = 0; i < n; ++i) {
        low[i] = i / 2 + i % 2 * n;
        high[i] = (n + i) / 2 + i % 2 * n;
    }
    a = __builtin_shuffle(x, y, low);
    b = __builtin_shuffle(x, y, high);
#endif
}

// A square of numbers, rows to columns.
template <class V, int n>
inline void transpose(V (&rows)[n]) {
#pragma GCC unroll 4
    for (int stage = 1; stage < n; stage *= 2) {
        V next[n];
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = rows[i];
            next[2 * i + 1] = rows[i + n / 2];
            interleave(next[2 * i], next[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) rows[i] = next[i];
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
