// out = x weight^T + bias for a few rows of x, summed in float (double for double) and rounded once.
//
// With few rows this is the reading of the weight, so work is cut along its rows, 16 of them per piece, and every piece
// takes all rows of x (see skinny.h). With many rows a library that blocks all three dimensions wins; the public side,
// twotower_kernels/ops/linear.py, draws the line.
#include "linear.h"

#include "numeric.h"
#include "parallel.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

namespace {

template <class T>
void product(const Linear& a) {
    using W = Wide<T>;
    using P = Panel<W, T>;
    const int64_t m_size = a.x.size[0], k = a.x.size[1], n = a.weight.size[0], stride = a.weight.stride[0];
    if (m_size == 0) return;
    Scratch<typename P::Kept> x(m_size, P::padded(k));
    parallel_for(m_size, larger<int64_t>(1, 16384 / larger<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
        for_panels<W, T>(x, m_size, k, [&](auto panel, int64_t first) {
            for (int64_t m = larger<int64_t>(0, begin - first); m < smaller(panel.count, end - first); ++m)
                panel.fill(m, a.x, (first + m) * a.x.stride[0], k);
        });
    });
    const int64_t blocks = (n + skinny_rows - 1) / skinny_rows;
    // About 2^16 products are worth a thread's while.
    const int64_t worth = larger<int64_t>(1, 65536 / larger<int64_t>(1, skinny_rows * k));
    parallel_for(blocks, worth, [&](int64_t begin, int64_t end) {
        W y[skinny_panel * skinny_rows], bias[skinny_rows] = {};
        for (int64_t block = begin; block < end; ++block) {
            const int64_t r0 = block * skinny_rows;
            const int rows = int(smaller<int64_t>(skinny_rows, n - r0));
            const T *w = a.weight.as<T>() + r0 * stride, *next = block + 1 < end ? w + skinny_rows * stride : w;
            if (a.bias) load<W>(bias, a.bias, r0, rows);
            for_panels<W, T>(x, m_size, k, [&](auto panel, int64_t first) {
                skinny(w, stride, rows, panel, k, next, y);
                next = w;  // fetched already
                for (int64_t m = 0; m < panel.count; ++m) {
                    T* out = a.out.as<T>() + (first + m) * n + r0;
                    for (int r = 0; r < rows; ++r) out[r] = narrow<T>(y[m * skinny_rows + r] + bias[r]);
                }
            });
        }
    });
}

}  // namespace

void linear(const Linear& a) {
    for_fast(a.x.dtype, [&](auto type) { product<typename decltype(type)::type>(a); }, [&] { baseline::linear(a); });
}

}  // namespace TT_ISA
}  // namespace tt
