// Gated residual, RMSNorm and adaLN modulation in one pass over a row (reference/adaln.py has the formulas).
//
// A row of 2688 floats is 10.5 KB: it stays in L1 between the pass that sums the squares and the one that scales, so
// each tensor is read and written once. Rounding after every operation of modulation and residual is part of the
// definition; the norm itself is computed in float and rounded once, or once more before the weight multiplies it.
#include "adaln.h"

#include "parallel.h"
#include "squares.h"

namespace tt {
namespace TT_ISA {

namespace {

// The vectors of one sequence in the compute type; loaded again when a thread comes to the next sequence.
template <class W>
struct Vectors {
    explicit Vectors(int64_t n) : gate(n + spare), weight(n + spare), shift(n + spare), scale(n + spare) {
        W* all[] = {gate, weight, shift, scale};
        for (W* v : all) std::memset(v + n, 0, spare * sizeof(W));
    }
    static constexpr int spare = lanes_of<W>;  // zeros behind each: they are read by whole SIMD vectors
    Scratch<W> gate, weight, shift, scale;
    int64_t sequence = -1;
};

// x: what the residual is stored in; Y: what y is (narrower where the residual is float32).
template <class X, class Y>
void token_row(const GatedResidualAdalnNorm& a, int64_t b, int64_t s, Vectors<Wide<X>>& vectors, Wide<X>* residual) {
    using W = Wide<X>;
    using V = Vector<W>;
    const int64_t n = a.x.size[2];
    const W *gate = vectors.gate, *weight = vectors.weight, *shift = vectors.shift, *scale = vectors.scale;
    const X* x = a.x.as<X>() + b * a.x.stride[0] + s * a.x.stride[1];
    const Y* y = a.y ? a.y.as<Y>() + b * a.y.stride[0] + s * a.y.stride[1] : nullptr;
    X* h_out = a.h ? a.h.as<X>() + b * a.h.stride[0] + s * a.h.stride[1] : nullptr;
    X* out = a.normed ? a.normed.as<X>() + b * a.normed.stride[0] + s * a.normed.stride[1] : nullptr;
    const bool gated = bool(a.gate), before = a.scale && !a.norm_first, after = a.scale && a.norm_first;
    auto round = [](V v) { return Rounding<X>::rounded(v); };
    Squares<W> squares;
    for_vectors<W>(n, [=, &squares](int64_t i, auto count) {
        V h = load_some<W>(x + i, count);
        if (y) {
            V added = load_some<W>(y + i, count);
            if (gated) added = rounded_to<Y>(unaligned<V>(gate + i) * added);
            h = round(h + added);
        }
        if (h_out) store_some<X>(h_out + i, h, count);
        if (before) h = round(round(h * unaligned<V>(scale + i)) + unaligned<V>(shift + i));
        Rounding<W>::store(residual + i, h);
        squares.add(h);  // zeros beyond the row
    });
    if (!out) return;
    const W inverse = squares.inverse_root(n, a.eps);
    if (a.round_first) {
        for_vectors<W>(n, [=](int64_t i, auto count) {
            store_some<X>(out + i, round(unaligned<V>(residual + i) * inverse) * unaligned<V>(weight + i), count);
        });
        return;
    }
    for_vectors<W>(n, [=](int64_t i, auto count) {
        V normed = unaligned<V>(residual + i) * inverse * unaligned<V>(weight + i);
        if (after) normed = round(round(normed) * unaligned<V>(scale + i)) + unaligned<V>(shift + i);
        store_some<X>(out + i, normed, count);
    });
}

template <class X, class Y>
void token_rows(const GatedResidualAdalnNorm& a) {
    using W = Wide<X>;
    const int64_t length = a.x.size[1], n = a.x.size[2];
    parallel_for(a.x.size[0] * length, 4, [&](int64_t begin, int64_t end) {
        Vectors<W> vectors(n);
        Scratch<W> h(n + lanes_of<W>);
        if (a.weight)
            load<W>(vectors.weight, a.weight, 0, n);
        else
            for (int64_t i = 0; i < n; ++i) vectors.weight[i] = 1;
        for (int64_t r = begin; r < end; ++r) {
            const int64_t b = r / length;
            if (b != vectors.sequence) {
                vectors.sequence = b;
                if (a.gate) load<W>(vectors.gate, a.gate, b * a.gate.stride[0], n);
                if (a.scale) {
                    W* scale = vectors.scale;
                    load<W>(vectors.shift, a.shift, b * a.shift.stride[0], n);
                    load<W>(scale, a.scale, b * a.scale.stride[0], n);
                    for (int64_t i = 0; i < n; ++i) scale[i] = rounded<X>(1 + scale[i]);
                }
            }
            token_row<X, Y>(a, b, r % length, vectors, h);
        }
    });
}

}  // namespace

void gated_residual_adaln_norm(const GatedResidualAdalnNorm& a) {
    const auto run = [&](auto type) {
        using X = typename decltype(type)::type;
        if (!a.y || a.y.dtype == a.x.dtype) return token_rows<X, X>(a);
        for_float(a.y.dtype, [&](auto other) {  // never a wider one
            using Y = typename decltype(other)::type;
            if constexpr (sizeof(Y) < sizeof(X)) token_rows<X, Y>(a);
        });
    };
    for_fast(a.x.dtype, run, [&] { baseline::gated_residual_adaln_norm(a); });
}

}  // namespace TT_ISA
}  // namespace tt
