#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

// out = source, number by number; of one dtype, or from bfloat16 and float16 to float.
struct CopyNumbers {
    View source, out;  // the same sizes, any strides
};
TT_KERNEL(copy_numbers, CopyNumbers)

// out[i] = table[ids[i]].
struct GatherRows {
    View table;         // [V, H]
    View ids;           // [N] int64
    View out;           // [N, H], dtype of the table, contiguous
    int64_t* stranger;  // a position whose id is outside the table, and whose row is left alone; -1: there is none
};
TT_KERNEL(gather_rows, GatherRows)

}  // namespace tt
