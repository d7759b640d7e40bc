#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

// h = x, or x + gate * y; normed = RMSNorm of h with adaLN modulation before or after it. Views that are null are parts
// that were not asked for: y (h is x), gate, shift and scale, h, normed.
struct GatedResidualAdalnNorm {
    View x;       // [B, S, H]
    View y;       // [B, S, H]
    View gate;    // [B, H]
    View weight;  // [H], or null for 1
    View shift;   // [B, H]
    View scale;   // [B, H]
    View h;       // [B, S, H] out, dtype of x
    View normed;  // [B, S, H] out, dtype of x
    double eps;
    bool norm_first;
    bool round_first;  // what is normalised is rounded before the weight multiplies it
};
TT_KERNEL(gated_residual_adaln_norm, GatedResidualAdalnNorm)

}  // namespace tt
