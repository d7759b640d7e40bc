// The experts' two products and the weighted sum over each token's experts (reference/moe.py).
//
// With few tokens this is the reading of weights: at N = 16, k = 6 and E = 128 some 69 experts are read for 96 pairs
// of token and expert. So every row of weights is read once, for all tokens of its expert (see skinny.h), and work is
// cut along the weights' rows, not along the tokens: 16 rows of one expert's up projection, or 16 rows of all experts'
// down projections. The latter makes one thread the owner of its columns of the output: experts are added in
// ascending order without atomics, and the result does not depend on the threads.
//
// With many tokens, pairs are taken in groups of 1024, whole experts where they fit, between which everything is as
// above: scratch memory is bounded by the group, and an expert's weights are still read once per 1024 of its tokens.
// Each product, the activation and each expert's result round to the tensors' dtype, as when the model was trained; the
// sums inside a product and the weighted sum over experts are float (or double). Keeping more digits in between is
// another model: a router downstream then chooses other experts at the boundaries between them.
#include "moe_schedule.h"

namespace tt {
namespace TT_ISA {

namespace {

template <class T>
void experts_of(const MoeExperts& a) {
    using W = Wide<T>;
    const int64_t n = a.x.size[0], h = a.x.size[1];
    W* total = a.total.as<W>();
    parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) total[i] = 0;
    });
    if (a.up_packed)
        add_quantized_experts({a, false});
    else
        add<T, T>({a, {a.up, true}, {a.down, true}, true});
    if (a.shared_up || a.shared_up_packed) {
        parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) total[i] = rounded<T>(total[i]);
        });
        if (a.shared_up_packed)
            add_quantized_experts({a, true});
        else
            add<T, T>({a, {a.shared_up, false}, {a.shared_down, false}, false});
    }
    if (a.total.data == a.out.data) return;
    parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) a.out.as<T>()[i] = narrow<T>(total[i]);
    });
}

}  // namespace

void moe_experts(const MoeExperts& a) {
    for_fast(
        a.x.dtype, [&](auto type) { experts_of<typename decltype(type)::type>(a); }, [&] { baseline::moe_experts(a); });
}

}  // namespace TT_ISA
}  // namespace tt
