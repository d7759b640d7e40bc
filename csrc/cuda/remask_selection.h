// What a step chooses: the scores of a sequence's positions become the positions that take their candidates
// (reference/remask_select.py).
//
// Positions are ranked by all threads: each asks for its positions how many of the others come before, which for the
// some dozens of positions of a block is less than sorting (docs/gpu_kernels.md has what thousands cost). Then a warp
// for each stretch of positions (one, unless the policy has sub-blocks) finds how many this step commits, and which.
//
// Everything is double here, as in the CPU's kernel. Where the definition compares in float32, values and bounds are
// floats, and each operation on them is rounded to float again: exact for sums, products and quotients of two floats.
#pragma once

#include "remask.h"

// What selection knows of a position; arrays of a block's length, 36 bytes a position (_POSITION_BYTES in
// twotower_kernels/cuda/remask.py).
struct Positions {
    double* score;
    float *confidence, *entropy;
    int *candidate, *rank;
    int* order;      // of a stretch: its usable positions, best first
    unsigned* is;    // bits that are fixed before selection
    unsigned* fate;  // bits that selection sets

    __device__ bool has(int64 s, unsigned what) const { return is[s] & what; }
    __device__ bool good(int64 s) const { return fate[s] & passed; }
    __device__ bool taken(int64 s) const { return fate[s] & chosen; }

    enum : unsigned {
        within = 1,
        masked = 2,
        looked = 4,
        returned = 8,
        waiting = 16,
        usable = 32,
        drawn = 64,
        counted = 128
    };
    enum : unsigned { passed = 1, chosen = 2 };  // by the gate; by the step
};

__device__ inline Positions positions_at(uint64* memory, int64 block) {
    Positions p;
    p.score = reinterpret_cast<double*>(memory);
    p.confidence = reinterpret_cast<float*>(p.score + block);
    p.entropy = p.confidence + block;
    p.candidate = reinterpret_cast<int*>(p.entropy + block);
    p.rank = p.candidate + block;
    p.order = p.rank + block;
    p.is = reinterpret_cast<unsigned*>(p.order + block);
    p.fate = p.is + block;
    return p;
}

struct Stretch {
    int begin, end;
    bool due;  // false: it waits for the one before
};

// By a warp: how many positions of a stretch are so. Votes, of which a stretch of up to 32 takes one.
template <class F>
__device__ inline int count(const Stretch& stretch, F is) {
    int sum = 0;
#pragma unroll 1
    for (int base = stretch.begin; base < stretch.end; base += lanes) {
        const int i = base + lane_id();
        sum += __popc(__ballot_sync(whole_warp, i < stretch.end && is(i)));
    }
    return sum;
}
__device__ inline int count(const Stretch& stretch, const Positions& positions, unsigned what) {
    return count(stretch, [&](int i) { return positions.has(i, what); });
}
// The first position, or lowest number, over the positions of a stretch; ~0u if there is none.
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
    __device__ Selection(const Remask& a, const Row& row, const Positions& positions)
        : a_(a), row_(row), positions_(positions) {
        exact_score_ = a.options.score == RemaskChoice::random || a.options.score == RemaskChoice::leftmost;
        exact_value_ = a.options.gate_on == RemaskChoice::on_score && exact_score_;
    }

    // By a block: every score loses by the distance to the first position of the row that waits.
    __device__ void penalize(const Stretch& all) const {
        const unsigned found = first_waiting(all);
        const int first = found == ~0u ? all.end : int(found);
#pragma unroll 1
        for (int i = threadIdx.x; i < all.end; i += blockDim.x) {
            // the product is float32 in the definition, whatever the score is
            const double less = positions_.score[i] - double(float(a_.bounds.position_penalty) * float(i - first));
            positions_.score[i] = exact_score_ ? less : double(float(less));
        }
        __syncthreads();
    }

    // By a block: ranks the usable positions of each stretch of `size`, by score, then by position.
    __device__ void rank(const Stretch& all, int size) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < all.end; i += blockDim.x) {
            positions_.fate[i] = 0;
            if (!positions_.has(i, Positions::usable)) continue;
            const int begin = i - i % size, end = begin + size < all.end ? begin + size : all.end;
            int before = 0;
#pragma unroll 4
            for (int j = begin; j < end; ++j) {
                const double other = positions_.score[j];
                const bool better = other > positions_.score[i] || (other == positions_.score[i] && j < i);
                before += positions_.has(j, Positions::usable) && better;
            }
            positions_.rank[i] = before;
            positions_.order[begin + before] = i;
        }
        __syncthreads();
    }

    // By a warp: marks what this step commits of a stretch.
    __device__ void select(const Stretch& stretch) {
        const int count_usable = count(stretch, positions_, Positions::usable);
        gate(stretch, count_usable);
        find_quota(stretch);
        __syncwarp();      // whose position is whose changes: by position so far, by rank from now on
        int64 others = 0;  // that did not pass, of better ranks than those that are looked at
#pragma unroll 1
        for (int base = 0; base < count_usable; base += lanes) {
            const int rank = base + lane_id();
            const int i = rank < count_usable ? positions_.order[stretch.begin + rank] : -1;
            const bool good = i >= 0 && positions_.good(i);
            const unsigned not_good = __ballot_sync(whole_warp, i >= 0 && !good);
            const int64 before = passed_ + others + __popc(not_good & ((1u << lane_id()) - 1));
            if (i >= 0 && takes(i, rank, good, before)) positions_.fate[i] |= Positions::chosen;
            others += __popc(not_good);
        }
        __syncwarp();
    }

   private:
    __device__ bool finishes() const { return a_.options.finish && row_.step >= row_.num_steps - 1; }
    __device__ double value(int i) const {
        return a_.options.gate_on == RemaskChoice::on_score ? positions_.score[i] : double(positions_.confidence[i]);
    }
    __device__ double as_value(double x) const { return exact_value_ ? x : double(float(x)); }
    __device__ unsigned first_waiting(const Stretch& stretch) const {
        return lowest(stretch, [&](int i) { return positions_.has(i, Positions::waiting) ? unsigned(i) : ~0u; });
    }

    // Marks the positions that are good enough by themselves.
    __device__ void gate(const Stretch& stretch, int count_usable) const {
        const RemaskOptions& options = a_.options;
        const double bound = as_value(row_.gate_bound);
        double least = bound;      // of the value, with a threshold
        int prefix = stretch.end;  // of the ranks, with the other gates
        if (options.gate == RemaskChoice::threshold && options.has_gate_slack && count_usable > 0)
            least = slackened(stretch, bound);
        const bool by_factor = options.gate == RemaskChoice::factor;
        if (by_factor || options.gate == RemaskChoice::prefix) {
            const unsigned fails = lowest(stretch, [&](int i) {
                const int rank = positions_.has(i, Positions::usable) ? positions_.rank[i] : -1;
                const double asked = by_factor ? as_value(1 - as_value(bound / double(rank + 2))) : bound;
                const bool good = !by_factor && options.strict ? value(i) > asked : value(i) >= asked;
                return rank < int(by_factor) || good ? ~0u : unsigned(rank);
            });
            prefix = fails == ~0u ? count_usable : int(fails);
            if (by_factor && options.factor_last_free && prefix == count_usable - 1) prefix = count_usable;
        }
        if (options.gate == RemaskChoice::entropy_sum) {
            double sum = 0;
#pragma unroll 1
            for (prefix = 0; prefix < count_usable; ++prefix) {
                const double with = sum + double(positions_.entropy[positions_.order[stretch.begin + prefix]]);
                const double spent = options.entropy_includes_self ? with : sum;
                if (!(options.strict ? spent < row_.gate_bound : spent <= row_.gate_bound)) break;
                sum = with;
            }
        }
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            if (!positions_.has(i, Positions::usable)) continue;
            bool good = options.gate != RemaskChoice::no_gate && positions_.rank[i] < prefix;
            if (options.gate == RemaskChoice::threshold) good = options.strict ? value(i) > least : value(i) >= least;
            if (options.has_run_threshold)
                good = good || (best_of_run(stretch, i) && value(i) > as_value(a_.bounds.run_threshold));
            if (good) positions_.fate[i] |= Positions::passed;
        }
    }

    // What `takes` has to know of a stretch.
    __device__ void find_quota(const Stretch& stretch) {
        if (draws() || finishes()) return;
        passed_ = count(stretch, [&](int i) { return positions_.good(i); });
        least_ = quota_ = 0;
        first_ = first_waiting(stretch);
        if (!stretch.due) return;
        const int waits = count(stretch, positions_, Positions::waiting),
                  length = count(stretch, positions_, Positions::counted);
        const int64 initial = infers_initial(a_, row_) ? inferred_initial(waits, length) : row_.initial;
        least_ = a_.options.min_commits + count(stretch, positions_, Positions::returned);
        quota_ = quota(a_, row_, initial, waits, length);
        if (quota_ < least_) quota_ = least_;
    }
    // The schedules by which every position is drawn by itself.
    __device__ bool draws() const {
        return a_.options.schedule == RemaskChoice::coin || a_.options.schedule == RemaskChoice::posterior ||
               a_.options.schedule == RemaskChoice::uniform;
    }

    // Whether a usable position takes its candidate. before: those that passed, and the others of better ranks.
    __device__ bool takes(int i, int rank, bool good, int64 before) const {
        const RemaskOptions& options = a_.options;
        if (finishes()) return true;
        if (draws()) return good || positions_.has(i, Positions::drawn);
        const bool scheduled = options.window ? i - int64(first_) < quota_ : rank < quota_;
        if (options.combine == RemaskChoice::cap) return (good && scheduled) || rank < least_;
        if (options.combine == RemaskChoice::either) return good || scheduled;
        if (options.window) return passed_ >= quota_ ? good : scheduled;
        return good || before < quota_;  // those that passed, then the best of the others up to the quota
    }

    // The bound, at most the row's best value less the slack.
    __device__ double slackened(const Stretch& stretch, double bound) const {
        uint64 best = 0;
#pragma unroll 1
        for (int i = stretch.begin + lane_id(); i < stretch.end; i += lanes) {
            const uint64 own = positions_.has(i, Positions::usable) ? ordered(value(i)) : 0;
            if (own > best) best = own;
        }
        const double below = as_value(number(warp_max(best)) - as_value(a_.bounds.gate_slack));
        return below < bound ? below : bound;
    }

    // Whether a usable position has the best rank among the usable ones adjacent to it, and those adjacent to them.
    __device__ bool best_of_run(const Stretch& stretch, int i) const {
        const auto in_run = [&](int j) { return positions_.has(j, Positions::usable); };
        bool best = true;
#pragma unroll 1
        for (int j = i; best && j >= stretch.begin && in_run(j); --j) best = positions_.rank[j] >= positions_.rank[i];
#pragma unroll 1
        for (int j = i; best && j < stretch.end && in_run(j); ++j) best = positions_.rank[j] >= positions_.rank[i];
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
    const Positions& positions_;
    bool exact_score_, exact_value_;
    int passed_ = 0;
    unsigned first_ = 0;
    int64 least_ = 0, quota_ = 0;
};
