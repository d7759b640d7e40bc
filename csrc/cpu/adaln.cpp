// Gated residual, RMSNorm and adaLN modulation in one pass over a row (reference/adaln.py has the formulas).
//
// A row of 2688 floats is 10.5 KB: it stays in L1 between the pass that sums the squares and the one that scales, so
// each tensor is read and written once. Rounding after every operation of modulation and residual is part of the
// definition; the norm itself is computed in float and rounded once.
#include "adaln.h"

#include "numeric.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

// The vectors of one sequence in the compute type; loaded again when a thread comes to the next sequence.
template <class W>
struct Vectors {
    explicit Vectors(int64_t n) : gate(n), weight(n), shift(n), scale(n) {}
    Scratch<W> gate, weight, shift, scale;
    int64_t sequence = -1;
};

template <class W>
W sum_of_squares(const W* x, int64_t n) {
    W sums[16] = {};  // independent sums: they vectorise, and err less than one
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += x[i + j] * x[i + j];
    for (; i < n; ++i) sums[0] += x[i] * x[i];
    W total = 0;
    for (W sum : sums) total += sum;
    return total;
}

// x: what the residual is stored in; Y: what y is (narrower where the residual is kept in float32).
template <class X, class Y>
void row(const GatedResidualAdalnNorm& a, int64_t b, int64_t s, Vectors<Wide<X>>& vectors, Wide<X>* h) {
    using W = Wide<X>;
    const int64_t n = a.x.size[2];
    const W *gate = vectors.gate, *weight = vectors.weight, *shift = vectors.shift, *scale = vectors.scale;
    const X* x = a.x.as<X>() + b * a.x.stride[0] + s * a.x.stride[1];
    if (a.y) {
        const Y* y = a.y.as<Y>() + b * a.y.stride[0] + s * a.y.stride[1];
        if (a.gate)
            for (int64_t i = 0; i < n; ++i) h[i] = rounded<X>(widen(x[i]) + rounded<Y>(gate[i] * widen(y[i])));
        else
            for (int64_t i = 0; i < n; ++i) h[i] = rounded<X>(widen(x[i]) + W(widen(y[i])));
    } else {
        for (int64_t i = 0; i < n; ++i) h[i] = widen(x[i]);
    }
    if (a.h) {
        X* out = a.h.as<X>() + b * a.h.stride[0] + s * a.h.stride[1];
        for (int64_t i = 0; i < n; ++i) out[i] = narrow<X>(h[i]);
    }
    if (!a.normed) return;
    X* out = a.normed.as<X>() + b * a.normed.stride[0] + s * a.normed.stride[1];
    if (a.scale && !a.norm_first)
        for (int64_t i = 0; i < n; ++i) h[i] = rounded<X>(rounded<X>(h[i] * scale[i]) + shift[i]);
    const W inverse = 1 / std::sqrt(sum_of_squares(h, n) / W(n) + W(a.eps));
    if (a.scale && a.norm_first)
        for (int64_t i = 0; i < n; ++i)
            out[i] = narrow<X>(rounded<X>(rounded<X>(h[i] * inverse * weight[i]) * scale[i]) + shift[i]);
    else
        for (int64_t i = 0; i < n; ++i) out[i] = narrow<X>(h[i] * inverse * weight[i]);
}

template <class X, class Y>
void rows(const GatedResidualAdalnNorm& a) {
    using W = Wide<X>;
    const int64_t length = a.x.size[1], n = a.x.size[2];
    parallel_for(a.x.size[0] * length, 4, [&](int64_t begin, int64_t end) {
        Vectors<W> vectors(n);
        Scratch<W> h(n);
        if (a.weight) load<W>(vectors.weight, a.weight, 0, n);
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
            row<X, Y>(a, b, r % length, vectors, h);
        }
    });
}

}  // namespace

void gated_residual_adaln_norm(const GatedResidualAdalnNorm& a) {
    for_float(a.x.dtype, [&](auto type) {
        using X = typename decltype(type)::type;
        if (!a.y || a.y.dtype == a.x.dtype) return rows<X, X>(a);
        for_float(a.y.dtype, [&](auto other) { rows<X, typename decltype(other)::type>(a); });
    });
}

}  // namespace TT_ISA
}  // namespace tt
