// One position of a remasking step, by a warp: what its pieces say together, its candidate, and how it is judged.
#pragma once

#include "remask.h"

// What selection knows of a position; arrays of a block's length in shared memory, 36 bytes a position (_PLACE_BYTES in
// twotower_kernels/cuda_remask.py).
struct Places {
    double* score;
    float *confidence, *entropy;
    int *candidate, *rank;
    int* order;  // of a stretch: its usable places, best first
    unsigned* is;
    int* good;  // whether the gate lets it pass

    __device__ bool has(int64 s, unsigned what) const { return is[s] & what; }
};
enum : unsigned { within = 1, looked = 2, waiting = 4, usable = 8, drawn = 16, sent_back = 32 };

__device__ inline Places places_at(uint64* memory, int64 block) {
    Places p;
    p.score = reinterpret_cast<double*>(memory);
    p.confidence = reinterpret_cast<float*>(p.score + block);
    p.entropy = p.confidence + block;
    p.candidate = reinterpret_cast<int*>(p.entropy + block);
    p.rank = p.candidate + block;
    p.order = p.rank + block;
    p.is = reinterpret_cast<unsigned*>(p.order + block);
    p.good = reinterpret_cast<int*>(p.is + block);
    return p;
}

// --- one position, by a warp ----------------------------------------------------------------------------------------

// A position's pieces together, as Partial; the same in every lane.
struct Findings {
    float top, best, second;
    double mass, drop;
    double all, kept;  // posterior: relative to `best`
    int64 best_token;
    Two<uint64> drawn;
    bool wrong;
};

// t, draw_t: the temperatures of the statistics and of the draw.
__device__ inline Findings merged(const Partial* partials, int64 pieces, double t, double draw_t, bool posterior) {
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
    double all = 0, kept = 0;
#pragma unroll 1
    for (int64 p = lane_id(); p < pieces && posterior && !f.wrong; p += lanes) {
        const Partial& partial = partials[p];
        const double below = double(partial.best) - double(f.best);
        if (partial.all > 0) all += exp(below) * double(partial.all);
        if (partial.kept > 0) kept += exp(below / draw_t) * double(partial.kept);
    }
    f.all = warp_sum(all);
    f.kept = warp_sum(kept);
    return f;
}

__device__ inline float logit_at(const Remask& a, int64 b, int64 s, int64 token) {
    return number_at<float>(a.logits, a.logits_type, b * a.logits_row + s * a.logits_place + token * a.logits_token);
}

// The proposal: the caller's, the sample, or the argmax.
__device__ inline int64 proposal(const Remask& a, const Row& row, int64 b, int64 s, const Findings& f) {
    if (a.candidates) {
        const int64 given = a.candidates[b * a.candidates_row + s * a.candidates_place];
        if (given >= 0 && given < a.vocabulary) return given;
    }
    if (!row.sampled) return f.best_token;
    const int64 first = drawn_token(f.drawn.first), second = drawn_token(f.drawn.second);
    if (!(drawn_value(f.drawn.first) - drawn_value(f.drawn.second) < 1e-4f)) return first;
    const Stream stream = stream_of(a, row, b, s);
    const auto exactly = [&](int64 token) {
        return double(logit_at(a, b, s, token)) / row.temperature + exact_gumbel(philox_word(stream, unsigned(token)));
    };
    const int64 low = first < second ? first : second, high = first < second ? second : first;
    return exactly(high) > exactly(low) ? high : low;
}

// The caller's number of a position, or the op's own.
__device__ inline double position_noise(const Remask& a, const Row& row, int64 b, int64 s, unsigned draw) {
    if (a.rank_noise) return a.rank_noise[b * a.rank_noise_row + s * a.rank_noise_place];
    return uniform(philox_word(stream_of(a, row, b, s), draw));
}

// The probability that a draw of the posterior is a token and not the mask, whose logit is z.
__device__ inline double token_probability(const Remask& a, const Row& row, const Findings& f, float z,
                                           bool mask_kept) {
    if (!(row.temperature > 0)) return z > f.best || (z == f.best && a.mask < f.best_token) ? 0 : 1;
    if (z == infinity()) return 0;
    if (!mask_kept) return 1;
    if (f.kept == 0) return 0;
    const double ahead = (double(z) - double(f.best)) / row.temperature;  // of the mask, against the largest
    const double tokens = ahead > 0 ? f.kept * exp(-ahead) : f.kept, mask = ahead > 0 ? 1 : exp(ahead);
    return double(float(tokens / (tokens + mask)));
}

// What one position's logits come to: candidate, confidence, entropy, score; NaN where they are not usable.
__device__ inline void judge(const Remask& a, const Row& row, int64 b, int64 s, const float* least_kept,
                             const float* of_mask, const Partial* partials, int64 pieces, const Places& place) {
    const bool tempered = a.options.statistics == RemaskChoice::filtered, posterior = is_posterior(a);
    const double t = double(own_temperature(a, row));
    const Findings f = merged(partials, pieces, t, double(temperature_of(row)), posterior);
    if (lane_id() == 0) {  // until it is known to be usable
        place.candidate[s] = -1;
        place.score[s] = place.confidence[s] = place.entropy[s] = __uint_as_float(0x7fc00000u);
    }
    if (f.wrong || f.mass == 0) return;
    float mask = -infinity();  // its logit
    if (posterior) mask = row.filtered ? *of_mask : mask_logit(double(f.best) + log(f.all), row.leave);
    if (tempered && mask == infinity()) return;
    const int64 candidate = proposal(a, row, b, s, f);
    float z = candidate == f.best_token ? f.best : logit_at(a, b, s, candidate);
    const bool suppressed = (hides_mask(a) && candidate == a.mask) ||
                            listed(candidate, a.suppressed, a.suppressed_count) ||
                            listed(candidate, a.unscored, a.unscored_count);
    if (suppressed || (tempered && row.filtered && !(z >= *least_kept))) z = -infinity();
    if (lane_id() > 0) return;

    const auto probability = [&](float logit) { return float(exp((double(logit) - double(f.top)) / t) / f.mass); };
    const float confidence = probability(z), entropy = float(log(f.mass) + f.drop / f.mass);
    if (confidence != confidence) return;  // a temperature that is 0 as a float
    double score = confidence;
    if (a.options.score == RemaskChoice::margin) score = probability(f.top) - probability(f.second);
    if (a.options.score == RemaskChoice::neg_entropy) score = -entropy;
    if (a.options.score == RemaskChoice::random) score = position_noise(a, row, b, s, ranking_draw);
    if (a.options.score == RemaskChoice::leftmost) score = -double(s);
    bool is_drawn = a.options.schedule == RemaskChoice::coin && position_noise(a, row, b, s, ranking_draw) < row.leave;
    if (posterior) {
        const double tokens = token_probability(a, row, f, mask, !row.filtered || mask >= *least_kept);
        is_drawn = position_noise(a, row, b, s, posterior_draw) < tokens;
    }
    const bool returns =
        a.options.has_remask_threshold && !is_mask(a, b, s) && confidence < float(a.bounds.remask_threshold);
    const bool waits = place.has(s, waiting) || returns;
    const bool sits_out = a.options.skip_mask_candidates && candidate == a.mask;
    place.candidate[s] = int(candidate);
    place.confidence[s] = confidence;
    place.entropy[s] = entropy;
    place.score[s] = score;
    place.is[s] |= (returns ? sent_back | waiting : 0) | (waits && !sits_out ? usable : 0) | (is_drawn ? drawn : 0);
}
