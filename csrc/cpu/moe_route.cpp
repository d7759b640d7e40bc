// The router: its product, the choice of experts, the plan that sorts tokens by expert (reference/moe.py).
//
// The product is taken in double whatever the types, since a rounded logit may choose another expert. Experts are
// chosen by insertion into a sorted list of k: one pass over E scores, almost all of which are below the last of the
// list. The plan is a counting sort, two passes over N * k numbers, which is nothing beside the experts' weights.
#include "exponential.h"
#include "moe.h"
#include "numeric.h"
#include "parallel.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

namespace {

// --- the product --------------------------------------------------------------------------------------------------

template <class T>
void gate(const MoeGate& a) {
    constexpr int64_t slab = 240;  // tokens that are widened at a time
    using P = Panel<double, T>;
    const int64_t n = a.x.size[0], h = a.x.size[1], e = a.weight.size[0], stride = a.weight.stride[0];
    int rows = skinny_rows;  // of the weight, per piece of work: enough pieces for many threads at E = 128
    while (rows > 4 && e < 4 * max_threads() * rows) rows /= 2;
    Scratch<double> scratch(smaller(n, slab), P::padded(h));
    double* x = scratch;
    for (int64_t start = 0; start < n; start += slab) {
        const int64_t tokens = smaller(slab, n - start);
        parallel_for(tokens, 8, [&](int64_t begin, int64_t end) {
            for_panels<double, T>(x, tokens, h, [&](auto panel, int64_t first) {
                for (int64_t m = larger<int64_t>(0, begin - first); m < smaller(panel.count, end - first); ++m)
                    panel.fill(m, a.x, (start + first + m) * a.x.stride[0], h);
            });
        });
        parallel_for((e + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
            double products[skinny_panel * skinny_rows];
            for (int64_t r = begin * rows; r < smaller(end * rows, e); r += rows) {
                const int some = int(smaller<int64_t>(rows, e - r));
                const T* weight = a.weight.as<T>() + r * stride;
                for_panels<double, T>(x, tokens, h, [&](auto panel, int64_t first) {
                    skinny(weight, stride, some, panel, h, weight, products);
                    for (int64_t m = 0; m < panel.count; ++m)
                        for (int j = 0; j < some; ++j)
                            a.logits.as<double>()[(start + first + m) * e + r + j] = products[m * skinny_rows + j];
                });
            }
        });
    }
}

// --- the choice ---------------------------------------------------------------------------------------------------

// Whether a comes before b in descending order. NaN comes first, as in torch.sort, and equals do not precede each
// other.
template <class W>
bool before(W a, W b) {
    return a > b || (a != a && b == b);
}

// Takes values [begin, end) into the list of the `some` largest so far, of which there are `found`: their indices in
// descending order of value, equals in the order of their arrival. Returns how many there are now.
template <class W>
int64_t take_largest(const W* values, int64_t begin, int64_t end, int64_t some, int64_t* indices, int64_t found) {
    for (int64_t i = begin; i < end; ++i) {
        if (found == some && !before(values[i], values[indices[found - 1]])) continue;
        int64_t at = found < some ? found++ : found - 1;
        for (; at > 0 && before(values[i], values[indices[at - 1]]); --at) indices[at] = indices[at - 1];
        indices[at] = i;
    }
    return found;
}

// The `some` largest of n values, their indices in descending order of value, equals in ascending order of index.
template <class W>
void largest(const W* values, int64_t n, int64_t some, int64_t* indices) {
    take_largest(values, 0, n, some, indices, 0);
}

inline void exponentials(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = exponential(x[i]);
}
inline void exponentials(double* x, int64_t n) {  // whole vectors: what follows the n is scratch too
    constexpr int L = lanes_of<double>;
    for (int64_t i = 0; i < n; i += L) {
        const DoubleVector e = exponential(unaligned<DoubleVector>(x + i));
        std::memcpy(x + i, &e, sizeof(e));
    }
}

template <class W>
void scores_of(W* scores, int64_t e, bool softmax) {
    if (!softmax) {
        for (int64_t i = 0; i < e; ++i) scores[i] = -scores[i];
        exponentials(scores, e);
        for (int64_t i = 0; i < e; ++i) scores[i] = 1 / (1 + scores[i]);
        return;
    }
    W most = scores[0], sum = 0;
    for (int64_t i = 1; i < e; ++i)
        if (before(scores[i], most)) most = scores[i];
    for (int64_t i = 0; i < e; ++i) scores[i] -= most;
    exponentials(scores, e);
    for (int64_t i = 0; i < e; ++i) sum += scores[i];
    for (int64_t i = 0; i < e; ++i) scores[i] /= sum;
}

// The topk_group groups with the largest sums of their two best choices, as a mark for each: whether it stays.
template <class W>
void keep_groups(const MoeRoute& a, const W* choice, int64_t size, W* sums, int64_t* indices, bool* stays) {
    for (int64_t g = 0; g < a.n_group; ++g) {
        const W* group = choice + g * size;
        int64_t best[2];
        largest(group, size, smaller<int64_t>(2, size), best);
        sums[g] = size > 1 ? group[best[0]] + group[best[1]] : group[best[0]];
    }
    largest(sums, a.n_group, a.topk_group, indices);
    for (int64_t g = 0; g < a.n_group; ++g) stays[g] = false;
    for (int64_t i = 0; i < a.topk_group; ++i) stays[indices[i]] = true;
}

// The k largest choices, of the groups that stay if the others are excluded; else those of the others count as 0.
template <class W>
void choose(const MoeRoute& a, W* choice, int64_t e, int64_t k, W* sums, bool* stays, int64_t* indices) {
    if (a.n_group == 1) return largest(choice, e, k, indices);
    const int64_t size = e / a.n_group;
    keep_groups<W>(a, choice, size, sums, indices, stays);
    int64_t found = 0;
    for (int64_t g = 0; g < a.n_group; ++g) {
        if (!stays[g] && a.exclude_dropped) continue;
        for (int64_t i = g * size; i < (g + 1) * size && !stays[g]; ++i) choice[i] = 0;
        found = take_largest(choice, g * size, (g + 1) * size, k, indices, found);
    }
}

template <class W>
void route(const MoeRoute& a) {
    const int64_t e = a.logits.size[1], k = a.weights.size[1];
    parallel_for(a.logits.size[0], 16, [&](int64_t begin, int64_t end) {
        Scratch<W> score_scratch(e + lanes_of<W>), choice_scratch(e), bias_scratch(e), sums(a.n_group);
        Scratch<W> scale_scratch(e);
        Scratch<bool> stays(a.n_group);
        Scratch<int64_t> index_scratch(larger(k, a.topk_group));
        for (int i = 0; i < lanes_of<W>; ++i) score_scratch[e + i] = 0;  // behind the last score, in whole vectors
        W *scores = score_scratch, *choice = choice_scratch, *bias = bias_scratch, *scale = scale_scratch;
        int64_t* indices = index_scratch;
        if (a.bias) load<W>(bias, a.bias, 0, e);
        if (a.scale) load<W>(scale, a.scale, 0, e);
        for (int64_t n = begin; n < end; ++n) {
            load<W>(scores, a.logits, n * a.logits.stride[0], e);
            scores_of(scores, e, a.softmax);
            for (int64_t i = 0; i < e; ++i) choice[i] = a.bias ? scores[i] + bias[i] : scores[i];
            choose<W>(a, choice, e, k, sums, stays, indices);
            W sum = 0;
            for (int64_t i = 0; i < k; ++i) sum += scores[indices[i]];
            for (int64_t i = 0; i < k; ++i) {
                W weight = scores[indices[i]];
                if (a.renormalize) weight /= sum + W(1e-20);
                weight *= W(a.scaling);
                if (a.scale) weight *= scale[indices[i]];
                a.weights.as<float>()[n * k + i] = float(weight);
                a.experts.as<int32_t>()[n * k + i] = int32_t(indices[i]);
            }
        }
    });
}

// --- the plan -----------------------------------------------------------------------------------------------------

template <class I>
void plan(const MoePlan& a) {
    const int64_t n = a.experts.size[0], k = a.experts.size[1], e = a.counts.size[0], stride = a.experts.stride[0];
    const I* experts = a.experts.as<I>();
    int64_t *counts = a.counts.as<int64_t>(), *offsets = a.offsets.as<int64_t>(), *pairs = a.pairs.as<int64_t>();
    const auto expert_of = [=](int64_t t, int64_t c) {  // e: none of these
        const int64_t expert = experts[t * stride + c];
        return expert >= 0 && expert < e ? expert : e;
    };
    Scratch<int64_t> scratch(e + 1);
    int64_t* next = scratch;  // first the pairs of an expert, then where the next of them goes
    for (int64_t i = 0; i <= e; ++i) next[i] = 0;
    for (int64_t t = 0; t < n; ++t)
        for (int64_t c = 0; c < k; ++c) ++next[expert_of(t, c)];
    offsets[0] = 0;
    for (int64_t i = 0; i < e; ++i) {
        counts[i] = next[i];
        next[i] = offsets[i];
        offsets[i + 1] = offsets[i] + counts[i];
    }
    next[e] = offsets[e];
    for (int64_t t = 0; t < n; ++t)
        for (int64_t c = 0; c < k; ++c) pairs[next[expert_of(t, c)]++] = t * k + c;
}

// Pairs that ascend within every expert, and name it, are distinct: if they are as many as have an expert, each of
// those is there once.
template <class I>
bool holds(const MoePlan& a) {
    const int64_t k = a.experts.size[1], total = a.experts.size[0] * k, e = a.counts.size[0];
    const int64_t *counts = a.counts.as<int64_t>(), *offsets = a.offsets.as<int64_t>(), *pairs = a.pairs.as<int64_t>();
    const I* experts = a.experts.as<I>();
    int64_t known = 0;
    for (int64_t pair = 0; pair < total; ++pair) {
        const I expert = experts[pair / k * a.experts.stride[0] + pair % k];
        known += expert >= 0 && expert < e;
    }
    if (offsets[0] != 0 || offsets[e] != known) return false;
    for (int64_t i = 0; i < e; ++i) {
        const int64_t begin = offsets[i], end = offsets[i + 1];
        if (end < begin || end > total || counts[i] != end - begin) return false;
        int64_t last = -1;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t pair = pairs[at];
            if (pair <= last || pair >= total) return false;
            if (experts[pair / k * a.experts.stride[0] + pair % k] != i) return false;
            last = pair;
        }
    }
    return true;
}

}  // namespace

void moe_gate(const MoeGate& a) {
    for_fast(
        a.weight.dtype, [&](auto type) { gate<typename decltype(type)::type>(a); }, [&] { baseline::moe_gate(a); });
}

void moe_route(const MoeRoute& a) {
    if (a.logits.dtype == DType::float64)
        route<double>(a);
    else
        route<float>(a);
}

void moe_plan(const MoePlan& a) {
    if (a.experts.dtype == DType::int64)
        plan<int64_t>(a);
    else
        plan<int32_t>(a);
}

void moe_plan_holds(const MoePlanHolds& a) {
    *a.holds = a.plan.experts.dtype == DType::int64 ? holds<int64_t>(a.plan) : holds<int32_t>(a.plan);
}

}  // namespace TT_ISA
}  // namespace tt
