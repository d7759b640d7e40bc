// How many positions a step commits (reference/remask_schedule.py). Products that should be whole numbers are snapped
// to a multiple of 2^-30 before they are rounded, so that no count hangs on the last digit of a cosine or a division.
//
// Included by both the CPU's kernel and the GPU's, inside their namespaces, where `int64`, `REMASK_FUNCTION` (what
// stands before a function) and `quarter_cosine(t)` and `quarter_sine(t)`, of pi t / 2 for t in [0, 1], are declared.
// `Step` has options and bounds (remask_policy.h); `Row` has step, num_steps, initial and leave.
#pragma once

struct RemaskTimes {
    double t, s;
};

// Before and after step i of N; later steps repeat the last one.
REMASK_FUNCTION RemaskTimes remask_times(const RemaskOptions& options, double min_t, int64 step, int64 num_steps) {
    const double i = double(step < num_steps - 1 ? step : num_steps - 1), n = double(num_steps);
    if (options.long_grid) {
        const double t = 1 - i / (n > 2 ? n - 1 : 1.0), s = t - 1 / n;
        return {t, s > 0 ? s : 0.0};
    }
    return {(n - i + i * min_t) / n, (n - i - 1 + (i + 1) * min_t) / n};
}

REMASK_FUNCTION double unfloored(int64 alpha, double t) {
    switch (alpha) {
        case RemaskChoice::linear: return 1 - t;
        case RemaskChoice::cosine: return quarter_cosine(t);
        case RemaskChoice::sine: return 1 - quarter_sine(t);
        case RemaskChoice::cosine_floor: return 0.999 * quarter_cosine(t);
        default: return (exp(-3 * t) - exp(-3.0)) / (1 - exp(-3.0));
    }
}

template <class Step>
REMASK_FUNCTION double clean_fraction(const Step& a, double t) {
    return a.bounds.alpha_floor + (1 - a.bounds.alpha_floor) * unfloored(a.options.alpha, t);
}

// Before and after step i of N.
template <class Step>
REMASK_FUNCTION RemaskClean clean_fractions(const Step& a, int64 step, int64 num_steps) {
    const RemaskTimes at = remask_times(a.options, a.bounds.min_t, step, num_steps);
    return {clean_fraction(a, at.t), clean_fraction(a, at.s)};
}

// The probability that a mask becomes a token in this step.
template <class Step>
REMASK_FUNCTION double leave_probability(const Step& a, int64 step, int64 num_steps) {
    const RemaskClean a_of = clean_fractions(a, step, num_steps);
    return a_of.before < 1 ? (a_of.after - a_of.before) / (1 - a_of.before) : 1.0;
}

REMASK_FUNCTION double snapped(double x) {
    return nearbyint(x * 0x1p30) * 0x1p-30;
}
REMASK_FUNCTION int64 quotient_down(int64 a, int64 b) {  // b > 0
    return a / b - (a % b < 0);
}
REMASK_FUNCTION int64 wrapped_product(int64 a, int64 b) {  // as tensors of integers have it
    return int64((unsigned long long)(a) * (unsigned long long)(b));
}
REMASK_FUNCTION int64 wrapped_sum(int64 a, int64 b) {
    return int64((unsigned long long)(a) + (unsigned long long)(b));
}

// What the schedules that count from n0 commit in their first `steps` steps.
template <class Step, class Row>
REMASK_FUNCTION int64 spent(const Step& a, const Row& row, int64 initial, int64 steps) {
    const int64 num_steps = row.num_steps;
    int64 sum = 0;
    if (a.options.schedule == RemaskChoice::even) {
        const int64 more = initial % num_steps;
        sum = wrapped_product(steps, initial / num_steps);
        if (a.options.spread_remainder) sum = wrapped_sum(sum, steps < more ? steps : more);
    } else if (a.options.schedule == RemaskChoice::carried) {
        sum = quotient_down(wrapped_product(steps < num_steps ? steps : num_steps, initial), num_steps);
    } else {
        int64 listed = 0, left = initial;
        for (int64 j = 0; j < num_steps && left > 0 && listed < steps; ++j) {
            const double share = nearbyint(snapped(double(left) * leave_probability(a, j, num_steps)));
            sum += int64(share);
            left -= int64(share);
            listed += share > 0;  // a share of zero takes no step
        }
    }
    return sum < initial ? sum : initial;
}

// Whether n0, not being given, has to be inferred: the smallest one, from `waiting` to `length`, that leaves as much as
// waits after the steps so far, or `length`.
template <class Step, class Row>
REMASK_FUNCTION bool infers_initial(const Step& a, const Row& row) {
    const int64 schedule = a.options.schedule;
    const bool even = schedule == RemaskChoice::even && a.options.schedule_base == RemaskChoice::of_masks;
    const bool counts = even || schedule == RemaskChoice::carried || schedule == RemaskChoice::rounded;
    return counts && row.initial < 0;
}
template <class Step, class Row>
REMASK_FUNCTION bool leaves_enough(const Step& a, const Row& row, int64 initial, int64 waiting) {
    return initial - spent(a, row, initial, row.step) >= waiting;
}

// q, not yet limited to what waits. waiting: n; length: S; initial: n0, negative if it is not known.
template <class Step, class Row>
REMASK_FUNCTION int64 quota(const Step& a, const Row& row, int64 initial, int64 waiting, int64 length) {
    const int64 n = waiting, step = row.step, num_steps = row.num_steps;
    if (a.bounds.warmup > 0 && double(step) < a.bounds.warmup * double(num_steps)) return 1;
    switch (a.options.schedule) {
        case RemaskChoice::remaining: {
            const int64 left = num_steps - step > 1 ? num_steps - step : 1;
            return quotient_down(wrapped_sum(wrapped_sum(n, left), -1), left);
        }
        case RemaskChoice::even: {
            const int64 base = a.options.schedule_base == RemaskChoice::of_masks ? initial : length;
            return base / num_steps + (a.options.spread_remainder && step < base % num_steps);
        }
        case RemaskChoice::carried: return spent(a, row, initial, wrapped_sum(step, 1)) - (initial - n);
        case RemaskChoice::rounded: return spent(a, row, initial, wrapped_sum(step, 1)) - spent(a, row, initial, step);
        case RemaskChoice::noise: {
            const double s = remask_times(a.options, a.bounds.min_t, step, num_steps).s;
            const double noisy = floor(snapped((1 - clean_fraction(a, s)) * double(length)));
            const int64 most = int64(noisy) < n - 1 ? int64(noisy) : n - 1;
            return n - (most > 0 ? most : 0);
        }
        case RemaskChoice::corrupt: {
            const double s = remask_times(a.options, a.bounds.min_t, step, num_steps).s;
            const int64 noisy = int64(nearbyint(snapped((1 - clean_fraction(a, s)) * double(length))));
            const int64 most = noisy > 1 ? noisy : 1;
            return n - (most < n ? most : n);
        }
        case RemaskChoice::truncated: return int64(floor(snapped(double(n) * row.leave)));
        default: return 0;
    }
}
