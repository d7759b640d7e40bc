// What the kernels of a remasking step share, and what they leave for each other. Each takes the step (`Remask`, in
// remask_arguments.h) by value. The definition of the step is reference/remask.py; the launcher is
// twotower_kernels/cuda/remask.py.
//
//     remask_filter.cu  where top-k or top-p are asked for: the least logit that each position keeps
//     remask_scan.cu    reads the logits once, all processors over pieces of positions: what a piece says
//     remask_select.cu  merges the pieces of each position (remask_merge.h), scores the positions, selects
//                       (remask_selection.h), writes; a block per sequence
#pragma once

#include "philox.h"

#define REMASK_FUNCTION __device__ inline
#define REMASK_METHOD __device__
// (cos and sin themselves keep room for the bits of a large argument.) At 1, the cosine is that of the double next to
// pi / 2, so that the schedules that end there end as in the definition.
REMASK_FUNCTION double quarter_cosine(double t) {
    return t == 1 ? 6.123233995736766e-17 : cospi(0.5 * t);
}
REMASK_FUNCTION double quarter_sine(double t) {
    return sinpi(0.5 * t);
}
// clang-format off
#include "../common/remask_policy.h"
#include "../common/remask_arguments.h"
#include "../common/remask_rule.h"
#include "../common/remask_schedule.h"
// clang-format on

__device__ inline float infinity() {
    return __uint_as_float(0x7f800000u);
}

// --- a row and its positions ----------------------------------------------------------------------------------------

struct Row {
    int64 step, num_steps, top_k, initial;
    double temperature;  // of this step; 0: none
    double top_p, gate_bound, leave;
    RemaskClean clean;
    bool sampled, filtered;
};

// All but `leave` and `clean`, which only selection needs and take long.
__device__ inline Row row_of(const Remask& a, int64 b) {
    Row row;
    row.step = a.step[b];
    row.num_steps = a.num_steps[b];
    row.top_k = a.top_k[b];
    row.initial = a.initial_num_masked[b];
    row.temperature = a.temperature[b];
    row.top_p = a.top_p[b];
    row.gate_bound = a.gate_bound[b];
    derive(a, a.vocabulary, row);
    return row;
}

// What the tokens of a position draw with; numbers of positions have a stream of their own (position_noise).
__device__ inline Stream token_stream(const Remask& a, const Row& row, int64 b, int64 s) {
    const int64 number = a.by_sequence ? s : 0;  // of the token in its text; else there are step and position
    return stream_of(a.seed[b], a.offset[b] + number, a.by_sequence ? 0 : row.step, s - number);
}

// The temperature of the draw, and of the statistics.
__device__ inline float temperature_of(const Row& row) {
    return row.temperature > 0 ? float(row.temperature) : 1.0f;
}
__device__ inline float own_temperature(const Remask& a, const Row& row) {
    return a.options.statistics == RemaskChoice::filtered ? temperature_of(row) : 1.0f;
}

__device__ inline int64 token_at(const Remask& a, int64 b, int64 s) {
    const int64 i = b * a.tokens.stride_b + s * a.tokens.stride_s;
    return a.tokens_dtype == type_int64 ? static_cast<const int64*>(a.tokens.data)[i]
                                        : int64(static_cast<const int*>(a.tokens.data)[i]);
}

__device__ inline bool valid(const Remask& a, int64 b, int64 s) {
    return s < a.valid_lens[b];
}

// Whether the step may write there. Positions outside neither wait nor count.
__device__ inline bool reaches(const Remask& a, int64 b, int64 s) {
    return valid(a, b, s) && (!a.editable || a.editable.at(b, s));
}

__device__ inline bool masked(const Remask& a, int64 b, int64 s) {
    return a.mask_token_id >= 0 && token_at(a, b, s) == a.mask_token_id;
}

// Whether the position is looked at: it holds a mask, or the policy looks at committed ones, too. What this hangs on is
// all read at once, whatever comes of it.
__device__ inline bool looked(const Remask& a, int64 b, int64 s) {
    const int64 length = a.valid_lens[b];
    const bool open = !a.editable || a.editable.at(b, s), waits = masked(a, b, s);
    return (waits | looks_at_committed(a.options)) & (s < length) & open;
}

// --- kernels that overlap -------------------------------------------------------------------------------------------

// Programmatic dependent launch (PTX ISA, griddepcontrol), if the launcher asks for it: a kernel lets the next one
// start once all its blocks have, and that one waits for what this one writes. Otherwise neither does anything.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void await_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- what kernels leave for each other ------------------------------------------------------------------------------

// What the filter finds of a position.
struct Filter {
    float least;  // the least logit that it keeps; +infinity: it keeps no token
    float mask;   // of the posterior: the mask token's logit
};

// What a piece of a position says. Sums are over what the statistics see and lies below `top`, which `tops` tokens
// have: of e^u and of -u e^u, u = (z - top) / t.
struct alignas(16) Partial {
    float top, mass, drop;
    unsigned tops;
    float best;  // of what may be proposed
    unsigned best_token;
    float second;     // of what the statistics see
    unsigned wrong;   // NaN or +infinity: the rest may then be anything
    uint64 drawn[2];  // the two best with noise, as `drawn_key` orders them; 0: there is none
    // Of the posterior: sums of e^(z - best) over what may be proposed, of e^((z - best) / temperature) over what of it
    // the filter keeps, both below `best`, which `bests` tokens have. Only builds for it write them.
    float all, survivors;
    unsigned bests;
};

// Larger for larger values, and among equals for lower tokens.
__device__ inline uint64 drawn_key(float value, unsigned token) {
    return uint64(ordered(value)) << 32 | ~token;
}
__device__ inline float drawn_value(uint64 key) {
    return key ? number(unsigned(key >> 32)) : -infinity();
}
__device__ inline unsigned drawn_token(uint64 key) {
    return key ? ~unsigned(key) : 0;
}

// The two largest of some keys; 0: there is none.
template <class Key>
struct Two {
    Key first = 0, second = 0;
    __device__ void offer(Key key) {
        if (key > first) {
            second = first;
            first = key;
        } else if (key > second) {
            second = key;
        }
    }
};

// Of all lanes' together, known to all.
template <class Key>
__device__ inline Two<Key> warp_two(Two<Key> own) {
    const Key first = warp_max(own.first);
    const bool mine = lane_id() == __ffs(int(__ballot_sync(whole_warp, own.first == first))) - 1;
    return {first, warp_max(mine ? own.second : own.first)};
}

// --- tokens that are left out ---------------------------------------------------------------------------------------

// By a block: sets the bits of the tokens [first, first + 32 * words) that are listed. Begins and ends with a barrier.
__device__ inline void mark(unsigned* bits, int words, int64 first, const RemaskIds& listed) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += blockDim.x) bits[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64 i = threadIdx.x; i < listed.count; i += blockDim.x) {
        const int64 at = listed.ids[i] - first;
        if (at >= 0 && at < int64(words) * 32) atomicOr(&bits[at / 32], 1u << (at % 32));
    }
    __syncthreads();
}

// By a warp: whether the token is listed.
__device__ inline bool is_listed(int64 token, const RemaskIds& listed) {
    bool found = false;
#pragma unroll 1
    for (int64 i = lane_id(); i < listed.count; i += lanes) found |= listed.ids[i] == token;
    return __ballot_sync(whole_warp, found) != 0;
}
