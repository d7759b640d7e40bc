// What the pieces of a position say together. By a warp, a lane for each piece; results are the same in every lane.
#pragma once

#include "remask.h"

// As Partial.
struct Findings {
    float top, best, second;
    double mass, drop;
    int64 best_token;
    Two<uint64> drawn;
    bool wrong;
};

__device__ inline Findings merged(const Partial* partials, int64 pieces, double t) {
    Two<uint64> best, drawn;
    Two<unsigned> scored;
    bool wrong = false;
#pragma unroll 1
    for (int64 p = lane_id(); p < pieces; p += lanes) {
        const Partial& partial = partials[p];
        wrong |= partial.wrong != 0;
        if (wrong) break;
        best.offer(drawn_key(partial.best, partial.best_token));
        scored.offer(ordered(partial.top));
        scored.offer(ordered(partial.second));
        drawn.offer(partial.drawn[0]);
        drawn.offer(partial.drawn[1]);
    }
    Findings f;
    f.wrong = __ballot_sync(whole_warp, wrong) != 0;
    const uint64 first = warp_max(best.first);
    f.best = drawn_value(first);
    f.best_token = drawn_token(first);
    f.drawn = warp_two(drawn);
    const Two<unsigned> two = warp_two(scored);
    f.top = number(two.first);
    f.second = number(two.second);
    double mass = 0, drop = 0;
#pragma unroll 1
    for (int64 p = lane_id(); p < pieces && !f.wrong; p += lanes) {
        const Partial& partial = partials[p];
        if (partial.tops == 0) continue;
        const double own = double(partial.tops) + double(partial.mass);
        const double by = (double(f.top) - double(partial.top)) / t, factor = exp(-by);
        mass += factor * own;
        if (factor > 0) drop += factor * (double(partial.drop) + own * by);
    }
    f.mass = warp_sum(mass);
    f.drop = warp_sum(drop);
    return f;
}

// Of the posterior. filter: of a row that is filtered.
__device__ inline Posterior<float> posterior_of(const Remask& a, const Row& row, const Findings& f,
                                                const Filter* filter, const Partial* partials, int64 pieces) {
    const double t = double(temperature_of(row));
    const float least = row.filtered ? filter->least : -infinity();
    double all = 0, kept = 0;
#pragma unroll 1
    for (int64 p = lane_id(); p < pieces; p += lanes) {
        const Partial& partial = partials[p];
        if (partial.bests == 0) continue;
        const double by = double(f.best) - double(partial.best);
        all += exp(-by) * (double(partial.bests) + double(partial.all));
        if (partial.best >= least) kept += exp(-by / t) * (double(partial.bests) + double(partial.kept));
    }
    const double log_sum = double(f.best) + log(warp_sum(all));
    Posterior<float> q;
    q.mask = row.filtered ? filter->mask : mask_logit<float>(log_sum, row.leave);
    q.mask_best = q.mask > f.best || (q.mask == f.best && a.mask_token_id < f.best_token);
    q.mask_kept = q.mask >= least;
    q.top = f.best;
    q.mass = warp_sum(kept);
    return q;
}
