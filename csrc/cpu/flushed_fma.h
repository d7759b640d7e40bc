// The multiply-add of the bfloat16 instructions for where they are emulated (bf16_dot.h, amx.h): rounded once, to
// nearest, and subnormal numbers are zeros, those that come in and those that come out.
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

inline FloatVector flushed(FloatVector x) {
    const WordVector bits = (WordVector)x;
    return (FloatVector)((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// x y + z, of a z that has been flushed.
inline FloatVector flushed_fma(WordVector x, WordVector y, FloatVector z) {
    const FloatVector p = flushed((FloatVector)x), q = flushed((FloatVector)y);
    for (int i = 0; i < int(sizeof(z) / sizeof(z[0])); ++i) z[i] = std::fma(p[i], q[i], z[i]);
    return flushed(z);
}

}  // namespace TT_ISA
}  // namespace tt
