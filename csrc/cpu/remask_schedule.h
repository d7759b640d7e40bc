// What both kernels share and makes of a policy what a step does: how many positions it due (remask_schedule.h), and
// what becomes of a row's and a position's numbers (remask_rule.h), both in csrc/cuda.
#pragma once

#include <cmath>

#include "remask.h"

namespace tt {
namespace TT_ISA {

#define REMASK_FUNCTION inline
REMASK_FUNCTION double quarter_cosine(double t) {
    return ::cos(1.5707963267948966 * t);  // pi / 2
}
REMASK_FUNCTION double quarter_sine(double t) {
    return ::sin(1.5707963267948966 * t);
}
#include "../common/remask_rule.h"
#include "../common/remask_schedule.h"

}  // namespace TT_ISA
}  // namespace tt
