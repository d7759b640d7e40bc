// What the pieces of a position say together. By a warp, a lane for each piece; results are the same in every lane.
#pragma once

#include "remask.h"

// As Partial.
struct Summary {
    float top, best, second;
    double mass, drop;
    int64 best_token;
    Two<uint64> drawn;
    bool wrong;
};

// The pieces of a position: a lane's first, which is read as soon as it is written and then stays in registers; most
// positions have no more. (With LONG there are no registers to spare, and many positions to hide a read behind.)
struct Pieces {
    const Partial* partials;
    int64 count;
    Partial first;

    __device__ Pieces(const Partial* partials, int64 count) : partials(partials), count(count) {
        if (!LONG && lane_id() < count) first = partials[lane_id()];
    }
    // f(piece) for those of this lane.
    template <class F>
    __device__ void each(const F& f) const {
        if (!LONG && lane_id() < count) f(first);
#pragma unroll 1
        for (int64 p = lane_id() + (LONG ? 0 : lanes); p < count; p += lanes) f(partials[p]);
    }
};

// t: the temperature of the statistics. sampled, margin: whether what was drawn, and the second best of what the
// statistics see, are asked for.
__device__ inline Summary merged(const Pieces& pieces, double t, bool sampled, bool margin) {
    uint64 best = 0;
    unsigned top = 0;
    bool wrong = false;
    pieces.each([&](const Partial& partial) {
        wrong |= partial.wrong != 0;
        if (partial.wrong) return;
        const uint64 key = drawn_key(partial.best, partial.best_token);
        best = key > best ? key : best;
        const unsigned own = ordered(partial.top);
        top = own > top ? own : top;
    });
    Summary f = {};
    f.wrong = __ballot_sync(whole_warp, wrong) != 0;
    best = warp_max(best);
    f.best = drawn_value(best);
    f.best_token = drawn_token(best);
    f.top = number(warp_max(top));
    if (f.wrong) return f;
    if (sampled) {
        Two<uint64> drawn;
        pieces.each([&](const Partial& partial) {
            drawn.offer(partial.drawn[0]);
            drawn.offer(partial.drawn[1]);
        });
        f.drawn = warp_two(drawn);
    }
    if (margin) {
        Two<unsigned> scored;
        pieces.each([&](const Partial& partial) {
            scored.offer(ordered(partial.top));
            scored.offer(ordered(partial.second));
        });
        f.second = number(warp_two(scored).second);
    }
    double mass = 0, drop = 0;
    pieces.each([&](const Partial& partial) {
        if (partial.tops == 0) return;
        const double own = double(partial.tops) + double(partial.mass);
        const double by = (double(f.top) - double(partial.top)) / t, factor = exp(-by);
        mass += factor * own;
        if (factor > 0) drop += factor * (double(partial.drop) + own * by);
    });
    f.mass = warp_sum(mass);
    f.drop = warp_sum(drop);
    return f;
}

// Of the posterior. filter: of a row that is filtered.
__device__ inline Posterior<float> posterior_of(const Remask& a, const Row& row, const Summary& f, const Filter* filter,
                                                const Pieces& pieces) {
    const double t = double(temperature_of(row));
    const float least = row.filtered ? filter->least : -infinity();
    double all = 0, survivors = 0;
    pieces.each([&](const Partial& partial) {
        if (partial.bests == 0) return;
        const double by = double(f.best) - double(partial.best);
        all += exp(-by) * (double(partial.bests) + double(partial.all));
        if (partial.best >= least) survivors += exp(-by / t) * (double(partial.bests) + double(partial.survivors));
    });
    const double log_sum = double(f.best) + log(warp_sum(all));
    Posterior<float> q;
    q.mask = row.filtered ? filter->mask : mask_logit<float>(log_sum, row.leave);
    q.mask_best = q.mask > f.best || (q.mask == f.best && a.mask_token_id < f.best_token);
    q.mask_survives = q.mask >= least;
    q.top = f.best;
    q.mass = warp_sum(survivors);
    return q;
}
