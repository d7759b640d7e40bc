// The mean of squares under a norm, per instruction set (see isa.h).
#pragma once

#include "rounding.h"

namespace tt {
namespace TT_ISA {

// A sum of squares in two levels: a long float sum errs with its length, and its error is one of every element of the
// norm.
template <class W>
struct Squares {
    Vector<W> partial{}, total{};  // of up to 16 vectors; of the full partial sums before
    int count = 0;                 // of vectors

    void add(Vector<W> x) {
        partial += x * x;
        if (++count % 16 == 0) {
            total += partial;
            partial = Vector<W>{};
        }
    }
    // 1 / sqrt(mean + eps)
    W inverse_root(int64_t n, double eps) const {
        return W(1 / __builtin_sqrt((sum_of(partial) + sum_of(total)) / double(n) + eps));
    }
};

}  // namespace TT_ISA
}  // namespace tt
