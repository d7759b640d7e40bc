// out = x weight^T + bias, summed in float (double for double) and rounded once, in one order of summation whatever
// the number of rows (see linear_tile.h). Where there is AMX, linear_amx.h has bfloat16.
//
// A piece of work is n_block rows of the weight by all rows of x. With few rows it is the reading of the weight, which
// comes faster where fewer rows of it are read side by side: 2 vectors of them. (Measured on two cores of a Zen 5, one
// row of x: 1.06 ms where n_block rows took 1.2, one vector 1.6, in bfloat16, 2688 to 10304; in float32 2.0, 2.7, 2.9.)
// With many, a chunk of rows of x is packed at a time, which bounds the scratch memory.
#include "linear.h"

#include "linear_amx.h"
#include "linear_tile.h"
#include "numeric.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int few_vectors = 2;  // of rows of the weight, read side by side for few rows of x
constexpr int64_t packed_bytes = 1 << 23, packed_rows = 1024;  // of x at a time, the larger of the two
// Parts of x that share one transposition of the weight: at most so many bytes, which the last-level cache keeps, and
// rows; at least so many rows, as each part transposes the weight anew.
constexpr int64_t part_bytes = 1 << 22, most_rows = 1024, least_rows = 128;

// Columns [n, n + columns) of some rows of out. `total` and `bias` begin at column n, bias with n_block numbers.
template <class T>
void store(const Wide<T>* total, int64_t rows, int64_t columns, const Wide<T>* bias, T* out, int64_t out_stride) {
    using W = Wide<T>;
    for (int64_t m = 0; m < rows; ++m, total += n_block, out += out_stride)
        for_vectors<W>(columns, [=](int64_t n, auto some) {
            store_some<T>(out + n, load_some<W>(total + n, some) + load_some<W>(bias + n, some), some);
        });
}

// out's rows from `out` on, of which x are packed.
template <class T>
void product(const Linear& a, const PackedRows<T>& x, T* out) {
    using W = Wide<T>;
    const int64_t n = a.weight.size[0], stride = a.weight.stride[0], blocks = (n + n_block - 1) / n_block;
    const T* weight = a.weight.as<T>();
    const auto rows_of = [=](int64_t block) {
        const int64_t r = block * n_block;
        return WeightRows<T>{weight + r * stride, stride, smaller<int64_t>(n_block, n - r)};
    };
    const int64_t row_bytes = larger<int64_t>(1, x.width(x.k) * int64_t(sizeof(*x.data)));
    const int64_t cached = smaller(most_rows, larger(least_rows, part_bytes / row_bytes));
    // Where blocks are few, the rows of x are parted as well, so that all threads finish together.
    const int64_t wanted = smaller((8 * max_threads() + blocks - 1) / blocks, x.rows / least_rows);
    const int64_t parts = larger((x.rows + cached - 1) / cached, wanted), most = (x.rows + parts - 1) / parts;
    // About 2^16 products are worth a thread's while.
    const int64_t products = n_block * larger<int64_t>(1, x.k) * most;
    parallel_for(parts * blocks, larger<int64_t>(1, 65536 / products), [&](int64_t begin, int64_t end) {
        Scratch<typename Steps<T>::Packed> panel(n_block, k_block);
        Scratch<W> total(most, n_block);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t part = piece / blocks, block = piece % blocks;
            const int64_t first = x.rows * part / parts, count = x.rows * (part + 1) / parts - first;
            const WeightRows<T> w = rows_of(block);
            WeightRows<T> next = rows_of((block + 1) % blocks);
            if (piece + 1 == end) next.rows = 0;
            W bias[n_block] = {};
            if (a.bias) load<W>(bias, a.bias, block * n_block, w.rows);
            T* to = out + first * n + block * n_block;
            const auto finish = [=, &total, &bias](int64_t m, int64_t rows, int64_t r, int64_t columns) {
                store<T>(total + m * n_block + r, rows, columns, bias + r, to + m * n + r, n);
            };
            if (count <= tile_rows && x.k > 0) {
                constexpr int64_t group = few_vectors * square_rows<T>;
                const auto from = [&](const WeightRows<T>& all, int64_t r) {
                    return WeightRows<T>{all.w + r * stride, stride, smaller(group, all.rows - r)};
                };
                for (int64_t r = 0; r < w.rows; r += group)
                    multiply<few_vectors>(
                        from(w, r), r + group < w.rows ? from(w, r + group) : from(next, 0), x, first, count, panel,
                        total + r,
                        [&](int64_t m, int64_t rows, int64_t c, int64_t columns) { finish(m, rows, r + c, columns); });
                continue;
            }
            if (w.rows == n_block)
                multiply<tile_vectors>(w, next, x, first, count, panel, total, finish);
            else
                multiply<1>(w, next, x, first, count, panel, total, finish);
            if (x.k > 0) continue;
            for (int64_t i = 0; i < count * n_block; ++i) total[i] = 0;
            finish(0, count, 0, w.rows);
        }
    });
}

template <class T>
void product(const Linear& a) {
    using P = PackedRows<T>;
    const int64_t rows = a.x.size[0], k = a.x.size[1], n = a.weight.size[0];
    if (rows == 0 || n == 0) return;
    const int64_t row_bytes = P::width(k) * int64_t(sizeof(typename P::Packed));
    const int64_t chunk = larger(packed_rows, packed_bytes / larger<int64_t>(1, row_bytes));
    const int64_t chunks = (rows + chunk - 1) / chunk;
    Scratch<typename P::Packed> data(smaller(rows, chunk), P::width(k));
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t begin = rows * c / chunks;
        const P x = {data, rows * (c + 1) / chunks - begin, k};
        const auto from = [&](int64_t m) { return a.x.as<T>() + (begin + m) * a.x.stride[0]; };
        parallel_for(x.rows, larger<int64_t>(1, 16384 / larger<int64_t>(1, k)),
                     [&](int64_t first, int64_t end) { x.fill(first, end, from); });
        product<T>(a, x, a.out.as<T>() + begin * n);
    }
}

}  // namespace

void linear(const Linear& a) {
#if defined(TT_AMX)
    if (a.x.dtype == DType::bfloat16) return linear_by_tiles(a);
#endif
    for_fast(a.x.dtype, [&](auto type) { product<typename decltype(type)::type>(a); }, [&] { baseline::linear(a); });
}

}  // namespace TT_ISA
}  // namespace tt
