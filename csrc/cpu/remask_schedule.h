// How many positions a step owes: what csrc/cuda/remask_schedule.h, which both kernels share, makes of a policy.
#pragma once

#include <cmath>

#include "remask.h"

namespace tt {
namespace TT_ISA {

#define REMASK_FUNCTION inline
REMASK_FUNCTION double quarter_cosine(double t) {
    return ::cos(1.5707963267948966 * t);  // pi / 2
}
#include "../cuda/remask_schedule.h"

}  // namespace TT_ISA
}  // namespace tt
