// Stage B of a remasking step: candidates, scores, selection, results. A block for each sequence.
//
// First a warp for each position merges what the position's pieces say (remask_merge.h) and scores it; then the block
// selects (remask_selection.h) and writes.
//
// What is known of the positions lies in shared memory, or, where a block is too long for that, in scratch:
// its arrays are read often and stay in the L1.
//
// Compiled for LONG 0 or 1: where the positions are.
#include "remask_merge.h"
#include "remask_selection.h"

// --- one position, by a warp ----------------------------------------------------------------------------------------

__device__ inline float logit_at(const Remask& a, int64 b, int64 s, int64 token) {
    const RemaskLogits z = logits_of(a, b, s);
    return number_at<float>(z.data, a.logits_dtype, z.first + token * a.logits_stride_v);
}

// The proposal: the caller's, the sample, or the argmax.
__device__ inline int64 proposal(const Remask& a, const Row& row, int64 b, int64 s, const Summary& f) {
    if (a.candidates) {
        const int64 given = a.candidates.at(b, s);
        if (given >= 0 && given < a.vocabulary) return given;
    }
    if (a.options.standing) return token_at(a, b, s);
    if (!row.sampled || !noise_matters(f.best, row.temperature)) return f.best_token;
    const int64 first = drawn_token(f.drawn.first), second = drawn_token(f.drawn.second);
    if (!(drawn_value(f.drawn.first) - drawn_value(f.drawn.second) < 1e-4f)) return first;
    const Stream stream = token_stream(a, row, b, s);
    const auto exactly = [&](int64 token) {
        return double(logit_at(a, b, s, token)) / row.temperature + exact_gumbel(philox_word(stream, unsigned(token)));
    };
    const int64 low = first < second ? first : second, high = first < second ? second : first;
    return exactly(high) > exactly(low) ? high : low;
}

// The caller's number of a position, or the op's own.
__device__ inline double position_noise(const Remask& a, const Row& row, int64 b, int64 s, unsigned draw) {
    const bool own = draw == renoise_draw && renoises_by_itself(a.options);
    if (a.rank_noise && !own) return a.rank_noise.at(b, s);
    return uniform(philox_word(stream_of(a.seed[b], a.offset[b], row.step, s), draw));
}

// What one position's logits come to: candidate, confidence, entropy, score; NaN where they are not usable. By one
// lane: whether the schedule has drawn it.
__device__ inline bool evaluate(const Remask& a, const Row& row, int64 b, int64 s, const Filter* filter,
                                const Pieces& pieces, const Positions& positions) {
    const bool tempered = a.options.statistics == RemaskChoice::filtered;
    const bool posterior = a.options.schedule == RemaskChoice::posterior;
    const double t = double(own_temperature(a, row));
    const Summary f = merged(pieces, t, row.sampled, a.options.score == RemaskChoice::margin);
    if (lane_id() == 0) {  // until it is known to be usable
        positions.candidate[s] = -1;
        positions.score[s] = positions.confidence[s] = positions.entropy[s] = __uint_as_float(0x7fc00000u);
    }
    if (f.wrong || f.mass == 0) return false;
    const int64 before = token_at(a, b, s);
    if (asks_for_standing(a.options) && (before < 0 || before >= a.vocabulary)) return false;
    Posterior<float> q = {};
    if (posterior) q = posterior_of(a, row, f, filter, pieces);
    if (tempered && q.mask == infinity()) return false;  // nothing is left to tokens
    int64 candidate = proposal(a, row, b, s, f);
    const auto probability = [&](float logit) { return float(exp((double(logit) - double(f.top)) / t) / f.mass); };
    const auto scored_logit = [&](int64 token) {  // by the warp: as the statistics see it
        const float z = token == f.best_token ? f.best : logit_at(a, b, s, token);
        const bool suppressed = (a.options.suppress_mask && token == a.mask_token_id) ||
                                is_listed(token, a.suppressed) || is_listed(token, a.unscored);
        return suppressed || (tempered && row.filtered && !(z >= filter->least)) ? -infinity() : z;
    };
    bool drawn = false;
    if (a.options.schedule == RemaskChoice::uniform) {
        const RemaskDraw draw =
            uniform_draw(a, row.clean, row.step >= row.num_steps - 1, double(probability(scored_logit(before))),
                         position_noise(a, row, b, s, posterior_draw));
        if (draw == draws_standing) candidate = before;
        drawn = draw != draws_noise;
    }
    const float z = scored_logit(candidate);
    if (lane_id() > 0) return false;

    const float confidence = probability(z), entropy = float(log(f.mass) + f.drop / f.mass);
    double score = confidence;
    if (a.options.score == RemaskChoice::margin) score = probability(f.top) - probability(f.second);
    if (a.options.score == RemaskChoice::neg_entropy) score = -entropy;
    if (a.options.score == RemaskChoice::random) score = position_noise(a, row, b, s, ranking_draw);
    if (a.options.score == RemaskChoice::top) score = probability(f.top);
    if (a.options.score == RemaskChoice::gap) score = (z - f.top) / own_temperature(a, row);
    if (a.options.score == RemaskChoice::leftmost) score = -double(s);
    positions.candidate[s] = int(candidate);
    positions.confidence[s] = confidence;
    positions.entropy[s] = entropy;
    positions.score[s] = score;
    if (a.options.schedule == RemaskChoice::coin) return position_noise(a, row, b, s, ranking_draw) < row.leave;
    if (posterior) return position_noise(a, row, b, s, posterior_draw) < token_probability(q, row.temperature);
    return drawn;
}

__device__ inline RemaskPosition position_of(const Remask& a, int64 b, int64 s, const Positions& positions) {
    const bool looked = positions.has(s, Positions::looked);
    RemaskPosition p;
    p.before = token_at(a, b, s);
    p.candidate = looked ? positions.candidate[s] : -1;
    p.confidence = looked ? positions.confidence[s] : 0;
    p.looked = looked;
    p.masked = positions.has(s, Positions::masked);
    return p;
}

// --- a sequence, by a block -----------------------------------------------------------------------------------------

// Whether a stretch's quota is due: the one before is committed to the fraction that the policy wants.
__device__ inline bool due(const Remask& a, const Stretch& before, const Positions& positions) {
    if (!a.options.has_complete_threshold || before.end == before.begin) return true;
    const int length = count(before, positions, Positions::within);
    const int committed = count(
        before, [&](int i) { return positions.has(i, Positions::within) && !positions.has(i, Positions::masked); });
    return double(committed) >= a.bounds.complete_threshold * double(length);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    remask_select_kernel(const __grid_constant__ Remask a, const Filter* filters, const Partial* partials, int64 pieces,
                         uint64* scratch, int64 scratch_row) {
    SHARED_MEMORY(memory);
    const int64 b = blockIdx.x;
    const Stretch all = {0, int(a.block), true};
    const int warps = int(blockDim.x) / lanes;
    const Positions positions = positions_at(LONG ? scratch + b * scratch_row : memory + 1, a.block);
    unsigned* left = reinterpret_cast<unsigned*>(memory);  // positions that are left to do
    Row row = row_of(a, b);
    row.leave = 0;
    if (a.options.schedule == RemaskChoice::coin || a.options.schedule == RemaskChoice::truncated ||
        a.options.schedule == RemaskChoice::posterior)
        row.leave = leave_probability(a, row.step, row.num_steps);
    row.clean = {};
    if (a.options.schedule == RemaskChoice::uniform) row.clean = clean_fractions(a, row.step, row.num_steps);

    if (threadIdx.x == 0) *left = 0;
    await_last();
#pragma unroll 1
    for (int s = warp_id(); s < all.end; s += warps) {
        const int64 at = b * a.block + s;
        const Pieces of_position(partials + at * pieces,
                                 pieces);  // read whether or not it is looked at: it is under way
        const bool is_looked = looked(a, b, s);
        bool drawn = false;
        if (is_looked) drawn = evaluate(a, row, b, s, filters + at, of_position, positions);
        if (lane_id() > 0) continue;
        positions.is[s] = (masked(a, b, s) ? Positions::masked : 0u) | (is_looked ? Positions::looked : 0u);
        const RemaskPosition p = position_of(a, b, s, positions);
        const bool within = valid(a, b, s);
        const bool counted = a.options.schedule_base == RemaskChoice::of_editable ? reaches(a, b, s) : within;
        positions.is[s] |=
            (within ? Positions::within : 0u) | (counted ? Positions::counted : 0u) |
            (sent_back<float>(a, p) ? Positions::returned : 0u) | (waits<float>(a, p) ? Positions::waiting : 0u) |
            (usable<float>(a, a.mask_token_id, p) ? Positions::usable : 0u) | (drawn ? Positions::drawn : 0u);
    }
    __syncthreads();

    Selection selection(a, row, positions);
    const int size = a.options.sub_block > 0 && a.options.sub_block < all.end ? int(a.options.sub_block) : all.end;
    if (a.bounds.position_penalty != 0) selection.penalize(all);
    if (a.bounds.rank_temperature > 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < all.end; i += blockDim.x)
            positions.score[i] = noisy_score(a, positions.score[i], position_noise(a, row, b, i, ranking_draw));
        __syncthreads();
    }
    selection.rank(all, size);
    const auto stretch_at = [&](int begin) {
        return Stretch{begin, begin + size < all.end ? begin + size : all.end, true};
    };
#pragma unroll 1
    for (int begin = warp_id() * size; begin < all.end; begin += warps * size) {
        Stretch stretch = stretch_at(begin);
        stretch.due = due(a, begin > 0 ? stretch_at(begin - size) : Stretch{0, 0, true}, positions);
        selection.select(stretch);
#pragma unroll 1
        for (int i = begin + lane_id(); i < stretch.end; i += lanes) {
            const int64 at = b * a.block + i;
            const RemaskPosition p = position_of(a, b, i, positions);
            const auto uniform = [&] { return position_noise(a, row, b, i, renoise_draw); };
            const RemaskOutcome o = outcome<float>(a, a.mask_token_id, a.vocabulary, p, positions.taken(i), uniform);
            if (a.tokens_dtype == type_int64)
                static_cast<int64*>(a.tokens_out)[at] = o.token;
            else
                static_cast<int*>(a.tokens_out)[at] = int(o.token);
            a.transfer_mask[at] = o.written;
            a.candidate[at] = p.candidate;
            static_cast<float*>(a.confidence)[at] = float(p.confidence);
            static_cast<float*>(a.entropy)[at] = p.looked ? positions.entropy[i] : 0;
            if (o.left) atomicAdd(left, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.num_masked[b] = *left;
        a.done[b] = a.options.renoise ? row.step >= row.num_steps - 1 : *left == 0;
    }
}
