// How many positions a step owes (reference/remask_schedule.py). Products that should be whole numbers are snapped to a
// multiple of 2^-30 before they are rounded, so that no count hangs on the last digit of a cosine or a division.
#pragma once

#include "remask_row.h"

namespace tt {
namespace TT_ISA {

inline double snapped(double x) {
    return __builtin_nearbyint(x * 0x1p30) * 0x1p-30;
}
inline int64_t quotient_down(int64_t a, int64_t b) {  // b > 0
    return a / b - (a % b < 0);
}
inline int64_t product(int64_t a, int64_t b) {  // wraps, as tensors of integers do
    return int64_t(uint64_t(a) * uint64_t(b));
}
inline int64_t total(int64_t a, int64_t b) {
    return int64_t(uint64_t(a) + uint64_t(b));
}

// What the schedules that count from n0 commit in their first `steps` steps.
inline int64_t spent(const Remask& a, const RemaskRow& row, int64_t initial, int64_t steps) {
    const int64_t num_steps = row.num_steps;
    int64_t sum = 0;
    if (a.options.schedule == RemaskChoice::even) {
        sum = product(steps, initial / num_steps);
        if (a.options.spread_remainder) sum = total(sum, smaller(steps, initial % num_steps));
    } else if (a.options.schedule == RemaskChoice::carried) {
        sum = quotient_down(product(smaller(steps, num_steps), initial), num_steps);
    } else {
        int64_t listed = 0, left = initial;
        for (int64_t j = 0; j < num_steps && left > 0 && listed < steps; ++j) {
            const double share = __builtin_nearbyint(snapped(double(left) * leave_probability(a, j, num_steps)));
            sum += int64_t(share);
            left -= int64_t(share);
            listed += share > 0;  // a share of zero takes no step
        }
    }
    return smaller(sum, initial);
}

// The smallest n0 from `waiting` to `length` that leaves as much as waits after the row's steps so far.
inline int64_t inferred_initial(const Remask& a, const RemaskRow& row, int64_t waiting, int64_t length) {
    for (int64_t n0 = waiting; n0 <= length; ++n0)
        if (n0 - spent(a, row, n0, row.step) >= waiting) return n0;
    return length;
}

// q, not yet limited to what waits. waiting: n; length: S.
inline int64_t quota(const Remask& a, const RemaskRow& row, int64_t waiting, int64_t length) {
    const RemaskOptions& options = a.options;
    const int64_t n = waiting, step = row.step, num_steps = row.num_steps, schedule = options.schedule;
    if (a.bounds.warmup > 0 && double(step) < a.bounds.warmup * double(num_steps)) return 1;
    const bool counts =
        schedule == RemaskChoice::even || schedule == RemaskChoice::carried || schedule == RemaskChoice::rounded;
    int64_t initial = row.initial;
    if (counts && options.schedule_base == RemaskChoice::of_masks && initial < 0)
        initial = inferred_initial(a, row, n, length);
    switch (schedule) {
        case RemaskChoice::remaining: {
            const int64_t left = larger(num_steps - step, int64_t(1));
            return quotient_down(total(total(n, left), -1), left);
        }
        case RemaskChoice::even: {
            const int64_t base = options.schedule_base == RemaskChoice::of_block || initial < 0 ? length : initial;
            return base / num_steps + (options.spread_remainder && step < base % num_steps);
        }
        case RemaskChoice::carried: return spent(a, row, initial, total(step, 1)) - (initial - n);
        case RemaskChoice::rounded: return spent(a, row, initial, total(step, 1)) - spent(a, row, initial, step);
        case RemaskChoice::noise: {
            const double s = times(options, a.bounds.min_t, step, num_steps).s;
            const double kept = __builtin_floor(snapped((1 - clean_fraction(options.alpha, s)) * double(length)));
            return n - larger(smaller(int64_t(kept), n - 1), int64_t(0));
        }
        case RemaskChoice::truncated: return int64_t(__builtin_floor(snapped(double(n) * row.leave)));
        default: return 0;
    }
}

}  // namespace TT_ISA
}  // namespace tt
