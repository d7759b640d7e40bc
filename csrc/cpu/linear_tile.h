// Products of rows of activations with rows of a stored matrix, for any number of either, per instruction set (isa.h).
//
//     out[m][n] = sum over k of x[m][k] * w[n][k]
//
// Every output number is summed in one order, which neither the number of rows nor their blocking changes: k is cut
// into blocks of `k_block` steps from 0 on, a block is summed step by step in one lane of a vector, and the blocks'
// sums are added in ascending order. A step is one k, or a pair where the processor multiplies pairs of bfloat16. So a
// row's result is bit for bit the same alone as in any batch; and short sums err less than one long sum.
//
// Rows of w lie along the lanes, so w, which is stored row by row, is transposed square by square in registers: cheap
// beside reading it from memory where rows of x are few, and beside arithmetic where they are many. `n_block` rows of w
// by one block of k become a panel in the first-level cache, which serves many rows of x; a tile of `tile_rows` rows of
// x by `tile_vectors` vectors of rows of w is summed in registers. That is the blocking of Goto and van de Geijn
// (Anatomy of high-performance matrix multiplication, ACM TOMS 34, 2008).
//
// Measured on one core of a Zen 5 (290 GFLOP/s of float multiply-adds, 579 of bfloat16 pairs): 98 % of that in
// multiply_tile alone; 260 and 520 in the whole product with 256 rows of x and k 384. Tried and left: k along the lanes
// as in skinny.h, 170 and 290 there, for each number's lanes are added up; squares multiplied as they are, without a
// panel, which is slower from two rows of x on; blocks of 32 and of 128 steps, 2 to 4 % slower and no faster.
#pragma once

#include "bf16_dot.h"
#include "parallel.h"
#include "rounding.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

constexpr int k_block = 64;                                   // steps
constexpr int n_block = 64;                                   // rows of w
constexpr int tile_rows = 6;                                  // of x
constexpr int tile_vectors = vector_registers == 32 ? 4 : 2;  // of rows of w: sums and factors fit in the registers

// How numbers of T are multiplied and summed in W: a step takes `fold` numbers of a row, which are one `Packed`. A
// square's vectors hold `halves` steps each.
template <class T>
struct Steps {
    using W = Wide<T>;
    using Packed = W;
    using Operand = Vector<W>;
    using Square = Operand;
    static constexpr int fold = 1, halves = 1;
    static Operand load(const T* from) { return Load<W, T>::from(from); }  // as many steps as lanes
    static Square load_square(const T* from) { return load(from); }
    template <int half>
    static Operand step(Square v) {
        return v;
    }
};
template <class Packed>
struct Products {
    using W = Packed;
    using Operand = Vector<W>;
    static Operand repeated(Packed x) { return x - Operand{}; }
    static void add(Vector<W>& sum, Operand w, Operand x) { sum += w * x; }
};
template <>
struct Steps<bf16> {
    using W = float;
    using Square = WordVector;
    static Square load_square(const bf16* from) { return unaligned<WordVector>(from); }
#if defined(TT_BF16_DOT)
    using Packed = uint32_t;
    using Operand = WordVector;
    static constexpr int fold = 2, halves = 1;
    static Operand load(const bf16* from) { return unaligned<WordVector>(from); }
    template <int half>
    static Operand step(Square v) {
        return v;
    }
#else  // two numbers are transposed as one: a shift widens the even ones, a mask the odd ones
    using Packed = float;
    using Operand = FloatVector;
    static constexpr int fold = 1, halves = 2;
    static Operand load(const bf16* from) { return Load<float, bf16>::from(from); }
    template <int half>
    static Operand step(Square v) {
        return FloatVector(half == 0 ? v << 16 : v & 0xffff0000u);
    }
#endif
};
#if defined(TT_BF16_DOT)
template <>
struct Products<uint32_t> {
    using W = float;
    using Operand = WordVector;
    static RepeatedWord repeated(uint32_t x) { return TT_ISA::repeated(x); }
    static void add(FloatVector& sum, Operand w, RepeatedWord x) { sum = bf16_dot(sum, w, x); }
};
#endif

// What a square of w takes: rows, steps, and numbers of each row.
template <class T>
constexpr int square_rows = lanes_of<typename Steps<T>::W>;
template <class T>
constexpr int square_steps = square_rows<T> * Steps<T>::halves;
template <class T>
constexpr int square_numbers = square_steps<T> * Steps<T>::fold;
// A block of k is filled up with zeros to whole squares, and to a multiple of the steps that multiply_tile unrolls.
constexpr int unrolled = 4;
template <class T>
constexpr int64_t filled_up(int64_t n) {
    return up_to(n, square_numbers<T> > unrolled * Steps<T>::fold ? square_numbers<T> : unrolled * Steps<T>::fold);
}

// Rows of x as steps: block of k by block of k, [rows, k_block] each, filled up with zeros.
template <class T>
struct PackedRows {
    using Packed = typename Steps<T>::Packed;
    static constexpr int64_t block_numbers = int64_t(k_block) * Steps<T>::fold;
    Packed* data;
    int64_t rows, k;

    static int64_t width(int64_t k) { return up_to(k, block_numbers) / Steps<T>::fold; }  // steps of a row
    Packed* at(int64_t block, int64_t row) const { return data + (block * rows + row) * k_block; }
    // Rows [first, end); `from(row)` says where one lies.
    template <class F>
    void fill(int64_t first, int64_t end, F from) const {
        for (int64_t i = 0; i < k; i += block_numbers)
            for (int64_t row = first; row < end; ++row)
                fill(at(i / block_numbers, row), from(row) + i, smaller(block_numbers, k - i));
    }

   private:
    static void fill(Packed* to, const T* from, int64_t n) {
        constexpr int numbers = square_rows<T> * Steps<T>::fold;
        const auto put = [to](int64_t i, const T* values) {
            const auto v = Steps<T>::load(values);
            std::memcpy(to + i / Steps<T>::fold, &v, sizeof(v));
        };
        int64_t i = 0;
        for (; i + numbers <= n; i += numbers) put(i, from + i);
        for (; i < filled_up<T>(n); i += numbers) {
            T rest[numbers] = {};
            for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
            put(i, rest);
        }
    }
};

// Pieces of rows of w that will be wanted soon, brought near between other work.
struct Lookahead {
    const char* row;
    int64_t stride, bytes, rows;
    void fetch(int count) {
        for (int i = 0; i < count && rows > 0; ++i, --rows, row += stride)
            for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(row + offset);
    }
};

// GCC would rather read a value from memory for each use, where the loads bound the loop.
template <class V>
inline void hold_in_register(V& v) {
#if defined(__AVX512F__) && !defined(TT_EMULATE)
    asm("" : "+v"(v));
#elif defined(__x86_64__) && !defined(TT_EMULATE)
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

// --- squares of w ---------------------------------------------------------------------------------------------------

template <class T>
[[gnu::always_inline]] inline void load_square(typename Steps<T>::Square (&square)[square_rows<T>], const T* w,
                                               int64_t stride) {
#pragma GCC unroll 16
    for (int r = 0; r < square_rows<T>; ++r) square[r] = Steps<T>::load_square(w + r * stride);
    transpose(square);
}

// Rows of w, n_block at most.
template <class T>
struct WeightRows {
    const T* w;
    int64_t stride, rows;
};

// f(w, stride, r, i) for each square of the rows and of numbers [begin, end), from row r and number begin + i on. What
// lies beyond the rows or the numbers is zero.
template <class T, class F>
inline void for_squares(const WeightRows<T>& w, int64_t begin, int64_t end, F f) {
    constexpr int rows = square_rows<T>, numbers = square_numbers<T>;
    for (int64_t i = begin; i < begin + filled_up<T>(end - begin); i += numbers)
        for (int64_t r = 0; r < w.rows; r += rows) {
            const T* from = w.w + r * w.stride + smaller(i, end);
            if (r + rows <= w.rows && i + numbers <= end) {
                f(from, w.stride, r, i - begin);
                continue;
            }
            T rest[rows * numbers] = {};
            for (int64_t a = 0; a < smaller<int64_t>(rows, w.rows - r); ++a)
                for (int64_t b = 0; b < smaller<int64_t>(numbers, end - i); ++b)
                    rest[a * numbers + b] = from[a * w.stride + b];
            f(static_cast<const T*>(rest), int64_t(numbers), r, i - begin);
        }
}

// --- panels ---------------------------------------------------------------------------------------------------------

// A square of w into a panel: [step, V vectors], one of the V.
template <int V, class T>
[[gnu::noinline]] void pack_square(typename Steps<T>::Packed* to, const T* w, int64_t stride) {
    using S = Steps<T>;
    typename S::Square square[square_rows<T>];
    load_square<T>(square, w, stride);
    auto* at = reinterpret_cast<typename S::Operand*>(to);
#pragma GCC unroll 16
    for (int i = 0; i < square_rows<T>; ++i) {
        at[i * S::halves * V] = S::template step<0>(square[i]);
        if constexpr (S::halves == 2) at[(i * S::halves + 1) * V] = S::template step<1>(square[i]);
    }
}

// total[m][v] = or += the sum over `steps` steps of w[step][v] * x[m][step]; total's rows have n_block numbers.
template <int M, int V, class Packed>
[[gnu::noinline]] void multiply_tile(const Packed* w, const Packed* x, int64_t steps, bool first,
                                     typename Products<Packed>::W* total, Lookahead& wanted, int pieces) {
    using P = Products<Packed>;
    using Operand = typename P::Operand;
    using Sum = Vector<typename P::W>;
    constexpr int lanes = lanes_of<typename P::W>, line = 64 / int(sizeof(typename P::W));
    constexpr int lines = V * lanes > line ? V * lanes / line : 1;  // of a row of total
    Lookahead ahead = wanted;                                       // in registers
    Sum sums[M][V] = {};
    for (int64_t i = 0; i < steps; i += unrolled) {
        ahead.fetch(pieces);
        for (int64_t l = i / unrolled; l < M * lines; l += k_block / unrolled)  // these from there into the first
            __builtin_prefetch(total + l % M * n_block + l / M * line, 1);
#pragma GCC unroll 4
        for (int j = 0; j < unrolled; ++j, w += V * lanes) {
            Operand row[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) row[v] = reinterpret_cast<const Operand*>(w)[v];
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                auto column = P::repeated(x[m * k_block + i + j]);
                hold_in_register(column);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) P::add(sums[m][v], row[v], column);
            }
        }
    }
    wanted = ahead;
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Sum* to = reinterpret_cast<Sum*>(total + m * n_block + v * lanes);
            *to = first ? sums[m][v] : *to + sums[m][v];
        }
}

// The same for all `count` rows of x. finish(m, rows) is called for each tile.
template <int V, class Packed, class Finish>
void multiply_panel(const Packed* w, const Packed* x, int64_t count, int64_t steps, bool first,
                    typename Products<Packed>::W* total, Lookahead& ahead, int pieces, Finish finish) {
    const int64_t tiles = (count + tile_rows - 1) / tile_rows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m = count * t / tiles, rows = count * (t + 1) / tiles - m;
        const Packed* from = x + m * k_block;
        auto* to = total + m * n_block;
        switch (rows) {
            case 1: multiply_tile<1, V>(w, from, steps, first, to, ahead, pieces); break;
            case 2: multiply_tile<2, V>(w, from, steps, first, to, ahead, pieces); break;
            case 3: multiply_tile<3, V>(w, from, steps, first, to, ahead, pieces); break;
            case 4: multiply_tile<4, V>(w, from, steps, first, to, ahead, pieces); break;
            case 5: multiply_tile<5, V>(w, from, steps, first, to, ahead, pieces); break;
            default: multiply_tile<6, V>(w, from, steps, first, to, ahead, pieces);
        }
        finish(m, rows);
    }
}

// The sums total[m][n] for `count` rows of x from `first_row` on, and the rows of w: n_block numbers for each row of x.
// As soon as those of the columns [n, n + columns) are complete for rows [m, m + rows), finish(m, rows, n, columns) is
// called. `next`: rows of w that will be wanted after these. `panel` has room for n_block * k_block steps.
template <int V, class T, class Finish>
void multiply(const WeightRows<T>& w, const WeightRows<T>& next, const PackedRows<T>& x, int64_t first_row,
              int64_t count, typename Steps<T>::Packed* panel, typename Steps<T>::W* total, Finish finish) {
    constexpr int64_t fold = Steps<T>::fold, group = V * square_rows<T>;
    const int64_t tiles = (count + tile_rows - 1) / tile_rows * ((w.rows + group - 1) / group);
    const bool few = count <= tile_rows;
    for (int64_t begin = 0, block = 0; begin < x.k; begin += x.block_numbers, ++block) {
        const int64_t end = smaller(begin + x.block_numbers, x.k);
        const int64_t steps = filled_up<T>(end - begin) / fold;
        const bool last = end == x.k;
        const WeightRows<T>& soon = last ? next : w;
        const int64_t from = last ? 0 : end;
        Lookahead ahead = {reinterpret_cast<const char*>(soon.w + from), soon.stride * int64_t(sizeof(T)),
                           smaller(x.block_numbers, x.k - from) * int64_t(sizeof(T)), soon.rows};
        // Fetched evenly, for a burst would be what the processor waits for: between all steps, and between squares
        // where these take as long.
        const int64_t squares = (w.rows + square_rows<T> - 1) / square_rows<T> * (steps / square_steps<T>);
        const int64_t places = (few ? squares : 0) + tiles * (steps / unrolled);
        const int pieces = int((soon.rows + places - 1) / places);
        for_squares<T>(w, begin, end, [&](const T* square, int64_t stride, int64_t r, int64_t i) {
            if (few) ahead.fetch(pieces);
            pack_square<V>(panel + r / group * (group * k_block) + r % group + i / fold * group, square, stride);
        });
        for (int64_t r = 0; r < w.rows; r += group)
            multiply_panel<V>(panel + r * k_block, x.at(block, first_row), count, steps, begin == 0, total + r, ahead,
                              pieces, [&](int64_t m, int64_t rows) {
                                  if (last) finish(m, rows, r, smaller(group, w.rows - r));
                              });
    }
}

}  // namespace TT_ISA
}  // namespace tt
