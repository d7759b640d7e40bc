// The choice of experts (reference/moe.py), alone or together with the plan that sorts tokens by expert.
//
//     moe_route_kernel       weights and experts of any number of tokens, a warp for each
//     moe_route_plan_kernel  the same and the plan, for up to 64 tokens, in one block
//
// A warp keeps a token's E selection scores as integers in their order (`ordered`) and takes the largest k times: a
// reduction in hardware of each half, and one that finds the lowest expert among equals. So ties and NaN cost nothing
// extra, and float64 is compared exactly. Scores and keys lie in shared memory, and the loops over them are not
// unrolled: with both in registers and everything unrolled, compiled for 4, 8, 16 or 32 experts in each lane, cubins
// had 105 to 500 KB instead of 75, and NVRTC took 5 to 40 s for one instead of 2, on a busy machine. What runs once per
// launch also waits for each instruction it fetches.
//
// The plan needs no sort up to 64 tokens, since one choice of a token differs from its others: every expert keeps a
// mask of the tokens that chose it. Its size is the expert's count, and the bits below a token's own are the token's
// position among the expert's. The result is ordered by token whatever the order in which the bits arrived.
//
// More tokens than 64 take moe_route_kernel and moe_plan.cu. Predictions: docs/gpu_kernels.md.
//
// Compiled for logits that are STORED as any float; LOGIT is what they are computed in, float or double.
#include "moe_gate.h"

template <class W>
struct KeyOf {
    using type = uint64;
};
template <>
struct KeyOf<float> {
    using type = unsigned;
};
using Key = KeyOf<LOGIT>::type;

// Floats of any type, or null.
struct Vector {
    const void* data;
    int64 type, stride;
};

// The arguments of both kernels.
struct Routing {
    const STORED* logits;
    int64 logits_row, logits_column;  // strides, in elements
    Vector bias, scale;               // [E], or none
    float* topk_weights;              // [N, k]
    int* topk_ids;                    // [N, k]
    int64 n;
    int e, k, softmax, n_group, topk_group, renormalize;
    double scaling;
    int exclude_dropped;
};

// A warp's part of shared memory, `_Routing.launch` in twotower_kernels/cuda/moe.py counts its bytes.
struct Scratch {
    LOGIT* scores;  // [E]
    Key* keys;      // [E], 0: taken. Lane i % 32 alone touches key i
    Key* groups;    // [n_group]
    int* topk_ids;  // [k]
};

__device__ inline Scratch scratch_at(uint64* words, const Routing& a) {
    const int own = ((2 * a.e + a.n_group) * int(sizeof(LOGIT)) + a.k * int(sizeof(int)) + 7) / 8;
    LOGIT* scores = reinterpret_cast<LOGIT*>(words + warp_id() * own);
    Key* keys = reinterpret_cast<Key*>(scores + a.e);
    return {scores, keys, keys + a.e, reinterpret_cast<int*>(keys + a.e + a.n_group)};
}

// What a lane waits for at a time: numbers of 4 experts, `lanes` apart.
constexpr int each = 4;
struct Numbers {
    LOGIT of[each];
};

// Zeros behind the last of `count`.
template <class T>
__device__ inline Numbers numbers_at(const void* array, int64 stride, int first, int count) {
    T stored[each];
#pragma unroll
    for (int j = 0; j < each; ++j) {
        const int i = first + j * lanes;
        stored[j] = i < count ? static_cast<const T*>(array)[i * stride] : T();
    }
    Numbers numbers;
#pragma unroll
    for (int j = 0; j < each; ++j) numbers.of[j] = LOGIT(widened(stored[j]));
    return numbers;
}

__device__ inline Numbers biases_at(const Routing& a, int first) {
    const Vector& bias = a.bias;
    const int count = bias.data ? a.e : 0;
    if (bias.type == type_float64) return numbers_at<double>(bias.data, bias.stride, first, count);
    if (bias.type == type_float32) return numbers_at<float>(bias.data, bias.stride, first, count);
    if (bias.type == type_bfloat16) return numbers_at<Bfloat16>(bias.data, bias.stride, first, count);
    return numbers_at<Float16>(bias.data, bias.stride, first, count);
}

// A token's logits and biases, as `scores` and `keys`: those of 128 experts are on their way before the first is waited
// for. Without a bias it is 0, which changes no score.
__device__ inline void fetch(const Routing& a, int64 token, const Scratch& scratch) {
    const STORED* logits = a.logits + token * a.logits_row;
#pragma unroll 1
    for (int first = lane_id(); first < a.e; first += each * lanes) {
        const Numbers scores = numbers_at<STORED>(logits, a.logits_column, first, a.e), biases = biases_at(a, first);
#pragma unroll
        for (int j = 0; j < each; ++j) {
            const int i = first + j * lanes;
            if (i >= a.e) break;
            scratch.scores[i] = scores.of[j];
            scratch.keys[i] = ordered(biases.of[j]);
        }
    }
}

// Of logits, in place.
__device__ inline void scores_of(LOGIT* scores, const Routing& a) {
    const int lane = lane_id();
    if (!a.softmax) {
#pragma unroll 4
        for (int i = lane; i < a.e; i += lanes) scores[i] = 1 / (1 + exp(-scores[i]));
        return;
    }
    Key top = 0;
#pragma unroll 1
    for (int i = lane; i < a.e; i += lanes) {
        const Key key = ordered(scores[i]);
        if (key > top) top = key;
    }
    const LOGIT most = number(warp_max(top));
    LOGIT sum = 0;
#pragma unroll 4
    for (int i = lane; i < a.e; i += lanes) sum += scores[i] = exp(scores[i] - most);
    sum = warp_sum(sum);
#pragma unroll 1
    for (int i = lane; i < a.e; i += lanes) scores[i] /= sum;
}

// Where the largest of n keys is, the lowest among equals; every lane looks at its own and all know the answer.
__device__ inline int largest(const Key* keys, int n) {
    Key top = 0;
    unsigned at = 0;
#pragma unroll 1
    for (int i = lane_id(); i < n; i += lanes) {
        if (keys[i] > top) {
            top = keys[i];
            at = unsigned(i);
        }
    }
    const Key best = warp_max(top);
    return int(__reduce_min_sync(whole_warp, top == best ? at : ~0u));
}

// The choices outside the topk_group groups with the largest sums of their two best become 0, or are taken already.
__device__ inline void drop_groups(Key* keys, const Routing& a, Key* groups) {
    const int lane = lane_id(), size = a.e / a.n_group;
#pragma unroll 1
    for (int g = 0; g < a.n_group; ++g) {
        Key first = 0, second = 0;  // of this lane
        const int start = g * size, from = start + (lane - start % lanes + lanes) % lanes;
#pragma unroll 1
        for (int i = from; i < start + size; i += lanes) {
            const Key key = keys[i];
            if (key > first) {
                second = first;
                first = key;
            } else if (key > second) {
                second = key;
            }
        }
        const Key best = warp_max(first);
        if (lane == __ffs(int(__ballot_sync(whole_warp, first == best))) - 1) first = second;
        const Key next = warp_max(first);
        // Lane g % 32 alone reads what it writes here, until the barrier.
        if (lane == g % lanes) groups[g] = ordered(size > 1 ? number(best) + number(next) : number(best));
    }
#pragma unroll 1
    for (int survivors = 0; survivors < a.topk_group; ++survivors) {
        const int group = largest(groups, a.n_group);
        if (lane == group % lanes) groups[group] = 0;  // it survives, and is not taken twice
    }
    __syncwarp();
    const Key other = a.exclude_dropped ? 0 : ordered(LOGIT(0));
#pragma unroll 1
    for (int i = lane; i < a.e; i += lanes)
        if (groups[i / size] != 0) keys[i] = other;
}

// One warp chooses for one token. What is in `scratch` may be overwritten after the warp's next barrier.
__device__ inline void route(const Routing& a, int64 token, const Scratch& scratch) {
    const int lane = lane_id();
    fetch(a, token, scratch);
    scores_of(scratch.scores, a);
#pragma unroll 1
    for (int i = lane; i < a.e; i += lanes) scratch.keys[i] = ordered(scratch.scores[i] + number(scratch.keys[i]));
    if (a.n_group > 1) drop_groups(scratch.keys, a, scratch.groups);
    __syncwarp();
    LOGIT sum = 0;
#pragma unroll 1
    for (int c = 0; c < a.k; ++c) {
        const int expert = largest(scratch.keys, a.e);
        if (lane == expert % lanes) scratch.keys[expert] = 0;
        if (lane == c % lanes) scratch.topk_ids[c] = expert;  // the lane that reads it below
        sum += scratch.scores[expert];
    }
#pragma unroll 1
    for (int c = lane; c < a.k; c += lanes) {
        LOGIT weight = scratch.scores[scratch.topk_ids[c]];
        if (a.renormalize) weight /= sum + LOGIT(1e-20);
        weight *= LOGIT(a.scaling);
        if (a.scale.data) weight *= number_at<LOGIT>(a.scale.data, a.scale.type, scratch.topk_ids[c] * a.scale.stride);
        a.topk_weights[token * a.k + c] = float(weight);
        a.topk_ids[token * a.k + c] = scratch.topk_ids[c];
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
    moe_route_kernel(const STORED* logits, int64 logits_row, int64 logits_column, const void* bias, int64 bias_type,
                     int64 bias_stride, const void* scale, int64 scale_type, int64 scale_stride, float* topk_weights,
                     int* topk_ids, int64 n, int64 e, int64 k, int64 softmax, int64 n_group, int64 topk_group,
                     int64 renormalize, double scaling, int64 exclude_dropped) {
    SHARED_MEMORY(shared);
    const Vector biases = {bias, bias_type, bias_stride}, scales = {scale, scale_type, scale_stride};
    const Routing a = {logits,          logits_row,       logits_column, biases,
                       scales,          topk_weights,     topk_ids,      n,
                       int(e),          int(k),           int(softmax),  int(n_group),
                       int(topk_group), int(renormalize), scaling,       int(exclude_dropped)};
    const int64 token = int64(blockIdx.x) * (blockDim.x / lanes) + warp_id();
    if (token < n) route(a, token, scratch_at(shared, a));
}

// One block on a processor: without that 1, sm_100 and sm_120 keep to 64 registers and spill three of them.
extern "C" __global__ void __launch_bounds__(512, 1)
    moe_route_plan_kernel(const STORED* logits, int64 logits_row, int64 logits_column, const void* bias,
                          int64 bias_type, int64 bias_stride, const void* scale, int64 scale_type, int64 scale_stride,
                          float* topk_weights, int* topk_ids, int64 n, int64 e, int64 k, int64 softmax, int64 n_group,
                          int64 topk_group, int64 renormalize, double scaling, int64 exclude_dropped,
                          int64* expert_counts, int64* expert_offsets, int64* sorted_token_ids) {
    SHARED_MEMORY(shared);
    const Vector biases = {bias, bias_type, bias_stride}, scales = {scale, scale_type, scale_stride};
    const Routing a = {logits,          logits_row,       logits_column, biases,
                       scales,          topk_weights,     topk_ids,      n,
                       int(e),          int(k),           int(softmax),  int(n_group),
                       int(topk_group), int(renormalize), scaling,       int(exclude_dropped)};
    launch_dependents();  // the experts' first launch may ask for the shared expert's weights meanwhile
    const int warps = int(blockDim.x) / lanes;
    uint64* token_masks = shared;                                  // [E], which tokens chose an expert
    unsigned* starts = reinterpret_cast<unsigned*>(shared + a.e);  // [E], where an expert's pairs start
    const Scratch scratch = scratch_at(shared + a.e + (a.e + 1) / 2, a);

#pragma unroll 1
    for (int i = threadIdx.x; i < a.e; i += blockDim.x) token_masks[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int token = warp_id(); token < n; token += warps) {
        route(a, token, scratch);
#pragma unroll 1
        for (int c = lane_id(); c < a.k; c += lanes) atomicOr(&token_masks[scratch.topk_ids[c]], uint64(1) << token);
        __syncwarp();
    }
    __syncthreads();
    if (warp_id() == 0)
        scan([=](int i) { return unsigned(__popcll(token_masks[i])); }, a.e, starts, expert_counts, expert_offsets);
    __syncthreads();
#pragma unroll 1
    for (int token = warp_id(); token < n; token += warps) {
        const uint64 below = (uint64(1) << token) - 1;
#pragma unroll 1
        for (int c = lane_id(); c < a.k; c += lanes) {
            const int64 pair = int64(token) * a.k + c;
            const int expert = n <= warps ? scratch.topk_ids[c] : topk_ids[pair];  // this thread wrote both
            sorted_token_ids[starts[expert] + __popcll(token_masks[expert] & below)] = pair;
        }
    }
}
