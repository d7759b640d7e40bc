// Stage B of a remasking step: candidates, scores, selection, results. A block for each sequence.
//
// First a warp for each position merges what the position's pieces say, a lane for each piece, and judges it. Then a
// warp for each stretch of positions (one, unless the policy has sub-blocks) ranks its positions, finds how many this
// step commits and which, and writes. Blocks have some dozens of positions, so a rank is counted, not sorted for: every
// lane asks for its positions how many of the others come before.
//
// Everything is double here, as in the CPU's kernel. Where the definition compares in float32, values and bounds are
// floats, and each operation on them is rounded to float again: exact for sums, products and quotients of two floats.
//
// Predicted, not measured: 3 us on an H200 for 16 positions of 131072 tokens, most of it the launch, one wait for the
// partials and one for the exponentials of doubles that scale them.
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
enum : unsigned { within = 1, waiting = 2, usable = 4, drawn = 8 };

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
__device__ inline double position_noise(const Remask& a, const Row& row, int64 b, int64 s) {
    if (a.rank_noise) return a.rank_noise[b * a.rank_noise_row + s * a.rank_noise_place];
    return uniform(philox_word(stream_of(a, row, b, s), ranking_draw));
}

// What one position's logits come to: candidate, confidence, entropy, score; NaN where they are not usable.
__device__ inline void judge(const Remask& a, const Row& row, int64 b, int64 s, const float* least_kept,
                             const Partial* partials, int64 pieces, const Places& place) {
    const bool tempered = a.options.statistics == RemaskChoice::filtered;
    const double t = double(own_temperature(a, row));
    const Findings f = merged(partials, pieces, t);
    if (lane_id() == 0) {  // until it is known to be usable
        place.candidate[s] = -1;
        place.score[s] = place.confidence[s] = place.entropy[s] = __uint_as_float(0x7fc00000u);
    }
    if (f.wrong || f.mass == 0) return;
    const int64 candidate = proposal(a, row, b, s, f);
    float z = candidate == f.best_token ? f.best : logit_at(a, b, s, candidate);
    const bool suppressed = (a.options.suppress_mask && candidate == a.mask) ||
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
    if (a.options.score == RemaskChoice::random) score = position_noise(a, row, b, s);
    if (a.options.score == RemaskChoice::leftmost) score = -double(s);
    const bool coin = a.options.schedule == RemaskChoice::coin && position_noise(a, row, b, s) < row.leave;
    const bool sits_out = a.options.skip_mask_candidates && candidate == a.mask;
    place.candidate[s] = int(candidate);
    place.confidence[s] = confidence;
    place.entropy[s] = entropy;
    place.score[s] = score;
    place.is[s] |= (sits_out ? 0 : usable) | (coin ? drawn : 0);
}

// --- one stretch of positions, by a warp ----------------------------------------------------------------------------

struct Stretch {
    int begin, end;
    bool owes;  // false: it waits for the one before
};

// Sum over the places of a stretch.
template <class F>
__device__ inline int count(const Stretch& stretch, F is) {
    int sum = 0;
#pragma unroll 1
    for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) sum += is(i);
    return warp_sum(sum);
}
// The first place, or lowest number, over the places of a stretch; ~0u if there is none.
template <class F>
__device__ inline unsigned lowest(const Stretch& stretch, F number_of) {
    unsigned least = ~0u;
#pragma unroll 1
    for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
        const unsigned own = number_of(i);
        if (own < least) least = own;
    }
    return __reduce_min_sync(whole_warp, least);
}

class Selection {
   public:
    __device__ Selection(const Remask& a, const Row& row, const Places& place) : a_(a), row_(row), place_(place) {
        exact_score_ = a.options.score == RemaskChoice::random || a.options.score == RemaskChoice::leftmost;
        exact_value_ = a.options.gate_on == RemaskChoice::on_score && exact_score_;
    }

    // The score loses by the distance to the first place of the row that waits.
    __device__ void penalize(const Stretch& stretch, const Stretch& all) const {
        const auto waits_at = [&](int i) { return place_.has(i, waiting) ? unsigned(i) : ~0u; };
        const unsigned found = lowest(all, waits_at);
        const int first = found == ~0u ? all.end : int(found);
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            // the product is float32 in the definition, whatever the score is
            const double less = place_.score[i] - double(float(a_.bounds.position_penalty) * float(i - first));
            place_.score[i] = exact_score_ ? less : double(float(less));
        }
        __syncwarp();
    }

    // Ranks the usable places: by score, then by place. Returns how many there are.
    __device__ int rank(const Stretch& stretch) const {
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            if (!place_.has(i, usable)) continue;
            int before = 0;
#pragma unroll 4
            for (int j = stretch.begin; j < stretch.end; ++j) {
                const double other = place_.score[j];
                const bool better = other > place_.score[i] || (other == place_.score[i] && j < i);
                before += place_.has(j, usable) && better;
            }
            place_.rank[i] = before;
            place_.order[stretch.begin + before] = i;
        }
        __syncwarp();
        return count(stretch, [&](int i) { return place_.has(i, usable); });
    }

    // Marks the places that are good enough by themselves.
    __device__ void gate(const Stretch& stretch, int count_usable) const {
        const RemaskOptions& options = a_.options;
        const double bound = as_value(row_.gate_bound);
        double least = bound;      // of the value, with a threshold
        int prefix = stretch.end;  // of the ranks, with the other gates
        if (options.gate == RemaskChoice::threshold && options.has_gate_slack && count_usable > 0)
            least = slackened(stretch, bound);
        if (options.gate == RemaskChoice::factor) {
            const unsigned fails = lowest(stretch, [&](int i) {
                const int rank = place_.has(i, usable) ? place_.rank[i] : 0;
                const double slack = as_value(bound / double(rank + 2));
                return rank > 0 && !(value(i) >= as_value(1 - slack)) ? unsigned(rank) : ~0u;
            });
            prefix = fails == ~0u ? count_usable : int(fails);
            if (options.factor_last_free && prefix == count_usable - 1) prefix = count_usable;
        }
        if (options.gate == RemaskChoice::entropy_sum) {
            double sum = 0;
#pragma unroll 1
            for (prefix = 0; prefix < count_usable; ++prefix) {
                const double with = sum + double(place_.entropy[place_.order[stretch.begin + prefix]]);
                const double spent = options.entropy_includes_self ? with : sum;
                if (!(options.strict ? spent < row_.gate_bound : spent <= row_.gate_bound)) break;
                sum = with;
            }
        }
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            bool good = options.gate != RemaskChoice::no_gate && place_.rank[i] < prefix;
            if (options.gate == RemaskChoice::threshold) good = options.strict ? value(i) > least : value(i) >= least;
            if (options.has_run_threshold)
                good = good || (place_.has(i, usable) && best_of_run(stretch, i) &&
                                value(i) > as_value(a_.bounds.run_threshold));
            place_.good[i] = good && place_.has(i, usable);
        }
        __syncwarp();
    }

    // What `chosen` has to know of a stretch.
    __device__ void prepare(const Stretch& stretch) {
        if (finishes() || a_.options.schedule == RemaskChoice::coin) return;
        const int waits = count(stretch, [&](int i) { return place_.has(i, waiting); });
        const int length = count(stretch, [&](int i) { return place_.has(i, within); });
        passed_ = count(stretch, [&](int i) { return place_.good[i]; });
        first_ = lowest(stretch, [&](int i) { return place_.has(i, waiting) ? unsigned(i) : ~0u; });
        least_ = stretch.owes ? a_.options.min_commits : 0;
        owed_ = 0;
        if (!stretch.owes) return;
        const int64 initial = infers_initial(a_, row_) ? inferred_initial(waits, length) : row_.initial;
        owed_ = quota(a_, row_, initial, waits, length);
        if (owed_ < least_) owed_ = least_;
    }
    // Whether a usable place takes its candidate.
    __device__ bool chosen(const Stretch& stretch, int i) const {
        const RemaskOptions& options = a_.options;
        const bool good = place_.good[i];
        if (finishes()) return true;
        if (options.schedule == RemaskChoice::coin) return good || place_.has(i, drawn);
        const int rank = place_.rank[i];
        const bool scheduled = options.window ? i - int64(first_) < owed_ : rank < owed_;
        if (options.combine == RemaskChoice::cap) return (good && scheduled) || rank < least_;
        if (options.combine == RemaskChoice::either) return good || scheduled;
        if (options.window) return passed_ >= owed_ ? good : scheduled;
        if (good) return true;  // then the best of the others up to what is owed
        int64 before = passed_;
#pragma unroll 4
        for (int j = stretch.begin; j < stretch.end; ++j)
            before += place_.has(j, usable) && !place_.good[j] && place_.rank[j] < rank;
        return before < owed_;
    }

   private:
    __device__ bool finishes() const { return a_.options.finish && row_.step >= row_.num_steps - 1; }
    __device__ double value(int i) const {
        return a_.options.gate_on == RemaskChoice::on_score ? place_.score[i] : double(place_.confidence[i]);
    }
    __device__ double as_value(double x) const { return exact_value_ ? x : double(float(x)); }

    // The bound, at most the row's best value less the slack.
    __device__ double slackened(const Stretch& stretch, double bound) const {
        uint64 best = 0;
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            const uint64 own = place_.has(i, usable) ? ordered(value(i)) : 0;
            if (own > best) best = own;
        }
        const double below = as_value(number(warp_max(best)) - as_value(a_.bounds.gate_slack));
        return below < bound ? below : bound;
    }

    // Whether a usable place has the best rank among the usable ones adjacent to it, and those adjacent to them.
    __device__ bool best_of_run(const Stretch& stretch, int i) const {
        bool best = true;
#pragma unroll 1
        for (int j = i; j >= stretch.begin && place_.has(j, usable); --j) best &= place_.rank[j] >= place_.rank[i];
#pragma unroll 1
        for (int j = i; j < stretch.end && place_.has(j, usable); ++j) best &= place_.rank[j] >= place_.rank[i];
        return best;
    }

    // The smallest n0 that leaves what waits after the steps so far, a lane for each.
    __device__ int64 inferred_initial(int64 waits, int64 length) const {
#pragma unroll 1
        for (int64 from = waits; from <= length; from += lanes) {
            const int64 initial = from + lane_id();
            const bool enough = initial <= length && leaves_enough(a_, row_, initial, waits);
            const unsigned found = __ballot_sync(whole_warp, enough);
            if (found) return from + __ffs(int(found)) - 1;
        }
        return length;
    }

    const Remask& a_;
    const Row& row_;
    const Places& place_;
    bool exact_score_, exact_value_;
    int passed_ = 0;
    unsigned first_ = 0;
    int64 least_ = 0, owed_ = 0;
};

// Whether stretch k owes its quota: the one before is committed to the fraction that the policy wants.
__device__ inline bool owes(const Remask& a, int64 b, const Stretch& before, const Places& place) {
    if (!a.options.has_complete_threshold || before.end == before.begin) return true;
    const int committed = count(before, [&](int i) { return place.has(i, within) && token_at(a, b, i) != a.mask; });
    const int length = count(before, [&](int i) { return place.has(i, within); });
    return double(committed) >= a.bounds.complete_threshold * double(length);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    remask_select_kernel(const void* logits, REMASK_PARAMETERS const float* least_kept, const Partial* partials,
                         int64 pieces, void* tokens_out, bool* transfer_mask, int64* candidate, float* confidence,
                         float* entropy, int64* num_masked, bool* done) {
    SHARED_MEMORY(memory);
    const Remask a = REMASK_ARGUMENTS;
    const int64 b = blockIdx.x;
    const int all = int(a.block), warps = int(blockDim.x) / lanes;
    const Places place = places_at(memory + 1, a.block);
    unsigned* left = reinterpret_cast<unsigned*>(memory);  // masks that stay
    Row row = row_of(a, b);
    row.leave = 0;
    if (a.options.schedule == RemaskChoice::coin || a.options.schedule == RemaskChoice::truncated)
        row.leave = leave_probability(a, row.step, row.num_steps);

    if (threadIdx.x == 0) *left = 0;
#pragma unroll 1
    for (int s = warp_id(); s < all; s += warps) {
        const bool looked = waits(a, b, s);
        if (lane_id() == 0) place.is[s] = (valid(a, b, s) ? within : 0) | (looked ? waiting : 0);
        const int64 position = b * a.block + s;
        if (looked) judge(a, row, b, s, least_kept + position, partials + position * pieces, pieces, place);
    }
    __syncthreads();

    Selection selection(a, row, place);
    const int size = a.options.sub_block > 0 && a.options.sub_block < all ? int(a.options.sub_block) : all;
    const auto stretch_at = [&](int begin) { return Stretch{begin, begin + size < all ? begin + size : all, true}; };
#pragma unroll 1
    for (int begin = warp_id() * size; begin < all; begin += warps * size) {
        Stretch stretch = stretch_at(begin);
        stretch.owes = owes(a, b, begin > 0 ? stretch_at(begin - size) : Stretch{0, 0, true}, place);
        if (a.bounds.position_penalty != 0) selection.penalize(stretch, Stretch{0, all, true});
        const int count_usable = selection.rank(stretch);
        selection.gate(stretch, count_usable);
        selection.prepare(stretch);
#pragma unroll 1
        for (int i = begin + lane_id(); i < stretch.end; i += lanes) {
            const int64 at = b * a.block + i, before = token_at(a, b, i);
            const bool looked = place.has(i, waiting), takes = place.has(i, usable) && selection.chosen(stretch, i);
            const int64 after = takes ? place.candidate[i] : before;
            if (a.tokens_type == type_int64)
                static_cast<int64*>(tokens_out)[at] = after;
            else
                static_cast<int*>(tokens_out)[at] = int(after);
            transfer_mask[at] = takes;
            candidate[at] = looked ? place.candidate[i] : -1;
            confidence[at] = looked ? place.confidence[i] : 0;
            entropy[at] = looked ? place.entropy[i] : 0;
            if (looked && after == a.mask) atomicAdd(left, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        num_masked[b] = *left;
        done[b] = *left == 0;
    }
}
