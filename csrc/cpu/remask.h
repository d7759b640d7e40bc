#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

using int64 = int64_t;  // the name in what both kernels share
#include "../common/remask_policy.h"

// The numbers of a row where no tensor of them is given.
struct RemaskWhole {
    int64_t step, num_steps, top_k, seed, offset, initial;  // initial -1: not known
};
struct RemaskReal {
    double temperature, top_p, gate_bound;
};

// One remasking step. Views that are null were not given.
struct Remask {
    View logits;            // [B, S, V]
    View tokens;            // [B, S] int64 or int32
    int64_t mask_token_id;  // -1: there is none
    RemaskOptions options;
    RemaskBounds bounds;
    RemaskWhole whole;
    RemaskReal real;
    View step, num_steps, top_k, seed, offset, initial;  // [B] int64 or int32
    View temperature, top_p, gate_bound;                 // [B] float64
    View suppressed;                                     // [n] int64, sorted: never proposed, no probability
    View unscored;                                       // [n] int64, sorted: no probability in the statistics
    View editable;                                       // bool [B, S]
    View valid_lens;                                     // [B] int64 or int32
    View candidates;                                     // [B, S] int64, -1: draw
    View rank_noise;                                     // [B, S] float64
    View tokens_out;                                     // [B, S] out, dtype of tokens
    View transfer_mask;                                  // [B, S] out, bool
    View candidate;                                      // [B, S] out, int64
    View confidence, entropy;                            // [B, S] out, float32, or float64 for float64 logits
    View num_masked;                                     // [B] out, int64
    View done;                                           // [B] out, bool
};
TT_KERNEL(remask, Remask)

}  // namespace tt
