// The types of the numbers that the router takes (moe_gate.cu, moe_gate_tiled.cu, moe_route.cu), widened to double.
#pragma once

#include "warp.h"

struct Bfloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

__device__ inline double widened(double x) {
    return x;
}
__device__ inline double widened(float x) {
    return x;
}
__device__ inline double widened(Bfloat16 x) {
    return widen_bf16(x.bits);
}
__device__ inline double widened(Float16 x) {
    return widen_fp16(x.bits);
}
