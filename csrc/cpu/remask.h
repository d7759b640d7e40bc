#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

using int64 = int64_t;  // the name in what both kernels share
#include "../common/remask_policy.h"
#define REMASK_METHOD __attribute__((always_inline))  // one of a processor's instruction sets serves no other (isa.h)
#include "../common/remask_arguments.h"

// Of the arguments, tokens that are listed are sorted, and logits_stride_v is 1.
TT_KERNEL(remask, Remask)

}  // namespace tt
