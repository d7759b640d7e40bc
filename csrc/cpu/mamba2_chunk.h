// The small matrix products of a chunk of tokens, with tokens as vector lanes, per instruction set (see isa.h).
#pragma once

#include "exponential.h"
#include "rounding.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

template <int N>
struct Number {
    static constexpr int value = N;
};

// How many rows are summed at once when each takes `Vectors` registers: as many as leave room for the operands, since
// every row spares a load of the other factor, and eight sums hide the latency of a multiply-add.
constexpr int rows_at_once(int vectors) {
    return vector_registers == 32 ? (vectors == 1   ? 16
                                     : vectors == 2 ? 12
                                     : vectors == 4 ? 6
                                                    : 2)
                                  : (vectors == 1   ? 8
                                     : vectors == 2 ? 6
                                     : vectors == 4 ? 2
                                                    : 1);
}

// What a chunk's tokens read of a state: C [n][lanes], and how much of the state is left at each token [lanes].
template <class W>
struct FromState {
    const W* c;
    const W* left;
    int64_t n;
};
// What they read of each other: inputs x [tokens][stride], and how much of x_u is in y_t, [tokens u][lanes t].
template <class W>
struct FromTokens {
    const W* x;
    int64_t stride, tokens;
    const W* mixing;
    bool finite;  // whether all of x is
};

// Finite: whether all of x is, else zero times infinity must not reach an earlier token.
// out[q][t] = left[t] * (sum over k of rows[q][k] c[k][t]) + sum over u of mixing[u][t] x[u][q], for tokens t.
template <int Rows, int Vectors, bool Finite, class W>
void read_rows(W* out, const W* rows, int64_t stride, const FromState<W>& state, const FromTokens<W>& tokens) {
    using V = Vector<W>;
    constexpr int lanes = lanes_of<W>, width = Vectors * lanes, line = 64 / int(sizeof(W));
    V sums[Rows][Vectors];
    for (auto& row : sums)
        for (V& sum : row) sum = V{};
    auto add = [&sums](const V(&column)[Vectors], W factor, int q) {
        for (int v = 0; v < Vectors; ++v) sums[q][v] += factor * column[v];
    };
    const W* c = state.c;
    for (int64_t begin = 0; begin < state.n; begin += line) {
        const int64_t end = smaller(begin + line, state.n);
        // The rows of the next call. A state is read once, and from afar.
        for (int q = 0; q < Rows; ++q) __builtin_prefetch(rows + (q + Rows) * stride + begin);
        for (int64_t k = begin; k < end; ++k, c += width) {
            V column[Vectors];
            for (int v = 0; v < Vectors; ++v) column[v] = unaligned<V>(c + v * lanes);
            for (int q = 0; q < Rows; ++q) add(column, rows[q * stride + k], q);
        }
    }
    for (int v = 0; v < Vectors; ++v) {
        const V left = unaligned<V>(state.left + v * lanes);
        for (int q = 0; q < Rows; ++q) sums[q][v] *= left;
    }
    for (int64_t u = 0; u < tokens.tokens; ++u) {
        const W* x = tokens.x + u * tokens.stride;
        V column[Vectors];
        for (int v = 0; v < Vectors; ++v) column[v] = unaligned<V>(tokens.mixing + u * width + v * lanes);
        for (int q = 0; q < Rows; ++q) {
            if (Finite)
                add(column, x[q], q);
            else
                for (int t = int(u); t < width; ++t)
                    sums[q][t / lanes][t % lanes] += x[q] * column[t / lanes][t % lanes];
        }
    }
    for (int q = 0; q < Rows; ++q)
        for (int v = 0; v < Vectors; ++v) std::memcpy(out + q * width + v * lanes, &sums[q][v], sizeof(V));
}

template <int Vectors, bool Finite, class W>
void read_all(W* out, const W* rows, int64_t stride, int64_t count, const FromState<W>& state, FromTokens<W> tokens) {
    constexpr int most = rows_at_once(Vectors), width = Vectors * lanes_of<W>;
    int64_t r = 0;
    auto next = [&](auto how_many) {
        constexpr int these = decltype(how_many)::value;
        for (; r + these <= count; r += these, tokens.x += these)
            read_rows<these, Vectors, Finite>(out + r * width, rows + r * stride, stride, state, tokens);
    };
    next(Number<most>());
    if (most > 4) next(Number<4>());
    next(Number<1>());
}

template <bool Finite, class W>
void read_with(W* out, const W* rows, int64_t stride, int64_t count, const FromState<W>& state,
               const FromTokens<W>& tokens, int64_t width) {
    switch (width / lanes_of<W>) {
        case 1: return read_all<1, Finite>(out, rows, stride, count, state, tokens);
        case 2: return read_all<2, Finite>(out, rows, stride, count, state, tokens);
        case 4: return read_all<4, Finite>(out, rows, stride, count, state, tokens);
        default: return read_all<8, Finite>(out, rows, stride, count, state, tokens);
    }
}

// The same for all rows and `width` token lanes (see token_lanes).
template <class W>
void read_state(W* out, const W* rows, int64_t stride, int64_t count, const FromState<W>& state,
                const FromTokens<W>& tokens, int64_t width) {
    if (tokens.finite) return read_with<true>(out, rows, stride, count, state, tokens, width);
    read_with<false>(out, rows, stride, count, state, tokens, width);
}

// Lanes that hold so many tokens: a power of two of vectors.
template <class W>
int64_t token_lanes(int64_t tokens) {
    int64_t lanes = lanes_of<W>;
    while (lanes < tokens) lanes *= 2;
    return lanes;
}

// to[q] = decay * from[q] + sum over t of x[t][q] * b[t], rows of length n; `to` may be `from`. The sum comes first: a
// large state rounds it once.
template <int Rows, class W>
void advance_rows(W* to, const W* from, int64_t stride, int64_t n, W decay, const W* x, int64_t x_stride, const W* b,
                  int64_t b_stride, int64_t tokens) {
    using V = Vector<W>;
    constexpr int lanes = lanes_of<W>;
    auto columns = [=](int64_t i, auto how_many, auto size) {
        constexpr int count = decltype(how_many)::value;
        V sums[Rows][count];
        for (auto& row : sums)
            for (V& sum : row) sum = V{};
        for (int64_t t = 0; t < tokens; ++t) {
            V row[count];
            for (int v = 0; v < count; ++v) row[v] = unaligned<V>(b + t * b_stride + i + v * lanes);
            for (int q = 0; q < Rows; ++q) {
                const W factor = x[t * x_stride + q];
                for (int v = 0; v < count; ++v) sums[q][v] += factor * row[v];
            }
        }
        for (int q = 0; q < Rows; ++q)
            for (int v = 0; v < count; ++v) {
                const V before = load_some<W>(from + q * stride + i + v * lanes, size);
                store_some(to + q * n + i + v * lanes, decay * before + sums[q][v], size);
            }
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) columns(i, Number<2>(), Whole<W>());
    for (; i + lanes <= n; i += lanes) columns(i, Number<1>(), Whole<W>());
    if (i < n) columns(i, Number<1>(), n - i);
}

template <class W>
void advance_state(W* to, const W* from, int64_t stride, int64_t rows, int64_t n, W decay, const W* x, int64_t x_stride,
                   const W* b, int64_t b_stride, int64_t tokens) {
    int64_t r = 0;
    auto next = [&](auto how_many) {
        constexpr int these = decltype(how_many)::value;
        for (; r + these <= rows; r += these)
            advance_rows<these>(to + r * n, from + r * stride, stride, n, decay, x + r, x_stride, b, b_stride, tokens);
    };
    next(Number<rows_at_once(2)>());
    next(Number<4>());
    next(Number<1>());
}

}  // namespace TT_ISA
}  // namespace tt
