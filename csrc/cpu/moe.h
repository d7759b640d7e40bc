#pragma once

#include "isa.h"
#include "packed_weight.h"
#include "view.h"

namespace tt {

// logits[n][e] = x[n] . weight[e] in double.
struct MoeGate {
    View x;       // [N, H]
    View weight;  // [E, H]
    View logits;  // [N, E] out, float64, contiguous
};
TT_KERNEL(moe_gate, MoeGate)

// The top_k experts of every token by score + bias, and their scores as weights.
struct MoeRoute {
    View logits;   // [N, E] any float
    View bias;     // [E] or null
    View scale;    // [E] or null, multiplies the weight of a chosen expert
    View weights;  // [N, k] out, float32
    View experts;  // [N, k] out, int32
    bool softmax;  // else sigmoid
    int64_t n_group;
    int64_t topk_group;
    bool renormalize;
    double scaling;
    bool exclude_dropped;  // whether the experts of dropped groups cannot be chosen; else their choices count as 0
};
TT_KERNEL(moe_route, MoeRoute)

// The pairs token * k + choice sorted by expert, stably; behind the last offset those of experts outside [0, E).
struct MoePlan {
    View experts;  // [N, k] int32 or int64
    View counts;   // [E] out, int64
    View offsets;  // [E + 1] out, int64
    View pairs;    // [N * k] out, int64
};
TT_KERNEL(moe_plan, MoePlan)

// Whether `plan` is, up to its last offset, what moe_plan would make of its experts.
struct MoePlanHolds {
    MoePlan plan;
    bool* holds;  // out
};
TT_KERNEL(moe_plan_holds, MoePlanHolds)

// Those from silu_gated on are gated: they read two products, the gate's and the value's.
enum class Activation : int { relu2, silu, gelu, gelu_tanh, silu_gated, gelu_gated, gelu_erf_gated, clamped_gated };

// out = weighted sum of each token's experts, then the shared expert.
struct MoeExperts {
    View x;            // [N, H]
    View up;           // [E, I or 2I, H], dtype of x
    View down;         // [E, H, I], dtype of x
    View weights;      // [N, k], any float
    View offsets;      // [E + 1] int64, of a valid plan
    View pairs;        // [N * k] int64, of a valid plan
    View shared_up;    // [J or 2J, H] or null
    View shared_down;  // [H, J] or null
    View up_bias;      // [E, I or 2I] or null, dtype of x
    View down_bias;    // [E, H] or null, dtype of x
    View total;        // [N, H] in the compute type, contiguous; out itself where that has this type
    View out;          // [N, H] out, dtype of x, contiguous
    Activation activation;
    double alpha, limit;  // of clamped_gated
    // In the place of `up` and `down`, or of the shared expert's matrices; x is not float64 then.
    PackedWeight up_packed = {}, down_packed = {}, shared_up_packed = {}, shared_down_packed = {};
};
TT_KERNEL_BF16(moe_experts, MoeExperts)

// Part of moe_experts: adds the experts of quantized matrices to the total.
struct QuantizedExperts {
    const MoeExperts& a;
    bool shared;
};
TT_KERNEL_PAIRS(add_quantized_experts, QuantizedExperts)

}  // namespace tt
