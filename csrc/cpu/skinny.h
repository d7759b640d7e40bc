// Products of stored matrices with a few rows of activations, per instruction set (see isa.h).
//
//     out[m][r] = sum over i < n of w[r][i] * x[m][i]         r < 16 rows of w, any number of rows m of x
//
// With few rows of x this is bound by the memory that w lies in, so w is read once, as it is stored, and widened in
// registers; all rows of x are multiplied while the 16 rows of w are in the second-level cache. Vectors run along i,
// since both factors are contiguous in it; a block of R rows of w and M rows of x is held in registers.
//
// A product is summed in vector lanes over stretches of 512, these are added up, and the lanes last. That order does
// not depend on R, M or the number of rows, so a row's result is bit for bit the same alone as in a batch; and short
// stretches err less than one long sum.
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

constexpr int skinny_rows = 16;       // rows of w per call
constexpr int64_t skinny_pad = 16;    // x's rows are readable, and zero, up to a multiple of this
constexpr int64_t skinny_part = 512;  // how many products are summed in one go

inline int64_t padded(int64_t n) {
    return (n + skinny_pad - 1) / skinny_pad * skinny_pad;
}

// Adds the products of R rows of w and M rows of x over [begin, end), less than a stretch, to total[r][m].
template <int R, int M, class W, class T>
inline void add_stretch(const T* w, int64_t w_stride, const W* x, int64_t x_stride, int64_t begin, int64_t end,
                        Vector<W> (*total)[M]) {
    constexpr int L = lanes_of<W>;
    Vector<W> sums[R][M] = {};
    int64_t i = begin;
    for (; i + L <= end; i += L) {
        Vector<W> row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            row[r] = Load<W, T>::from(w + r * w_stride + i);
            // Where 16 rows take turns, the processor does not foresee the next stretch of each by itself.
            __builtin_prefetch(w + r * w_stride + i + skinny_part);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Vector<W> column = unaligned<Vector<W>>(x + m * x_stride + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r][m] += row[r] * column;
        }
    }
    if (i < end) {  // the rest of a row, filled up with zeros: what lies behind it may be anything
        for (int r = 0; r < R; ++r) {
            T rest[L] = {};
            for (int64_t j = i; j < end; ++j) rest[j - i] = w[r * w_stride + j];
            const Vector<W> row = Load<W, T>::from(rest);
            for (int m = 0; m < M; ++m) sums[r][m] += row * unaligned<Vector<W>>(x + m * x_stride + i);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[r][m] += sums[r][m];
}

template <class W>
inline W sum_of_lanes(Vector<W> v) {
    W a[lanes_of<W>];
    std::memcpy(a, &v, sizeof(a));
    for (int half = lanes_of<W> / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) a[j] += a[j + half];
    return a[0];
}

// `rows` rows of w with M rows of x.
template <int M, class W, class T>
void skinny_block(const T* w, int64_t w_stride, int rows, const W* x, int64_t x_stride, int64_t n, W* out) {
    constexpr int R = M <= 2 || vector_registers == 32 ? 4 : 2;
    Vector<W> total[skinny_rows][M];
    for (int r = 0; r < rows; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = Vector<W>{};
    // Rows of x that fit in the first-level cache: w is streamed row by row. Otherwise stretch by stretch.
    const int64_t run = M * n * int64_t(sizeof(W)) <= 24576 ? n : skinny_part;
    for (int64_t start = 0; start < n; start += run) {
        int r = 0;
        for (; r + R <= rows; r += R)
            for (int64_t i = start; i < smaller(start + run, n); i += skinny_part)
                add_stretch<R, M>(w + r * w_stride, w_stride, x, x_stride, i, smaller(i + skinny_part, n), total + r);
        for (; r < rows; ++r)
            for (int64_t i = start; i < smaller(start + run, n); i += skinny_part)
                add_stretch<1, M>(w + r * w_stride, w_stride, x, x_stride, i, smaller(i + skinny_part, n), total + r);
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < rows; ++r) out[m * skinny_rows + r] = sum_of_lanes<W>(total[r][m]);
}

// out[m * 16 + r], r < rows <= 16, for `count` rows of x, which are padded (see skinny_pad).
template <class W, class T>
inline void skinny(const T* w, int64_t w_stride, int rows, const W* x, int64_t x_stride, int64_t count, int64_t n,
                   W* out) {
    for (; count > 0; count -= 4, x += 4 * x_stride, out += 4 * skinny_rows) {
        switch (count) {
            case 1: skinny_block<1>(w, w_stride, rows, x, x_stride, n, out); break;
            case 2: skinny_block<2>(w, w_stride, rows, x, x_stride, n, out); break;
            case 3: skinny_block<3>(w, w_stride, rows, x, x_stride, n, out); break;
            default: skinny_block<4>(w, w_stride, rows, x, x_stride, n, out);
        }
    }
}

}  // namespace TT_ISA
}  // namespace tt
