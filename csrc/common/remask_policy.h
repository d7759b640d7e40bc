// A RemaskPolicy as numbers, in the order of OPTIONS and BOUNDS in twotower_kernels/options/remask_policy.py. Choices
// are numbered in the order of the enumerations below; has_* says whether the bound of that name is given. Included by
// both the CPU's kernel and the GPU's, inside their namespaces, where `int64` is declared.
#pragma once

struct RemaskOptions {
    int64 suppress_mask, skip_mask_candidates, standing, greedy, statistics;
    int64 top_p_first, top_p_tempered, top_p_keep_crossing;
    int64 score, gate, strict, gate_on, factor_last_free, entropy_includes_self;
    int64 schedule, schedule_base, spread_remainder, alpha, long_grid, min_commits, finish;
    int64 window, combine, sub_block, renoise, renoise_as;
    int64 has_temperature_end, has_gate_slack, has_run_threshold, has_complete_threshold, has_edit_threshold,
        has_remask_threshold;
};
struct RemaskBounds {
    double position_penalty, rank_temperature, min_t, alpha_floor, warmup;
    double temperature_end, gate_slack, run_threshold, complete_threshold, edit_threshold, remask_threshold;
};

struct RemaskChoice {
    enum Statistics { raw, filtered };
    enum Score { confidence, margin, neg_entropy, top, gap, random, leftmost };
    enum Gate { no_gate, threshold, factor, entropy_sum, prefix };
    enum GateOn { on_confidence, on_score };
    enum Schedule { nothing, remaining, even, carried, noise, truncated, rounded, coin, uniform, corrupt, posterior };
    enum Base { of_masks, of_block, of_editable };
    enum Alpha { linear, cosine, exponential, sine, cosine_floor };
    enum Renoise { as_random, as_mask };
    enum Combine { fill, either, cap };
};
