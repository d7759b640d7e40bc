// The router's product (reference/moe.py) for many tokens: logits[n][e] = x[n] . weight[e], both factors widened to
// double. moe_gate.cu reads and widens a number again for every 4 rows of the other factor, this for every 32.
//
// A block has 32 tokens and 32 experts and goes through H in stages of 32 numbers, which it widens into shared memory.
// Each of its four warps takes 8 numbers of a stage for all 1024 sums; a thread has 8 tokens by 4 experts. It adds at
// most 64 products in a row before it adds them to its total, and at the end the warps' totals are added in their
// order. So products of one sign lose no more by being many, and the order depends on H alone: a token's logits are the
// same bits in every batch that comes here.
//
// Shared memory fills one register of a warp per cycle, or two if lanes i and i ^ 1, or lanes i and i ^ 2, read the
// same address (forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228, said of compute capability
// 7): hence the order of lanes in `own_token` and `own_expert`. Two numbers are read at once, and a row is 17 times two
// numbers long, so that 8 rows lie in different banks.
//
// A stage is put into one of two buffers while the other is read, and the numbers of the one after it are on their way
// to registers meanwhile: one barrier per stage. Two blocks fit on a processor (128 threads of at most 255 registers),
// so that one computes while the other waits. Tiles of 64 by 64 would copy half as much, and leave half of an
// H200 idle at 4096 tokens.
//
// Shared memory is what bounds it (docs/gpu_kernels.md). What is left: tensor cores multiply doubles at twice the rate,
// and would read a third from shared memory.
//
// Compiled for X_TYPE and WEIGHT_TYPE: double, float, Bfloat16 or Float16.
#include "moe_gate.h"

constexpr int warps = 4;
constexpr int tile = 32;                  // tokens, and experts, of a block: LARGE_TILE in twotower_kernels/cuda/moe.py
constexpr int depth = 32;                 // numbers of H of a stage
constexpr int own_depth = depth / warps;  // of them a warp's
constexpr int rows_each = tile / warps;   // rows of a factor that a thread copies
constexpr int token_step = 4, expert_step = 8;   // lanes of a warp side by side
constexpr int own_tokens = tile / token_step;    // of a thread, one in token_step
constexpr int own_experts = tile / expert_step;  // of a thread, one in expert_step
constexpr int pitch = depth + 2;                 // of a row in shared memory
constexpr int buffer = 2 * tile * pitch;         // tokens, then experts
constexpr int longest = 8;                       // stages whose products are added in a row
constexpr int gathered = tile / 2;               // tokens whose totals are in a buffer at a time

struct alignas(16) Pair {
    double first, second;
};
struct Sums {
    double of[own_tokens][own_experts];
};

// Where a lane's tile is: bits 1 and 3 of its number, and bits 0, 2 and 4.
__device__ inline int own_token() {
    const int lane = lane_id();
    return (lane >> 1 & 1) | (lane >> 2 & 2);
}
__device__ inline int own_expert() {
    const int lane = lane_id();
    return (lane & 1) | (lane >> 1 & 2) | (lane >> 2 & 4);
}

// Two buffers in turn: what is written before a barrier is read after it, while the other is written.
struct Buffers {
    double* start;
    int turn;

    __device__ double* next() {
        turn ^= 1;
        return start + turn * buffer;
    }
};

// What a thread copies of a factor: in every stage one number of each of its rows.
template <class T>
struct Copy {
    const char* next;
    int64 row_bytes, stage_bytes;
    int rows;  // that there are
    T of[rows_each];

    __device__ Copy(const void* data, int64 row, int64 column, int64 first, int64 all)
        : row_bytes(warps * row * sizeof(T)), stage_bytes(depth * column * sizeof(T)) {
        const int64 own = first + warp_id();
        next = static_cast<const char*>(data) + (own * row + lane_id() * column) * int64(sizeof(T));
        rows = all - own < tile ? int(all - own + warps - 1) / warps : rows_each;
    }
    // The next stage's; zeros outside of the factor.
    __device__ void fetch(bool inside) {
        const int there = inside ? rows : 0;
        const char* at = next;
#pragma unroll
        for (int r = 0; r < rows_each; ++r) {
            of[r] = r < there ? *reinterpret_cast<const T*>(at) : T();
            at += row_bytes;
        }
        next += stage_bytes;
    }
    __device__ void put(double* to) const {
#pragma unroll
        for (int r = 0; r < rows_each; ++r) to[(r * warps + warp_id()) * pitch + lane_id()] = widened(of[r]);
    }
};

// The warp's part of a stage. Unrolled four times instead of twice, some pairs of types need more registers than there
// are.
__device__ inline void add_products(Sums& sums, const double* stage) {
    const double* tokens = stage + own_token() * pitch + warp_id() * own_depth;
    const double* experts = stage + (tile + own_expert()) * pitch + warp_id() * own_depth;
#pragma unroll 2
    for (int i = 0; i < own_depth; i += 2) {
        Pair weights[own_experts];
#pragma unroll
        for (int e = 0; e < own_experts; ++e)
            weights[e] = *reinterpret_cast<const Pair*>(experts + e * expert_step * pitch + i);
#pragma unroll
        for (int t = 0; t < own_tokens; ++t) {
            const Pair x = *reinterpret_cast<const Pair*>(tokens + t * token_step * pitch + i);
#pragma unroll
            for (int e = 0; e < own_experts; ++e) sums.of[t][e] += x.first * weights[e].first;
#pragma unroll
            for (int e = 0; e < own_experts; ++e) sums.of[t][e] += x.second * weights[e].second;
        }
    }
}

__device__ inline void drain(Sums& sums, Sums& totals) {
#pragma unroll
    for (int t = 0; t < own_tokens; ++t) {
#pragma unroll
        for (int e = 0; e < own_experts; ++e) {
            totals.of[t][e] += sums.of[t][e];
            sums.of[t][e] = 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 2)
    moe_gate_tiled_kernel(const void* x, int64 x_row, int64 x_column, const void* weight, int64 weight_row,
                          int64 weight_column, double* logits, int64 n, int64 e, int64 h) {
    SHARED_MEMORY(shared);
    // Experts vary fastest: blocks that run together share tokens in the L2.
    const int64 tiles = (e + tile - 1) / tile, token = blockIdx.x / tiles * tile, expert = blockIdx.x % tiles * tile;
    Copy<X_TYPE> tokens(x, x_row, x_column, token, n);
    Copy<WEIGHT_TYPE> experts(weight, weight_row, weight_column, expert, e);
    const auto fetch = [&](int64 first) {
        tokens.fetch(first + lane_id() < h);
        experts.fetch(first + lane_id() < h);
    };
    Buffers buffers = {reinterpret_cast<double*>(shared), 0};
    const auto put = [&] {
        double* stage = buffers.next();
        tokens.put(stage);
        experts.put(stage + tile * pitch);
        return stage;
    };
    fetch(0);
    const double* stage = put();
    fetch(depth);
    Sums sums = {}, totals = {};
    int added = 0;
#pragma unroll 1
    for (int64 first = 0; first < h; first += depth) {
        __syncthreads();
        add_products(sums, stage);
        if (++added % longest == 0) drain(sums, totals);
        stage = put();
        fetch(first + 2 * depth);
    }
    drain(sums, totals);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        double* warp_totals = buffers.next();  // [warps, 16 tokens, pitch]
#pragma unroll
        for (int t = 0; t < own_tokens / 2; ++t) {
            const int row = warp_id() * gathered + t * token_step + own_token();
#pragma unroll
            for (int i = 0; i < own_experts; ++i)
                warp_totals[row * pitch + i * expert_step + own_expert()] = totals.of[half * own_tokens / 2 + t][i];
        }
        __syncthreads();
#pragma unroll 1
        for (int t = warp_id(); t < gathered; t += warps) {
            double sum = 0;
#pragma unroll
            for (int w = 0; w < warps; ++w) sum += warp_totals[(w * gathered + t) * pitch + lane_id()];
            const int64 row = token + half * gathered + t, column = expert + lane_id();
            if (row < n && column < e) logits[row * e + column] = sum;
        }
    }
}
