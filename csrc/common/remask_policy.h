// A RemaskPolicy as numbers, in the order of OPTIONS and BOUNDS in twotower_kernels/options/remask_policy.py. Choices are
// numbered in the order of the enumerations below; has_* says whether the bound of that name is given. Included by both
// the CPU's kernel and the GPU's, inside their namespaces, where `int64` is declared.
#pragma once

// clang-format off
#define REMASK_OPTIONS(X) \
    X(suppress_mask) X(skip_mask_candidates) X(greedy) X(statistics) X(top_p_first) X(top_p_tempered) \
    X(top_p_keep_crossing) X(score) X(gate) X(strict) X(gate_on) X(factor_last_free) X(entropy_includes_self) \
    X(schedule) X(schedule_base) X(spread_remainder) X(alpha) X(long_grid) X(min_commits) X(finish) \
    X(window) X(combine) X(sub_block) X(renoise) \
    X(has_temperature_end) X(has_gate_slack) X(has_run_threshold) X(has_complete_threshold) X(has_edit_threshold) \
    X(has_remask_threshold)
#define REMASK_BOUNDS(X) \
    X(position_penalty) X(min_t) X(warmup) X(temperature_end) X(gate_slack) X(run_threshold) X(complete_threshold) \
    X(edit_threshold) X(remask_threshold)
// clang-format on

#define REMASK_OPTION(name) int64 name;
struct RemaskOptions {
    REMASK_OPTIONS(REMASK_OPTION)
};
#undef REMASK_OPTION
#define REMASK_BOUND(name) double name;
struct RemaskBounds {
    REMASK_BOUNDS(REMASK_BOUND)
};
#undef REMASK_BOUND

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
