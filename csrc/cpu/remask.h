#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

// A RemaskPolicy as numbers, in the order of twotower_kernels.remask_policy.OPTIONS and BOUNDS. Choices are numbered in
// the order of the enumerations below; has_* says whether the bound of that name is given.
struct RemaskOptions {
    int64_t suppress_mask, skip_mask_candidates, greedy, statistics, top_p_first, top_p_tempered, top_p_keep_crossing;
    int64_t score, gate, strict, gate_on, factor_last_free, entropy_includes_self;
    int64_t schedule, schedule_base, spread_remainder, alpha, long_grid, min_commits, finish;
    int64_t window, combine, sub_block, renoise;
    int64_t has_temperature_end, has_gate_slack, has_run_threshold, has_complete_threshold, has_edit_threshold,
        has_remask_threshold;
};
struct RemaskBounds {
    double position_penalty, min_t, warmup;
    double temperature_end, gate_slack, run_threshold, complete_threshold, edit_threshold, remask_threshold;
};

struct RemaskChoice {
    enum Statistics { raw, filtered };
    enum Score { confidence, margin, neg_entropy, random, leftmost };
    enum Gate { no_gate, threshold, factor, entropy_sum };
    enum GateOn { on_confidence, on_score };
    enum Schedule { nothing, remaining, even, carried, noise, truncated, rounded, coin, posterior };
    enum Base { of_masks, of_block };
    enum Alpha { linear, cosine, exponential, sine, cosine_floor };
    enum Combine { fill, either, cap };
};

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
