// The router's product (reference/moe.py): logits[n][e] = x[n] . weight[e], both factors widened to double.
//
// A block has 4 tokens and 4 experts, and its threads share H: each adds 16 products for every number of H it has,
// blockDim.x apart. Then the 16 sums of a warp's lanes are added by halving (every lane gives half of its sums away and
// keeps the other, so that 16 shuffles do what 80 would), and the warps' sums in their order. The order of adding
// depends on H alone: a token's logits are the same bits in every batch that comes here.
//
// Why 4 by 4: a processor widens 16 numbers to double per cycle and multiplies 64. With T tokens and E experts a number
// of H costs (T + E) / 16 + T E / 64 cycles; for 16 tokens and 128 experts on 128 blocks that is 1.31 as 16 by 1, 0.88
// as 8 by 2 and 0.75 as 4 by 4, which also reads the least through the L2 (64 KB a block). Larger tiles would widen
// less for many tokens, and leave processors idle at 16.
//
// Two blocks fit on a processor (256 threads of at most 128 registers), so that with many tokens one computes while the
// other waits. 512 threads would wait twice instead of three times for 2688 numbers, but be alone; 6 numbers at a time
// instead of 4 spill on two architectures.
//
// Between two calls of a layer the experts' weights sweep the L2: so a block asks for all its rows at once, and waits
// for memory once. Many tokens are moe_gate_tiled.cu's. Predictions: docs/gpu_kernels.md.
#include "moe_gate.h"

constexpr int tile = 4;  // tokens, and experts, of a block: TILE in twotower_kernels/cuda/moe.py
constexpr int sums_of_tile = tile * tile;

template <int count>
struct Numbers {
    double of[count];
};
using Sums = Numbers<sums_of_tile>;  // token * tile + expert

struct Matrix {
    const void* data;
    int64 type, row, column, rows;  // strides in elements

    // Asks for a row of h numbers, if they lie side by side.
    __device__ void prefetch_row(int64 index, int64 h) const {
        const int64 size = type == type_float64 ? 8 : type == type_float32 ? 4 : 2;
        if (column == 1 && index < rows) prefetch(static_cast<const char*>(data) + index * row * size, h * size);
    }
};

// A tile's rows of a matrix. Behind the last row it is that row again, whose sums nobody stores.
template <class T>
struct Rows {
    const T* start[tile];
    int64 column;

    __device__ Rows(const Matrix& m, int64 first) : column(m.column) {
#pragma unroll
        for (int r = 0; r < tile; ++r) {
            const int64 row = first + r < m.rows ? first + r : m.rows - 1;
            start[r] = static_cast<const T*>(m.data) + row * m.row;
        }
    }
};

template <class X, class W>
__device__ inline Sums products(const Rows<X>& x, const Rows<W>& weight, int64 h) {
    constexpr int depth = sizeof(X) + sizeof(W) > 8 ? 2 : 4;  // numbers of H that are waited for at a time
    Sums sums = {};
#pragma unroll 1
    for (int64 first = threadIdx.x; first < h; first += depth * blockDim.x) {
        X xs[depth][tile];
        W ws[depth][tile];
#pragma unroll
        for (int d = 0; d < depth; ++d) {
            const int64 i = first + d * blockDim.x;
#pragma unroll
            for (int r = 0; r < tile; ++r) {
                xs[d][r] = i < h ? x.start[r][i * x.column] : X();
                ws[d][r] = i < h ? weight.start[r][i * weight.column] : W();
            }
        }
#pragma unroll
        for (int d = 0; d < depth; ++d) {
            double weights_as_double[tile];
#pragma unroll
            for (int r = 0; r < tile; ++r) weights_as_double[r] = widened(ws[d][r]);
#pragma unroll
            for (int t = 0; t < tile; ++t) {
                const double mine = widened(xs[d][t]);
#pragma unroll
                for (int r = 0; r < tile; ++r) sums.of[t * tile + r] += mine * weights_as_double[r];
            }
        }
    }
    return sums;
}

// The same of matrices of any types. (Calls instead of generic lambdas, which NVRTC 13.1 and older take for host code.)
template <class X>
__device__ inline Sums products(const Rows<X>& x, const Matrix& weight, int64 expert, int64 h) {
    if (weight.type == type_float64) return products(x, Rows<double>(weight, expert), h);
    if (weight.type == type_float32) return products(x, Rows<float>(weight, expert), h);
    if (weight.type == type_bfloat16) return products(x, Rows<Bfloat16>(weight, expert), h);
    return products(x, Rows<Float16>(weight, expert), h);
}

__device__ inline Sums products(const Matrix& x, const Matrix& weight, int64 token, int64 expert, int64 h) {
    if (x.type == type_float64) return products(Rows<double>(x, token), weight, expert, h);
    if (x.type == type_float32) return products(Rows<float>(x, token), weight, expert, h);
    if (x.type == type_bfloat16) return products(Rows<Bfloat16>(x, token), weight, expert, h);
    return products(Rows<Float16>(x, token), weight, expert, h);
}

// Lane i's result is the sum i % 16 over the warp's lanes.
template <int count>
__device__ inline double warp_sum_of(const Numbers<count>& sums) {
    if constexpr (count == 1) {
        return sums.of[0] + __shfl_xor_sync(whole_warp, sums.of[0], sums_of_tile);
    } else {
        Numbers<count / 2> half;
        const bool upper = lane_id() & count / 2;
#pragma unroll
        for (int i = 0; i < count / 2; ++i) {
            const double lower = sums.of[i], higher = sums.of[i + count / 2];
            half.of[i] = (upper ? higher : lower) + __shfl_xor_sync(whole_warp, upper ? lower : higher, count / 2);
        }
        return warp_sum_of(half);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    moe_gate_kernel(const void* x, int64 x_type, int64 x_row, int64 x_column, const void* weight, int64 weight_type,
                    int64 weight_row, int64 weight_column, double* logits, int64 n, int64 e, int64 h) {
    SHARED_MEMORY(shared);
    double* warp_sums = reinterpret_cast<double*>(shared);  // [warps, 16]
    // Experts vary fastest: blocks that run together share tokens in the L2.
    const int64 tiles = (e + tile - 1) / tile, token = blockIdx.x / tiles * tile, expert = blockIdx.x % tiles * tile;
    const Matrix tokens = {x, x_type, x_row, x_column, n};
    const Matrix experts = {weight, weight_type, weight_row, weight_column, e};
    // So that a thread's second and third numbers come from the L2, without registers to wait in.
    if (threadIdx.x < tile)
        tokens.prefetch_row(token + threadIdx.x, h);
    else if (threadIdx.x < 2 * tile)
        experts.prefetch_row(expert + threadIdx.x - tile, h);
    const Sums sums = products(tokens, experts, token, expert, h);
    const double sum = warp_sum_of(sums);
    if (lane_id() < sums_of_tile) warp_sums[warp_id() * sums_of_tile + lane_id()] = sum;
    __syncthreads();
    const int sum_index = threadIdx.x;
    if (sum_index >= sums_of_tile || token + sum_index / tile >= n || expert + sum_index % tile >= e) return;
    double total = 0;
    for (int w = 0; w < int(blockDim.x) / lanes; ++w) total += warp_sums[w * sums_of_tile + sum_index];
    logits[(token + sum_index / tile) * e + expert + sum_index % tile] = total;
}
