#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

// Causal depthwise convolution, SiLU and the selective scan of a block of tokens, from initial states. C = heads *
// head_dim + 2 * groups * state. Null views are inputs that were not given (conv_state, ssm_state: zeros; state_index:
// the batch row itself; seq_lens: all L) or outputs that are not wanted. Bc: rows of stored states. N: 1, or the number
// of blocks of `states_every` tokens.
struct Mamba2Scan {
    View xbc;          // [B, L, C], laid out x | B | C
    View dt;           // [B, L, heads]
    View conv_weight;  // [C, W]
    View conv_bias;    // [C]
    View a_log;        // [heads]
    View d;            // [heads]
    View dt_bias;      // [heads]
    View conv_state;   // [Bc, C, W-1]
    View ssm_state;    // [Bc, heads, head_dim, state]
    View state_index;  // [B], in range
    View seq_lens;     // [B], in [0, L]
    View y;            // [B, L, heads * head_dim] out, dtype of xbc
    View conv_out;     // [B, N, C, W-1] out, dtype of xbc
    View ssm_out;      // [B, N, heads, head_dim, state] out, float32 (float64 for float64)
    int64_t groups;
    int64_t head_dim;
    int64_t states_every;  // 0: states at the end only
    double dt_min, dt_max;
};
TT_KERNEL(mamba2_scan, Mamba2Scan)

// RMSNorm of y * SiLU(z) within each of `groups` groups of channels, times weight.
struct GatedRmsNorm {
    View y;       // [B, L, D]
    View z;       // [B, L, D]
    View weight;  // [D]
    View out;     // [B, L, D] out, dtype of y
    int64_t groups;
    double eps;
};
TT_KERNEL(gated_rms_norm, GatedRmsNorm)

}  // namespace tt
