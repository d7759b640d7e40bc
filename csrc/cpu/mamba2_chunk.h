// The small matrix products of a chunk of tokens, with tokens as vector lanes, per instruction set (see isa.h).
#pragma once

#include "exponential.h"
#include "rounding.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Rows of a register tile whose rows take so many vector registers each: as many as leave room for the operands, since
// every row spares a load of the other factor, and eight sums hide the latency of a multiply-add.
constexpr int tile_rows_for(int vectors) {
    return vector_registers == 32 ? (vectors == 1   ? 16
                                     : vectors == 2 ? 12
                                     : vectors == 4 ? 6
                                                    : 2)
                                  : (vectors == 1   ? 8
                                     : vectors == 2 ? 6
                                     : vectors == 4 ? 2
                                                    : 1);
}

// What a chunk's tokens read of the state before it: C [n][lanes], and the state's decay up to each token [lanes].
template <class W>
struct StateTerm {
    const W* c;
    const W* decay;
    int64_t n;
};
// What they read of each other: inputs x [tokens][x_stride], and the weight of x_u in y_t, mixing [tokens u][lanes t].
template <class W>
struct TokenTerm {
    const W* x;
    int64_t x_stride, tokens;
    const W* mixing;
    bool x_is_finite;  // all of x
};

// y[q][t] = decay[t] * (sum over k of state[q][k] c[k][t]) + sum over u of mixing[u][t] x[u][q], for tokens t and the
// rows q of one register tile. Finite: whether all of x is, else zero times infinity must not reach an earlier token.
template <int Rows, int Vectors, bool Finite, class W>
void read_tile(W* y, const W* state, int64_t stride, const StateTerm<W>& from_state, const TokenTerm<W>& from_tokens) {
    using V = Vector<W>;
    constexpr int lanes = lanes_of<W>, width = Vectors * lanes, cache_line = 64 / int(sizeof(W));
    V acc[Rows][Vectors];
    for (auto& row : acc)
        for (V& sum : row) sum = V{};
    auto multiply_add = [&acc](const V(&of_tokens)[Vectors], W factor, int q) {
        for (int v = 0; v < Vectors; ++v) acc[q][v] += factor * of_tokens[v];
    };
    const W* c = from_state.c;
    for (int64_t begin = 0; begin < from_state.n; begin += cache_line) {
        const int64_t end = smaller(begin + cache_line, from_state.n);
        // The rows of the next tile. A state is read once, and from afar.
        for (int q = 0; q < Rows; ++q) __builtin_prefetch(state + (q + Rows) * stride + begin);
        for (int64_t k = begin; k < end; ++k, c += width) {
            V c_k[Vectors];
            for (int v = 0; v < Vectors; ++v) c_k[v] = unaligned<V>(c + v * lanes);
            for (int q = 0; q < Rows; ++q) multiply_add(c_k, state[q * stride + k], q);
        }
    }
    for (int v = 0; v < Vectors; ++v) {
        const V decay = unaligned<V>(from_state.decay + v * lanes);
        for (int q = 0; q < Rows; ++q) acc[q][v] *= decay;
    }
    for (int64_t u = 0; u < from_tokens.tokens; ++u) {
        const W* x_u = from_tokens.x + u * from_tokens.x_stride;
        V mixing_u[Vectors];
        for (int v = 0; v < Vectors; ++v) mixing_u[v] = unaligned<V>(from_tokens.mixing + u * width + v * lanes);
        for (int q = 0; q < Rows; ++q) {
            if (Finite)
                multiply_add(mixing_u, x_u[q], q);
            else
                for (int t = int(u); t < width; ++t)
                    acc[q][t / lanes][t % lanes] += x_u[q] * mixing_u[t / lanes][t % lanes];
        }
    }
    for (int q = 0; q < Rows; ++q)
        for (int v = 0; v < Vectors; ++v) std::memcpy(y + q * width + v * lanes, &acc[q][v], sizeof(V));
}

template <int Vectors, bool Finite, class W>
void read_tiles(W* y, const W* state, int64_t stride, int64_t rows, const StateTerm<W>& from_state,
                TokenTerm<W> from_tokens) {
    constexpr int max_rows = tile_rows_for(Vectors), width = Vectors * lanes_of<W>;
    int64_t row = 0;
    auto whole_tiles = [&](auto tile) {
        constexpr int tile_rows = decltype(tile)::value;
        for (; row + tile_rows <= rows; row += tile_rows, from_tokens.x += tile_rows)
            read_tile<tile_rows, Vectors, Finite>(y + row * width, state + row * stride, stride, from_state,
                                                  from_tokens);
    };
    whole_tiles(Constant<max_rows>());
    if (max_rows > 4) whole_tiles(Constant<4>());
    whole_tiles(Constant<1>());
}

template <bool Finite, class W>
void read_lanes(W* y, const W* state, int64_t stride, int64_t rows, const StateTerm<W>& from_state,
                const TokenTerm<W>& from_tokens, int64_t width) {
    switch (width / lanes_of<W>) {
        case 1: return read_tiles<1, Finite>(y, state, stride, rows, from_state, from_tokens);
        case 2: return read_tiles<2, Finite>(y, state, stride, rows, from_state, from_tokens);
        case 4: return read_tiles<4, Finite>(y, state, stride, rows, from_state, from_tokens);
        default: return read_tiles<8, Finite>(y, state, stride, rows, from_state, from_tokens);
    }
}

// The same for all rows of a state [rows, n] and `width` token lanes (see token_lanes): y [rows][width].
template <class W>
void read_state(W* y, const W* state, int64_t stride, int64_t rows, const StateTerm<W>& from_state,
                const TokenTerm<W>& from_tokens, int64_t width) {
    if (from_tokens.x_is_finite) return read_lanes<true>(y, state, stride, rows, from_state, from_tokens, width);
    read_lanes<false>(y, state, stride, rows, from_state, from_tokens, width);
}

// Lanes that hold so many tokens: a power of two of vectors.
template <class W>
int64_t token_lanes(int64_t tokens) {
    int64_t lanes = lanes_of<W>;
    while (lanes < tokens) lanes *= 2;
    return lanes;
}

// next[q] = decay * state[q] + sum over t of x[t][q] * b[t], rows of length n; `next` may be `state`. x: times step and
// decay. The sum comes first: a large state rounds it once.
template <int Rows, class W>
void advance_tile(W* next, const W* state, int64_t stride, int64_t n, W decay, const W* x, int64_t x_stride, const W* b,
                  int64_t b_stride, int64_t tokens) {
    using V = Vector<W>;
    constexpr int lanes = lanes_of<W>;
    auto advance_columns = [=](int64_t i, auto vectors, auto size) {
        constexpr int count = decltype(vectors)::value;
        V acc[Rows][count];
        for (auto& row : acc)
            for (V& sum : row) sum = V{};
        for (int64_t t = 0; t < tokens; ++t) {
            V b_t[count];
            for (int v = 0; v < count; ++v) b_t[v] = unaligned<V>(b + t * b_stride + i + v * lanes);
            for (int q = 0; q < Rows; ++q) {
                const W x_tq = x[t * x_stride + q];
                for (int v = 0; v < count; ++v) acc[q][v] += x_tq * b_t[v];
            }
        }
        for (int q = 0; q < Rows; ++q)
            for (int v = 0; v < count; ++v) {
                const V before = load_some<W>(state + q * stride + i + v * lanes, size);
                store_some(next + q * n + i + v * lanes, decay * before + acc[q][v], size);
            }
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) advance_columns(i, Constant<2>(), Whole<W>());
    for (; i + lanes <= n; i += lanes) advance_columns(i, Constant<1>(), Whole<W>());
    if (i < n) advance_columns(i, Constant<1>(), n - i);
}

// The same for all rows of a state.
template <class W>
void advance_state(W* next, const W* state, int64_t stride, int64_t rows, int64_t n, W decay, const W* x,
                   int64_t x_stride, const W* b, int64_t b_stride, int64_t tokens) {
    int64_t row = 0;
    auto whole_tiles = [&](auto tile) {
        constexpr int tile_rows = decltype(tile)::value;
        for (; row + tile_rows <= rows; row += tile_rows)
            advance_tile<tile_rows>(next + row * n, state + row * stride, stride, n, decay, x + row, x_stride, b,
                                    b_stride, tokens);
    };
    whole_tiles(Constant<tile_rows_for(2)>());
    whole_tiles(Constant<4>());
    whole_tiles(Constant<1>());
}

}  // namespace TT_ISA
}  // namespace tt
