// Mamba-2's gated norm: RMSNorm of y * SiLU(z) within groups of channels (reference/mamba2.py has the formulas).
//
// One pass computes the gated values, which stay in L1, and the sum of their squares; another scales them.
#include "exponential.h"
#include "mamba2.h"
#include "parallel.h"
#include "rounding.h"
#include "squares.h"

namespace tt {
namespace TT_ISA {

namespace {

template <class Y, class Z>
void norm_token_rows(const GatedRmsNorm& a) {
    using W = Wide<Y>;
    using V = Vector<W>;
    const int64_t length = a.y.size[1], n = a.y.size[2], group_size = n / a.groups;
    parallel_for(a.y.size[0] * length, 4, [&](int64_t begin, int64_t end) {
        Scratch<W> weight(n + lanes_of<W>), scratch(group_size + lanes_of<W>);
        load<W>(weight, a.weight, 0, n);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / length, t = row % length;
            const Y* y = a.y.as<Y>() + b * a.y.stride[0] + t * a.y.stride[1];
            const Z* z = a.z.as<Z>() + b * a.z.stride[0] + t * a.z.stride[1];
            Y* out = a.out.as<Y>() + b * a.out.stride[0] + t * a.out.stride[1];
            const W* w = weight;
            for (int64_t group = 0; group < a.groups;
                 ++group, y += group_size, z += group_size, out += group_size, w += group_size) {
                W* gated = scratch;
                Squares<W> squares;
                for_vectors<W>(group_size, [=, &squares](int64_t i, auto count) {
                    V gate[1] = {load_some<W>(z + i, count)};
                    silu(gate);
                    const V value = load_some<W>(y + i, count) * gate[0];
                    Rounding<W>::store(gated + i, value);
                    squares.add(value);
                });
                const W rstd = squares.inverse_root(group_size, a.eps);
                for_vectors<W>(group_size, [=](int64_t i, auto count) {
                    store_some<Y>(out + i, unaligned<V>(gated + i) * rstd * unaligned<V>(w + i), count);
                });
            }
        }
    });
}

}  // namespace

void gated_rms_norm(const GatedRmsNorm& a) {
    const auto run = [&](auto type) {
        using Y = typename decltype(type)::type;
        if (a.z.dtype == a.y.dtype) return norm_token_rows<Y, Y>(a);
        for_float(a.z.dtype, [&](auto other) { norm_token_rows<Y, typename decltype(other)::type>(a); });
    };
    for_fast(a.y.dtype, run, [&] { baseline::gated_rms_norm(a); });
}

}  // namespace TT_ISA
}  // namespace tt
