// The mean of squares under a norm, per instruction set (see isa.h).
#pragma once

#include "rounding.h"

namespace tt {
namespace TT_ISA {

// Sums in runs: a long float sum errs with its length, and its error is one of every element of the norm.
template <class W>
struct Squares {
    Vector<W> run{}, rest{};  // of 16 vectors, of the runs before
    int vectors = 0;

    void add(Vector<W> x) {
        run += x * x;
        if (++vectors % 16 == 0) {
            rest += run;
            run = Vector<W>{};
        }
    }
    // 1 / sqrt(mean + eps)
    W inverse_root(int64_t n, double eps) const {
        return W(1 / __builtin_sqrt((sum_of(run) + sum_of(rest)) / double(n) + eps));
    }
};

}  // namespace TT_ISA
}  // namespace tt
