#pragma once

#include "view.h"

namespace tt {

// A quantized matrix [R, K], or one per expert [E, R, K] (reference/quantization.py).
struct PackedWeight {
    enum Format : int { int8, int4, fp8, e2m1 };  // how a code is read; what its scales are says their dtype
    View data;    // [..., R, K] or, of four bits, [..., R, K / 2]: bytes, rows contiguous
    View scales;  // [..., R, K / group], float32, bfloat16, or bytes: e4m3 with `whole`, exponents without
    View whole;   // [E], of a matrix [1], float32; or null
    Format format;
    int64_t columns, group;  // K; columns per scale

    explicit operator bool() const { return bool(data); }
};

}  // namespace tt
