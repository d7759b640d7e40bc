// The plan that sorts (token, choice) pairs by expert, stably (reference/moe.py), for any number of pairs.
//
//     moe_plan_count_kernel  how many pairs of every block's stretch choose every expert; not called for one block
//     moe_plan_kernel        the plan: by one block alone, or by several that know those counts
//
// A counting sort. Every block has its own stretch of the pairs, every warp its own stretch of the block's, and its own
// count of every expert, so that a pair's slot is the expert's offset, plus what the blocks and then the warps before
// have of it, plus what the warp itself has met: stable without any order among threads. Within 32 pairs,
// `__match_any_sync` finds those of the same expert. No block waits for another: each of several adds up the counts
// of all, which are 48 KB for 96 blocks and 128 experts, instead of leaving that to a third launch between two.
// One block would take long for many tokens (docs/gpu_kernels.md).
//
// A pair whose expert is outside [0, E) is left out: a GPU cannot raise, and stopping the kernel would take the whole
// process's GPU away. What stands in `sorted_token_ids` beyond the last offset is then undefined.
#include "warp.h"

struct Choices {
    const void* topk_ids;
    int64 type, row, column, n, k, e;

    // -1 for an expert that does not exist.
    __device__ int expert_of(int64 pair) const {
        // Choices mostly lie in the order of the pairs, which saves a division of 64 bits.
        const int64 at = row == k * column ? pair * column : pair / k * row + pair % k * column;
        const int64 expert =
            type == type_int64 ? static_cast<const int64*>(topk_ids)[at] : int64(static_cast<const int*>(topk_ids)[at]);
        return expert < 0 || expert >= e ? -1 : int(expert);
    }
};

struct Stretch {
    int64 first, last;

    // Part `index` of it, if every part has `size` and the last ones what is left.
    __device__ Stretch part(int64 index, int64 size) const {
        const int64 start = first + index * size, end = start + size;
        return {start < last ? start : last, end < last ? end : last};
    }
};

// Adds the pairs of a stretch to the counts of their experts, `step` pairs apart from the one at `begin` on.
__device__ inline void count_experts(const Choices& choices, int64 begin, int64 end, int step, unsigned* counts) {
#pragma unroll 1
    for (int64 pair = begin; pair < end; pair += step) {
        const int expert = choices.expert_of(pair);
        if (expert >= 0) atomicAdd(&counts[expert], 1u);
    }
}

__device__ inline Stretch block_stretch(const Choices& c) {
    const int64 total = c.n * c.k;
    return Stretch{0, total}.part(blockIdx.x, (total + gridDim.x - 1) / gridDim.x);
}

extern "C" __global__ void __launch_bounds__(1024)
    moe_plan_count_kernel(const void* topk_ids, int64 ids_type, int64 row, int64 column, int64 n, int64 k, int64 e,
                          unsigned* block_counts) {
    SHARED_MEMORY(shared);
    unsigned* seen = reinterpret_cast<unsigned*>(shared);  // [E]
    const Choices choices = {topk_ids, ids_type, row, column, n, k, e};
    const Stretch own = block_stretch(choices);
#pragma unroll 1
    for (int64 i = threadIdx.x; i < e; i += blockDim.x) seen[i] = 0;
    __syncthreads();
    count_experts(choices, own.first + threadIdx.x, own.last, blockDim.x, seen);
    __syncthreads();
#pragma unroll 1
    for (int64 i = threadIdx.x; i < e; i += blockDim.x) block_counts[blockIdx.x * e + i] = seen[i];
}

// block_counts: [blocks, E], null for one block.
extern "C" __global__ void __launch_bounds__(1024)
    moe_plan_kernel(const void* topk_ids, int64 ids_type, int64 row, int64 column, int64 n, int64 k, int64 e,
                    int64* expert_counts, int64* expert_offsets, int64* sorted_token_ids,
                    const unsigned* block_counts) {
    SHARED_MEMORY(shared);
    const int lane = lane_id(), warps = int(blockDim.x) / lanes;
    unsigned* starts = reinterpret_cast<unsigned*>(shared);  // [E]
    unsigned* seen = starts + e;                             // [warps, E]
    unsigned* own = seen + warp_id() * e;
    unsigned* earlier = seen + warps * e;  // [E] in the blocks before, if there are several
    const Choices choices = {topk_ids, ids_type, row, column, n, k, e};
    const Stretch block = block_stretch(choices);
    const Stretch stretch = block.part(warp_id(), (block.last - block.first + blockDim.x - 1) / blockDim.x * lanes);

    const int64 count_rows = warps + (block_counts ? 2 : 1);
#pragma unroll 1
    for (int64 i = threadIdx.x; i < count_rows * e; i += blockDim.x) starts[i] = 0;
    __syncthreads();
    count_experts(choices, stretch.first + lane, stretch.last, lanes, own);
    if (block_counts) {
        const unsigned experts_here = unsigned(e), all = gridDim.x * experts_here, mine = blockIdx.x * experts_here;
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
            const unsigned count = block_counts[i];
            atomicAdd(&starts[i % experts_here], count);
            if (i < mine) atomicAdd(&earlier[i % experts_here], count);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int64 i = threadIdx.x; i < e; i += blockDim.x) {
        unsigned sum = block_counts ? earlier[i] : 0;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) {
            const unsigned count = seen[w * e + i];
            seen[w * e + i] = sum;  // in the blocks and warps before
            sum += count;
        }
        if (!block_counts) starts[i] = sum;
    }
    __syncthreads();
    if (warp_id() == 0) {
        const bool writes = blockIdx.x == 0;
        scan([=](int i) { return starts[i]; }, int(e), starts, writes ? expert_counts : nullptr,
             writes ? expert_offsets : nullptr);
    }
    __syncthreads();
#pragma unroll 1
    for (int64 base = stretch.first; base < stretch.last; base += lanes) {
        const int64 pair = base + lane;
        const int expert = pair < stretch.last ? choices.expert_of(pair) : -1;
        const unsigned same = __match_any_sync(whole_warp, expert);
        const unsigned before = same & ((1u << lane) - 1);
        if (expert >= 0) sorted_token_ids[starts[expert] + own[expert] + __popc(before)] = pair;
        __syncwarp();
        if (expert >= 0 && before == 0) own[expert] += __popc(same);
        __syncwarp();
    }
}
