// Stage B of a remasking step: candidates, scores, selection, results. A block for each sequence.
//
// First a warp for each position judges it (remask_judge.h). Then a warp for each stretch of positions (one, unless the
// policy has sub-blocks) ranks its positions, finds how many this step commits and which, and writes. Blocks have some
// dozens of positions, so a rank is counted, not sorted for: every lane asks for its positions how many of the others
// come before.
//
// Everything is double here, as in the CPU's kernel. Where the definition compares in float32, values and bounds are
// floats, and each operation on them is rounded to float again: exact for sums, products and quotients of two floats.
//
// Predicted, not measured: 3 us on an H200 for 16 positions of 131072 tokens, most of it the launch, one wait for the
// partials and one for the exponentials of doubles that scale them.
#include "remask_judge.h"

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
        if (finishes() || by_draw()) return;
        const int waits = count(stretch, [&](int i) { return place_.has(i, waiting); });
        const int length = count(stretch, [&](int i) { return place_.has(i, within); });
        passed_ = count(stretch, [&](int i) { return place_.good[i]; });
        first_ = lowest(stretch, [&](int i) { return place_.has(i, waiting) ? unsigned(i) : ~0u; });
        least_ = 0;
        if (stretch.owes)
            least_ = a_.options.min_commits + count(stretch, [&](int i) { return place_.has(i, sent_back); });
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
        if (by_draw()) return good || place_.has(i, drawn);
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
    __device__ bool by_draw() const { return a_.options.schedule == RemaskChoice::coin || is_posterior(a_); }
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
    const int committed = count(before, [&](int i) { return place.has(i, within) && !is_mask(a, b, i); });
    const int length = count(before, [&](int i) { return place.has(i, within); });
    return double(committed) >= a.bounds.complete_threshold * double(length);
}

// What becomes of a position: its token, and whether it took its candidate.
struct Outcome {
    int64 token;
    bool written, rejected;  // rejected: it became noise instead
};
__device__ inline Outcome outcome(const Remask& a, const Row& row, int64 b, int i, const Places& place, bool takes) {
    const int64 before = token_at(a, b, i), candidate = place.candidate[i];
    const bool committed = place.has(i, looked) && !is_mask(a, b, i), returns = place.has(i, sent_back);
    const bool edited = a.options.has_edit_threshold && committed && !returns &&
                        place.confidence[i] > float(a.bounds.edit_threshold) && candidate != before;
    Outcome out = {before, takes || edited, a.options.renoise && place.has(i, usable) && !takes};
    if (out.written)
        out.token = candidate;
    else if (returns)
        out.token = a.mask;
    if (out.rejected) out.token = int64(position_noise(a, row, b, i, renoise_draw) * double(a.vocabulary));
    return out;
}

extern "C" __global__ void __launch_bounds__(512, 1)
    remask_select_kernel(const void* logits, REMASK_PARAMETERS const float* least_kept, const float* of_masks,
                         const Partial* partials, int64 pieces, void* tokens_out, bool* transfer_mask, int64* candidate,
                         float* confidence, float* entropy, int64* num_masked, bool* done) {
    SHARED_MEMORY(memory);
    const Remask a = REMASK_ARGUMENTS;
    const int64 b = blockIdx.x;
    const int all = int(a.block), warps = int(blockDim.x) / lanes;
    const Places place = places_at(memory + 1, a.block);
    unsigned* left = reinterpret_cast<unsigned*>(memory);  // masks that stay, or positions that became noise
    Row row = row_of(a, b);
    row.leave = 0;
    if (a.options.schedule == RemaskChoice::coin || a.options.schedule == RemaskChoice::truncated || is_posterior(a))
        row.leave = leave_probability(a, row.step, row.num_steps);

    if (threadIdx.x == 0) *left = 0;
#pragma unroll 1
    for (int s = warp_id(); s < all; s += warps) {
        const bool looks_there = looks(a, b, s), masked = is_mask(a, b, s);
        if (lane_id() == 0) {
            const bool waits = looks_there && (masked || a.options.renoise);
            place.is[s] = (valid(a, b, s) ? within : 0) | (looks_there ? looked : 0) | (waits ? waiting : 0);
        }
        const int64 position = b * a.block + s;
        if (looks_there)
            judge(a, row, b, s, least_kept + position, of_masks + position, partials + position * pieces, pieces,
                  place);
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
            const int64 at = b * a.block + i;
            const bool is_looked_at = place.has(i, looked);
            const bool takes = place.has(i, usable) && selection.chosen(stretch, i);
            const Outcome out = outcome(a, row, b, i, place, takes);
            if (a.tokens_type == type_int64)
                static_cast<int64*>(tokens_out)[at] = out.token;
            else
                static_cast<int*>(tokens_out)[at] = int(out.token);
            transfer_mask[at] = out.written;
            candidate[at] = is_looked_at ? place.candidate[i] : -1;
            confidence[at] = is_looked_at ? place.confidence[i] : 0;
            entropy[at] = is_looked_at ? place.entropy[i] : 0;
            if (a.options.renoise ? out.rejected : is_looked_at && out.token == a.mask) atomicAdd(left, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        num_masked[b] = *left;
        done[b] = a.options.renoise ? row.step >= row.num_steps - 1 : *left == 0;
    }
}
