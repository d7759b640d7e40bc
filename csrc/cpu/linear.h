#pragma once

#include "isa.h"
#include "packed_weight.h"
#include "view.h"

namespace tt {

// out = x weight^T + bias.
struct Linear {
    View x;       // [M, K]
    View weight;  // [N, K], dtype of x
    View bias;    // [N], any float, or null
    View out;     // [M, N] out, dtype of x, contiguous
};
TT_KERNEL_BF16(linear, Linear)

struct QuantizedLinear {
    View x;               // [M, K], not float64
    PackedWeight weight;  // [N, K]
    View bias;            // [N], any float, or null
    View out;             // [M, N] out, dtype of x, contiguous
};
TT_KERNEL_PAIRS(quantized_linear, QuantizedLinear)

}  // namespace tt
