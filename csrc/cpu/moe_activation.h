// What is between an expert's two products (reference/moe.py), for 16 numbers of one pair. The number, the function's
// value and every product with it round to the tensors' dtype, as when such models are trained.
#pragma once

#include "moe.h"
#include "numeric.h"
#include "rounding.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

// SiLU(z) = z / (1 + exp(-z)), and the tanh form of GELU is z / (1 + exp(-2u)): (1 + tanh u) / 2 without the
// cancellation at negative u.
template <class W>
inline W over_logistic(W x, W z) {
    return x / (1 + std::exp(-z));
}
template <class W>
inline W silu(W x) {
    return over_logistic(x, x);
}
template <class W>
inline W gelu_tanh(W x) {
    return over_logistic(x, W(1.5957691216057308) * (x + W(0.044715) * x * x * x));
}
template <class W>
inline W gelu(W x) {  // (1 + erf(x / sqrt 2)) / 2, without cancellation either
    return W(0.5) * x * std::erfc(x * W(-0.7071067811865476));
}

template <class T>
class Activate {
   public:
    using W = Wide<T>;
    explicit Activate(const MoeExperts& a) : kind_(a.activation), alpha_(W(a.alpha)), limit_(rounded<T>(W(a.limit))) {}

    // Replaces `rows` values; their gates are read if the activation is gated.
    void operator()(const W* gate, W* values, int rows) const {
        const W alpha = alpha_, limit = limit_;
        switch (kind_) {
            case Activation::relu2: return relu2(values);
            case Activation::silu: return plain(values, rows, [](W x) { return silu(x); });
            case Activation::gelu: return plain(values, rows, [](W x) { return gelu(x); });
            case Activation::gelu_tanh: return plain(values, rows, [](W x) { return gelu_tanh(x); });
            case Activation::silu_gated: return gated(gate, values, rows, [](W x) { return silu(x); });
            case Activation::gelu_gated: return gated(gate, values, rows, [](W x) { return gelu_tanh(x); });
            case Activation::gelu_erf_gated: return gated(gate, values, rows, [](W x) { return gelu(x); });
            case Activation::clamped_gated:  // NaN stays NaN
                for (int r = 0; r < rows; ++r) {
                    const W v = rounded<T>(values[r]);
                    values[r] = rounded<T>((v > limit ? limit : v < -limit ? -limit : v) + 1);
                }
                return gated(gate, values, rows, [=](W x) {
                    const W below = x > limit ? limit : x;
                    return over_logistic(below, alpha * below);
                });
        }
    }

   private:
    static void relu2(W* values) {  // all 16; NaN stays NaN
        const Vector<W> zero{};
        for (int r = 0; r < skinny_rows; r += lanes_of<W>) {
            const Vector<W> v = Rounding<T>::rounded(unaligned<Vector<W>>(values + r));
            Rounding<W>::store(values + r, v < zero ? zero : Rounding<T>::rounded(v * v));
        }
    }
    template <class F>
    static void plain(W* values, int rows, F f) {
        for (int r = 0; r < rows; ++r) values[r] = rounded<T>(f(rounded<T>(values[r])));
    }
    template <class F>
    static void gated(const W* gate, W* values, int rows, F f) {
        for (int r = 0; r < rows; ++r)
            values[r] = rounded<T>(rounded<T>(f(rounded<T>(gate[r]))) * rounded<T>(values[r]));
    }

    Activation kind_;
    W alpha_, limit_;
};

}  // namespace TT_ISA
}  // namespace tt
