// Stage B of a remasking step: candidates, scores, selection, results. A block for each sequence.
//
// First a warp for each position merges what the position's pieces say (remask_merge.h) and judges it; then the block
// selects (remask_selection.h) and writes.
//
// What is known of the positions lies in shared memory, or, where a block is too long for that, in scratch:
// its arrays are read often and stay in the L1.
//
// Compiled for LONG 0 or 1: where the places are.
#include "remask_merge.h"
#include "remask_selection.h"

// --- one position, by a warp ----------------------------------------------------------------------------------------

__device__ inline float logit_at(const Remask& a, int64 b, int64 s, int64 token) {
    return number_at<float>(a.logits.data, a.logits_dtype,
                            b * a.logits.stride_b + s * a.logits.stride_s + token * a.logits_stride_v);
}

// The proposal: the caller's, the sample, or the argmax.
__device__ inline int64 proposal(const Remask& a, const Row& row, int64 b, int64 s, const Findings& f) {
    if (a.candidates) {
        const int64 given = a.candidates.at(b, s);
        if (given >= 0 && given < a.vocabulary) return given;
    }
    if (!row.sampled || !noise_matters(f.best, row.temperature)) return f.best_token;
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
    if (a.rank_noise) return a.rank_noise.at(b, s);
    return uniform(philox_word(stream_of(a, row, b, s), draw));
}

// What one position's logits come to: candidate, confidence, entropy, score; NaN where they are not usable. By one
// lane: whether the schedule has drawn it.
__device__ inline bool judge(const Remask& a, const Row& row, int64 b, int64 s, const Filter* filter,
                             const Pieces& pieces, const Places& place) {
    const bool tempered = a.options.statistics == RemaskChoice::filtered;
    const bool posterior = a.options.schedule == RemaskChoice::posterior;
    const double t = double(own_temperature(a, row));
    const Findings f = merged(pieces, t, row.sampled, a.options.score == RemaskChoice::margin);
    if (lane_id() == 0) {  // until it is known to be usable
        place.candidate[s] = -1;
        place.score[s] = place.confidence[s] = place.entropy[s] = __uint_as_float(0x7fc00000u);
    }
    if (f.wrong || f.mass == 0) return false;
    Posterior<float> q = {};
    if (posterior) q = posterior_of(a, row, f, filter, pieces);
    if (tempered && q.mask == infinity()) return false;  // nothing is left to tokens
    const int64 candidate = proposal(a, row, b, s, f);
    float z = candidate == f.best_token ? f.best : logit_at(a, b, s, candidate);
    const bool suppressed = (a.options.suppress_mask && candidate == a.mask_token_id) ||
                            is_listed(candidate, a.suppressed) || is_listed(candidate, a.unscored);
    if (suppressed || (tempered && row.filtered && !(z >= filter->least))) z = -infinity();
    if (lane_id() > 0) return false;

    const auto probability = [&](float logit) { return float(exp((double(logit) - double(f.top)) / t) / f.mass); };
    const float confidence = probability(z), entropy = float(log(f.mass) + f.drop / f.mass);
    double score = confidence;
    if (a.options.score == RemaskChoice::margin) score = probability(f.top) - probability(f.second);
    if (a.options.score == RemaskChoice::neg_entropy) score = -entropy;
    if (a.options.score == RemaskChoice::random) score = position_noise(a, row, b, s, ranking_draw);
    if (a.options.score == RemaskChoice::leftmost) score = -double(s);
    place.candidate[s] = int(candidate);
    place.confidence[s] = confidence;
    place.entropy[s] = entropy;
    place.score[s] = score;
    if (a.options.schedule == RemaskChoice::coin) return position_noise(a, row, b, s, ranking_draw) < row.leave;
    return posterior && position_noise(a, row, b, s, posterior_draw) < token_probability(q, row.temperature);
}

__device__ inline RemaskPosition position_of(const Remask& a, int64 b, int64 s, const Places& place) {
    const bool looked = place.has(s, Places::looked);
    RemaskPosition p;
    p.before = token_at(a, b, s);
    p.candidate = looked ? place.candidate[s] : -1;
    p.confidence = looked ? place.confidence[s] : 0;
    p.looked = looked;
    p.masked = place.has(s, Places::masked);
    return p;
}

// --- a sequence, by a block -----------------------------------------------------------------------------------------

// Whether a stretch owes its quota: the one before is committed to the fraction that the policy wants.
__device__ inline bool owes(const Remask& a, const Stretch& before, const Places& place) {
    if (!a.options.has_complete_threshold || before.end == before.begin) return true;
    const int length = count(before, place, Places::within);
    const int committed =
        count(before, [&](int i) { return place.has(i, Places::within) && !place.has(i, Places::masked); });
    return double(committed) >= a.bounds.complete_threshold * double(length);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    remask_select_kernel(const __grid_constant__ Remask a, const Filter* filters, const Partial* partials, int64 pieces,
                         uint64* scratch, int64 scratch_row) {
    SHARED_MEMORY(memory);
    const int64 b = blockIdx.x;
    const Stretch all = {0, int(a.block), true};
    const int warps = int(blockDim.x) / lanes;
    const Places place = places_at(LONG ? scratch + b * scratch_row : memory + 1, a.block);
    unsigned* left = reinterpret_cast<unsigned*>(memory);  // positions that are left to do
    Row row = row_of(a, b);
    row.leave = 0;
    if (a.options.schedule == RemaskChoice::coin || a.options.schedule == RemaskChoice::truncated ||
        a.options.schedule == RemaskChoice::posterior)
        row.leave = leave_probability(a, row.step, row.num_steps);

    if (threadIdx.x == 0) *left = 0;
    await_last();
#pragma unroll 1
    for (int s = warp_id(); s < all.end; s += warps) {
        const int64 at = b * a.block + s;
        const Pieces of_position(partials + at * pieces,
                                 pieces);  // read whether or not it is looked at: it is under way
        const bool is_looked = looked(a, b, s);
        bool drawn = false;
        if (is_looked) drawn = judge(a, row, b, s, filters + at, of_position, place);
        if (lane_id() > 0) continue;
        place.is[s] = (masked(a, b, s) ? Places::masked : 0u) | (is_looked ? Places::looked : 0u);
        const RemaskPosition p = position_of(a, b, s, place);
        place.is[s] |= (valid(a, b, s) ? Places::within : 0u) | (sent_back<float>(a, p) ? Places::returned : 0u) |
                       (waits<float>(a, p) ? Places::waiting : 0u) |
                       (usable<float>(a, a.mask_token_id, p) ? Places::usable : 0u) | (drawn ? Places::drawn : 0u);
    }
    __syncthreads();

    Selection selection(a, row, place);
    const int size = a.options.sub_block > 0 && a.options.sub_block < all.end ? int(a.options.sub_block) : all.end;
    if (a.bounds.position_penalty != 0) selection.penalize(all);
    selection.rank(all, size);
    const auto stretch_at = [&](int begin) {
        return Stretch{begin, begin + size < all.end ? begin + size : all.end, true};
    };
#pragma unroll 1
    for (int begin = warp_id() * size; begin < all.end; begin += warps * size) {
        Stretch stretch = stretch_at(begin);
        stretch.owes = owes(a, begin > 0 ? stretch_at(begin - size) : Stretch{0, 0, true}, place);
        selection.select(stretch);
#pragma unroll 1
        for (int i = begin + lane_id(); i < stretch.end; i += lanes) {
            const int64 at = b * a.block + i;
            const RemaskPosition p = position_of(a, b, i, place);
            const auto uniform = [&] { return position_noise(a, row, b, i, renoise_draw); };
            const RemaskOutcome o = outcome<float>(a, a.mask_token_id, a.vocabulary, p, place.taken(i), uniform);
            if (a.tokens_dtype == type_int64)
                static_cast<int64*>(a.tokens_out)[at] = o.token;
            else
                static_cast<int*>(a.tokens_out)[at] = int(o.token);
            a.transfer_mask[at] = o.written;
            a.candidate[at] = p.candidate;
            static_cast<float*>(a.confidence)[at] = float(p.confidence);
            static_cast<float*>(a.entropy)[at] = p.looked ? place.entropy[i] : 0;
            if (o.left) atomicAdd(left, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.num_masked[b] = *left;
        a.done[b] = a.options.renoise ? row.step >= row.num_steps - 1 : *left == 0;
    }
}
