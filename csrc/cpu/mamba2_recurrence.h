// The recurrence of Mamba-2, token by token, per instruction set (see isa.h).
//
//     s <- decay_t s + x_t B_t,    y_t = C_t.s
//
// A vector's worth of the state's rows goes through all tokens before the next ones do, so it stays in the innermost
// cache (8 KB of a released head's 32). A row has a sum of its own for y, whose latency the other rows' hide, and their
// lanes are added together. The state is rounded after every token, as it is where tokens come one by one.
#pragma once

#include "rounding.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

// Of some tokens: how much of the state each leaves, what each adds, and what it reads.
template <class W>
struct Recurrence {
    const W *decay, *rest;  // [tokens], their sum is what is left: a rounded factor would err in all of a state alike
    const W* x;             // [tokens, x_stride], times the step
    const W *b, *c;         // [tokens, n_stride], zeros from n on
    int64_t x_stride, n_stride;
    int64_t tokens;
};

// Rows of a state [Rows, n], read at `from`, written at `to`, which may be the same; y[t * x_stride + q] for its row q.
template <int Rows, class W>
void recur_rows(W* to, const W* from, int64_t stride, int64_t n, const Recurrence<W>& r, const W* x, W* y) {
    using V = Vector<W>;
    constexpr int lanes = lanes_of<W>;
    for (int64_t t = 0; t < r.tokens; ++t, x += r.x_stride, y += r.x_stride) {
        const W *b = r.b + t * r.n_stride, *c = r.c + t * r.n_stride, decay = r.decay[t], rest = r.rest[t];
        V sums[lanes] = {};
        for_vectors<W>(n, [&](int64_t i, auto size) {
            const V in = unaligned<V>(b + i), out = unaligned<V>(c + i);
#pragma GCC unroll 16
            for (int q = 0; q < Rows; ++q) {
                const V before = load_some<W>(from + q * stride + i, size);
                V s = decay * before + (rest * before + x[q] * in);
                store_some<W>(to + q * n + i, s, size);
                if (size < lanes) s = load_some<W>(to + q * n + i, size);  // an infinite x times zero is not zero
                sums[q] += s * out;
            }
        });
        const V all = sums_across(sums);
        for (int q = 0; q < Rows; ++q) y[q] = all[q];
        from = to;
        stride = n;
    }
}

// The same for all rows of a state.
template <class W>
void recur(W* to, const W* from, int64_t stride, int64_t rows, int64_t n, const Recurrence<W>& r, W* y) {
    int64_t q = 0;
    for (; q + lanes_of<W> <= rows; q += lanes_of<W>)
        recur_rows<lanes_of<W>>(to + q * n, from + q * stride, stride, n, r, r.x + q, y + q);
    for (; q < rows; ++q) recur_rows<1>(to + q * n, from + q * stride, stride, n, r, r.x + q, y + q);
}

}  // namespace TT_ISA
}  // namespace tt
