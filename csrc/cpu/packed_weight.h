#pragma once

#include "view.h"

namespace tt {

// A quantized matrix [R, K], or one per expert [E, R, K] (reference/quantization.py).
struct PackedWeight {
    enum Format : int { int8, int4, fp8, e2m1 };  // how a code is read; how a scale is, says its dtype
    View data;    // [..., R, K] or, of four bits, [..., R, K / 2], of one byte each; rows contiguous
    View scales;  // [..., R, K / group], rows contiguous: float32, bfloat16, float8 (e4m3) or byte (exponents)
    View whole;   // [E], of a matrix [1], float32; or null: 1
    Format format;
    int64_t columns, group;  // K; columns per scale

    explicit operator bool() const { return bool(data); }
};

}  // namespace tt
