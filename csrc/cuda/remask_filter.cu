// Top-k and top-p without sorting the vocabulary: for each position the least logit that is kept, by radix descent
// (csrc/cpu/remask_filter.h does the same). A block for each position that waits.
//
// Values become unsigned keys of the same order. A histogram of the highest 11 bits, with the weight that falls into
// each bin, tells in which bin the last kept value lies; the next 11 bits of those in that bin come next, then the last
// 10. Weights are integers (1, or the probability times 2^62), so that their sums do not depend on the order in which
// the atomic operations come. Every pass reads the position's logits, from the second on out of the L2.
//
// Under the posterior the mask token is filtered with the others, by the logit that a pass of its own finds for it.
//
// Compiled for LOGIT_TYPE (warp.h) and POSTERIOR 0 or 1.
#include "remask.h"
#include "remask_logit.h"

constexpr int digit = 11, bins = 1 << digit, bins_per_lane = bins / lanes;
constexpr int section = 8192;  // tokens that are marked at a time, where some are suppressed

// Where a bin lies: the lanes of a warp, each with its own stretch of bins, then fall on different banks.
__device__ inline int slot(int bin) {
    return bin + bin / bins_per_lane;
}

struct Shared {
    uint64 above;  // weight of the values that are larger than those with the prefix
    double mass[lanes];
    unsigned low[bins + lanes], high[bins + lanes];  // of a bin's weight
    unsigned largest[bins + lanes];                  // key, 0: the bin is empty
    unsigned prefix;
    unsigned most[lanes];
    unsigned suppressed[section / 32];
};
static_assert(sizeof(Shared) == 26384, "_FILTER_SHARED in twotower_kernels/cuda/remask.py");

// What is filtered: a position's logits, without the suppressed ones and -infinity, and the posterior's mask.
struct Values {
    const Remask& a;
    const Logit* logits;
    Shared& shared;
    float mask;  // -infinity: none

    // f(z) for each of them. Every thread takes its share.
    template <class F>
    __device__ void each(const F& f) const {
        constexpr int ahead = 4;  // loads under way
#pragma unroll 1
        for (int first = 0; first < int(a.vocabulary); first += section) {  // a token is an int
            const int end = int(a.vocabulary) - first < section ? int(a.vocabulary) : first + section;
            if (a.suppressed.count > 0) mark(shared.suppressed, (end - first + 31) / 32, first, a.suppressed);
#pragma unroll 1
            for (int base = first + int(threadIdx.x); base < end; base += ahead * int(blockDim.x)) {
                float z[ahead];
#pragma unroll
                for (int i = 0; i < ahead; ++i) {
                    const int token = base + i * int(blockDim.x);
                    z[i] = token < end ? widen(logits[int64(token) * a.logits_stride_v]) : -infinity();
                }
#pragma unroll
                for (int i = 0; i < ahead; ++i) {
                    const int token = base + i * int(blockDim.x), at = token - first;
                    if (z[i] == -infinity() || (a.options.suppress_mask && token == a.mask_token_id)) continue;
                    if (a.suppressed.count > 0 && shared.suppressed[at / 32] >> (at % 32) & 1) continue;
                    f(z[i]);
                }
            }
        }
        if (POSTERIOR && threadIdx.x == 0 && mask > -infinity()) f(mask);
    }
};

// The largest key of the block's threads.
__device__ inline unsigned block_max(unsigned key, Shared& shared) {
    const unsigned most = warp_max(key);
    if (lane_id() == 0) shared.most[warp_id()] = most;
    __syncthreads();
    unsigned all = 0;
    for (int w = 0; w < int(blockDim.x) / lanes; ++w) all = shared.most[w] > all ? shared.most[w] : all;
    return all;
}
// Begins with a barrier, so that it may follow itself.
__device__ inline double block_sum(double x, Shared& shared) {
    __syncthreads();
    const double sum = warp_sum(x);
    if (lane_id() == 0) shared.mass[warp_id()] = sum;
    __syncthreads();
    double all = 0;
    for (int w = 0; w < int(blockDim.x) / lanes; ++w) all += shared.mass[w];
    return all;
}

// Adds to a bin's weight. Atomic operations of 32 bits are one instruction in shared memory, those of 64 bits a loop.
__device__ inline void add_weight(Shared& shared, int bin, uint64 weight) {
    const unsigned low = unsigned(weight), before = atomicAdd(&shared.low[bin], low);
    const unsigned high = unsigned(weight >> 32) + (before + low < low);  // with what is carried
    if (high) atomicAdd(&shared.high[bin], high);
}
__device__ inline uint64 weight_of(const Shared& shared, int bin) {
    return uint64(shared.high[bin]) << 32 | shared.low[bin];
}

// By one warp: the bin in which the last kept value lies, see `least_survivor`.
template <class Weigh>
__device__ inline void choose(Shared& shared, int shift, uint64 budget, bool itself, const Weigh& weigh) {
    const int start = lane_id() * bins_per_lane;  // counted from the highest bin
    uint64 own = 0;
#pragma unroll 1
    for (int i = start; i < start + bins_per_lane; ++i) own += weight_of(shared, slot(bins - 1 - i));
    uint64 above = shared.above + sum_below(own), above_first = 0, above_last = 0;
    unsigned first = ~0u, last = 0;  // filled ones: the first; the last that may be kept, counted from 1
#pragma unroll 1
    for (int i = start; i < start + bins_per_lane; ++i) {
        const unsigned largest = shared.largest[slot(bins - 1 - i)];
        if (largest == 0) continue;
        if (first == ~0u) first = unsigned(i), above_first = above;
        if (above + (itself ? weigh(number(largest)) : 0) <= budget) last = unsigned(i) + 1, above_last = above;
        above += weight_of(shared, slot(bins - 1 - i));
    }
    const unsigned last_of_all = warp_max(last), first_of_all = __reduce_min_sync(whole_warp, first);
    __syncwarp();  // all have read what one of them writes now
    const bool mine = last_of_all ? last == last_of_all : first == first_of_all && first != ~0u;
    if (!mine) return;
    shared.above = last_of_all ? above_last : above_first;
    const unsigned chosen = last_of_all ? last_of_all - 1 : first_of_all;
    shared.prefix = shared.largest[slot(bins - 1 - int(chosen))] >> shift;
}

// Of what value_of makes of them (-infinity: none), largest first: the least one for which the weight of the larger
// ones (with `itself`: and its own) is at most `budget`; at least the largest.
template <class Value, class Weigh>
__device__ inline float least_survivor(const Values& values, uint64 budget, bool itself, const Value& value_of,
                                       const Weigh& weigh) {
    Shared& shared = values.shared;
    unsigned prefix = 0;
    if (threadIdx.x == 0) shared.above = 0;
#pragma unroll 1
    for (int shift = 32; shift > 0;) {
        const int next = shift > digit ? shift - digit : 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < bins + lanes; i += blockDim.x)
            shared.low[i] = shared.high[i] = shared.largest[i] = 0;
        __syncthreads();
        values.each([&](float z) {
            const float value = value_of(z);
            if (value == -infinity()) return;
            const unsigned key = ordered(value);
            if (shift < 32 && key >> shift != prefix) return;
            const int bin = slot(int(key >> next & ((1u << (shift - next)) - 1)));
            add_weight(shared, bin, weigh(value));
            atomicMax(&shared.largest[bin], key);
        });
        __syncthreads();
        if (warp_id() == 0) choose(shared, next, budget, itself, weigh);
        __syncthreads();
        prefix = shared.prefix;
        shift = next;
    }
    return number(prefix);
}

// The least logit of the nucleus, of which the best of top-k are at least `among`.
__device__ inline float nucleus(const Values& values, float t, double top_p, float largest, float among) {
    const Remask& a = values.a;
    const auto value_of = [&](float z) {
        const float x = a.options.top_p_tempered ? (z - largest) / t : z;
        return a.options.top_p_first || z >= among ? x : -infinity();
    };
    const float top = value_of(largest);
    float own = 0;
    values.each([&](float z) { own += expf(value_of(z) - top); });
    const double mass = block_sum(double(own), values.shared);
    const auto weigh = [&](float x) { return uint64(double(float(double(expf(x - top)) / mass)) * 0x1p62); };
    const uint64 budget = uint64(top_p * 0x1p62);
    const float least_x = least_survivor(values, budget, !a.options.top_p_keep_crossing, value_of, weigh);
    unsigned least = 0;  // the largest of keys in reverse
    values.each([&](float z) {
        const unsigned key = ~ordered(z);
        if (z >= among && value_of(z) >= least_x && key > least) least = key;
    });
    return number(~block_max(least, values.shared));
}

extern "C" __global__ void __launch_bounds__(POSTERIOR ? 512 : 768, 1)
    remask_filter_kernel(const __grid_constant__ Remask a, Filter* out) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64 b = blockIdx.x / a.block, s = blockIdx.x % a.block;
    if (!looked(a, b, s)) return;
    const Row row = row_of(a, b);
    if (!row.filtered) return;
    const float t = temperature_of(row);  // here, so that a float stays in registers and no double
    const Logit* z = position_logits(a, b, s);
    Values values = {a, z, shared, -infinity()};

    unsigned most = 0;
    values.each([&](float logit) {
        const unsigned key = logit == infinity() ? ~0u : ordered(logit);
        most = key > most ? key : most;
    });
    most = block_max(most, shared);
    float least = -infinity(), largest = number(most);
    const bool usable = most != 0 && most != ~0u;  // something finite, and nothing else
    if (POSTERIOR && usable) {
        float own = 0;
        values.each([&](float logit) { own += expf(logit - largest); });
        const double log_sum = double(largest) + log(block_sum(double(own), shared));
        values.mask = mask_logit<float>(log_sum, leave_probability(a, row.step, row.num_steps));
        if (values.mask > largest) largest = values.mask;
    }
    if (usable && row.top_k > 0 && row.top_k < a.vocabulary)
        least = least_survivor(
            values, uint64(row.top_k - 1), false, [](float logit) { return logit; }, [](float) { return uint64(1); });
    if (usable && row.top_p < 1)  // the posterior of a mask that stays for certain has no nucleus of tokens
        least = largest == infinity() ? largest : nucleus(values, t, row.top_p, largest, least);
    if (threadIdx.x == 0) out[blockIdx.x] = {least, values.mask};
}
