// Products of stored matrices with a few rows of activations, per instruction set (see isa.h).
//
//     out[m][r] = sum over i < n of w[r][i] * x[m][i]         16 rows of w at most, a panel of rows of x
//
// With few rows of x this is bound by the memory that w lies in, so w is read once, as it is stored, and made operands
// in registers; all rows of x are multiplied while the 16 rows of w are in the second-level cache, and the 16 that come
// next are fetched into it meanwhile, evenly: a burst would be what the processor waits for. With more rows it is bound
// by arithmetic, so a tile of R rows of w and M rows of x is held in registers, and x is kept as the tile reads it:
// step by step of i, the rows' vectors one after the other.
//
// A product is summed in vector lanes over stretches, these are added up, and the lanes last. That order does not
// depend on R, M or the number of rows, so a row's result is bit for bit the same alone as in a batch; and short
// stretches err less than one long sum. Where there is AMX, skinny_amx.h has bfloat16.
//
// Measured on one core of a Zen 3 (102 GFLOP/s of multiply-adds), 16 rows of x and a tile of w in the cache, in
// GFLOP/s: bfloat16 74, float 75, double 40. With x row by row instead of in panels: 68, 65, 34. On one of a Zen 4 with
// AVX512-BF16 (234 and 117): bfloat16 200, float 102, double 53; with sums of lanes taken one by one, 161 and 97.
#pragma once

#include "bf16_dot.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

constexpr int skinny_rows = 16;   // rows of w per call
constexpr int skinny_panel = 20;  // rows of x per call at most: a stretch of them stays in the first-level cache

// How elements meet: `step` of them from a row of w make `parts` operands, and x is kept as what makes the same ones.
template <class W, class T>
struct Factors {
    using Kept = W;
    using Operand = Vector<W>;
    static constexpr int step = lanes_of<W>, parts = 1;
    static int place(int i) { return i; }  // where in its step element i of x is kept
    static Kept kept(W x) { return x; }
    template <int part>
    static Operand of(const T* w) {
        return Load<W, T>::from(w);
    }
    static void add(Vector<W>& sum, Operand w, Operand x) { sum += w * x; }
};
template <>
struct Factors<float, bf16> {
    static constexpr int step = 2 * lanes_of<float>;
#if defined(TT_BF16_DOT)  // nothing is widened: x was bfloat16 before it came here
    using Kept = bf16;
    using Operand = WordVector;
    static constexpr int parts = 1;
    static int place(int i) { return i; }
    static Kept kept(float x) { return {uint16_t(bit_cast<uint32_t>(x) >> 16)}; }
    template <int part>
    static Operand of(const bf16* w) {
        return unaligned<WordVector>(w);
    }
    static void add(FloatVector& sum, Operand w, Operand x) { sum = bf16_dot(sum, w, x); }
#else  // a 32-bit word holds two numbers: a shift widens the even ones, a mask the odd ones
    using Kept = float;
    using Operand = FloatVector;
    static constexpr int parts = 2;
    static int place(int i) { return i % 2 * lanes_of<float> + i / 2; }
    static Kept kept(float x) { return x; }
    template <int part>
    static Operand of(const bf16* w) {
        const WordVector words = unaligned<WordVector>(w);
        return FloatVector(part == 0 ? words << 16 : words & 0xffff0000u);
    }
    static void add(FloatVector& sum, Operand w, Operand x) { sum += w * x; }
#endif
};

// Some rows of x, at most skinny_panel, as products with rows of T read them.
template <class W, class T>
struct Panel {
    using F = Factors<W, T>;
    using Kept = typename F::Kept;
    static constexpr int tile = 1, most = skinny_panel, spare = 0;  // see skinny_amx.h
    Kept* data;
    int64_t count;

    static int64_t padded(int64_t n) { return up_to(n, F::step); }  // elements that a row takes
    Kept* at(int64_t row, int64_t i) const { return data + (i / F::step * count + row) * F::step; }
    void put(int64_t row, int64_t i, W x) const { at(row, i)[F::place(int(i % F::step))] = F::kept(x); }
    void put(int64_t row, int64_t i, const W* values, int count) const {  // within a step, or each by itself
        const int first = int(i % F::step);
        if (first + count > F::step) {
            for (int r = 0; r < count; ++r) put(row, i + r, values[r]);
            return;
        }
        Kept* to = at(row, i);
        for (int r = 0; r < count; ++r) to[F::place(first + r)] = F::kept(values[r]);
    }
    void clear(int64_t row, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i) put(row, i, 0);
    }
    // A row of n elements from a tensor, `offset` elements in.
    void fill(int64_t row, const View& x, int64_t offset, int64_t n) const {
        constexpr int some = 256;
        W values[some];
        for (int64_t i = 0; i < n; i += some) {
            const int64_t left = smaller<int64_t>(some, n - i), whole = padded(left);
            load<W>(values, x, offset + i, left);
            for (int64_t j = left; j < whole; ++j) values[j] = 0;
            for (int64_t j = 0; j < whole; j += F::step) {
                Kept* to = at(row, i + j);
                for (int l = 0; l < F::step; ++l) to[F::place(l)] = F::kept(values[j + l]);
            }
        }
    }
};

// `count` rows of x as panels of nearly equal size: f(panel, its first row). Their storage is padded(n) a row.
template <class W, class T, class Function>
inline void for_panels(typename Factors<W, T>::Kept* data, int64_t count, int64_t n, Function f) {
    using P = Panel<W, T>;
    const int64_t panels = (count + P::most - 1) / P::most, row = P::padded(n), tiles = (count + P::tile - 1) / P::tile;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = tiles * p / panels * P::tile, end = smaller(count, tiles * (p + 1) / panels * P::tile);
        f(P{data + first * row, end - first}, first);
    }
}

// What a thread holds while it multiplies rows of T.
template <class T>
struct SkinnyThread {};

// GCC 12 would rather read a value from memory for each use, where the loads bound the loop.
template <class V>
inline void in_register(V& v) {
#if defined(__x86_64__) && !defined(TT_EMULATE)
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

template <int part, int R, int M, class W, class T>
inline void add_part(const T* w, int64_t w_stride, const typename Factors<W, T>::Kept* x, Vector<W> (&sums)[R][M]) {
    using F = Factors<W, T>;
    typename F::Operand row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = F::template of<part>(w + r * w_stride);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
        auto column = unaligned<typename F::Operand>(x + m * F::step + part * (F::step / F::parts));
        if (R > 1) in_register(column);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) F::add(sums[r][m], row[r], column);
    }
}

// Rows of w that will be wanted soon, brought into the second-level cache line by line.
struct Prefetch {
    const char *next, *end;
    int lines;  // of a go
    inline void fetch() {
        if (next >= end) return;
#pragma GCC unroll 1
        for (int i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// How many products are summed in one go.
template <class W, class T>
constexpr int64_t skinny_stretch = 1024 / int64_t(sizeof(typename Factors<W, T>::Kept));

// Adds the products of R rows of w and the panel's M rows from `first` on, over the whole steps of [begin, end), to
// total[r][m], whose rows are as long as the panel has.
template <int R, int M, class W, class T>
inline void add_tile(const T* w, int64_t w_stride, const Panel<W, T>& x, int first, int64_t begin, int64_t end,
                     Prefetch& ahead, Vector<W>* total) {
    using F = Factors<W, T>;
    const int64_t x_step = x.count * F::step;
    for (int64_t start = begin; start < end; start += skinny_stretch<W, T>) {
        Vector<W> sums[R][M] = {};
        const typename F::Kept* from = x.at(first, start);
        const int64_t stop = smaller(start + skinny_stretch<W, T>, end);
#pragma GCC unroll 1
        for (int64_t i = start; i < stop; i += F::step, from += x_step) {
            ahead.fetch();
            add_part<0, R, M, W, T>(w + i, w_stride, from, sums);
            if constexpr (F::parts == 2) add_part<1, R, M, W, T>(w + i, w_stride, from, sums);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) total[r * x.count + m] += sums[r][m];
    }
}

// The same for `rows` rows of w, a multiple of 4.
template <int M, class W, class T>
void add_rows(const T* w, int64_t w_stride, int rows, const Panel<W, T>& x, int first, int64_t begin, int64_t end,
              Prefetch& ahead, Vector<W>* total) {
    constexpr int R = M <= 2 || vector_registers == 32 ? 4 : 2;
    for (int r = 0; r < rows; r += R)
        add_tile<R, M, W, T>(w + r * w_stride, w_stride, x, first, begin, end, ahead, total + r * x.count);
}

// What tiles leave over: a matrix's last rows, when they are not a multiple of 4, and the end of every row.
template <class W, class T>
[[gnu::noinline]] void add_last_rows(const T* w, int64_t w_stride, int rows, const Panel<W, T>& x, int64_t end,
                                     Vector<W>* total) {
    Prefetch nothing = {nullptr, nullptr, 0};
    for (int r = 0; r < rows; ++r)
        for (int m = 0; m < x.count; ++m)
            add_tile<1, 1, W, T>(w + r * w_stride, w_stride, x, m, 0, end, nothing, total + r * x.count + m);
}
template <class W, class T>
[[gnu::noinline]] void add_last_step(const T* w, int64_t w_stride, int rows, const Panel<W, T>& x, int64_t begin,
                                     int64_t n, Vector<W>* total) {
    using F = Factors<W, T>;
    for (int r = 0; r < rows; ++r) {
        T rest[F::step] = {};  // filled up with zeros: what lies behind a row may be anything
        for (int64_t i = begin; i < n; ++i) rest[i - begin] = w[r * w_stride + i];
        for (int m = 0; m < x.count; ++m) {
            Vector<W> sums[1][1] = {};
            add_part<0, 1, 1, W, T>(rest, 0, x.at(m, begin), sums);
            if constexpr (F::parts == 2) add_part<1, 1, 1, W, T>(rest, 0, x.at(m, begin), sums);
            total[r * x.count + m] += sums[0][0];
        }
    }
}

// out[m * 16 + r] = the sum of the lanes of total[r][m]; 0 for r from `rows` to 16. Vectors' halves are added, then
// halves of these, as when numbers are transposed, so that as many vectors as they have lanes become one.
template <class W>
[[gnu::noinline]] void add_lanes(const Vector<W>* total, int rows, int count, W* out) {
    constexpr int lanes = lanes_of<W>;
    for (int m = 0; m < count; ++m)
        for (int r = 0; r < skinny_rows; r += lanes) {
            Vector<W> v[lanes];
            for (int i = 0; i < lanes; ++i) v[i] = r + i < rows ? total[(r + i) * count + m] : Vector<W>{};
            const Vector<W> sums = sums_across(v);
            std::memcpy(out + m * skinny_rows + r, &sums, sizeof(sums));
        }
}

// out[m * 16 + r], r < rows <= 16, for the rows m of a panel. `next`: rows of w that will be wanted after these, laid
// out like them, or these again where nothing is known.
template <class W, class T>
void skinny(const T* w, int64_t w_stride, int rows, const Panel<W, T>& x, int64_t n, const T* next, W* out) {
    using F = Factors<W, T>;
    constexpr int tile = F::parts == 2 && vector_registers == 16 ? 5 : 6;
    const int count = int(x.count), tiles = (count + tile - 1) / tile, whole_rows = rows / 4 * 4;
    const int64_t whole = n / F::step * F::step;
    Vector<W> total[skinny_rows * skinny_panel];
    for (int i = 0; i < rows * count; ++i) total[i] = Vector<W>{};
    // A panel that fits in the first-level cache: w is streamed row by row. Otherwise stretch by stretch.
    const int64_t run = count * n * int64_t(sizeof(*x.data)) <= 24576 ? n : skinny_stretch<W, T>;
    // One tile of 4 rows takes 4 lines of w a step; of more tiles, each fetches its share. Rows with gaps are not
    // fetched.
    const char* first_line = reinterpret_cast<const char*>(next);
    const bool wanted = next != w && w_stride == n;
    Prefetch ahead = {first_line, first_line + (wanted ? rows * n * int64_t(sizeof(T)) : 0), (4 + tiles - 1) / tiles};
    for (int64_t begin = 0; begin < whole; begin += run) {
        const int64_t end = smaller(begin + run, whole);
        for (int t = 0; t < tiles; ++t) {
            const int first = count * t / tiles;
            Vector<W>* to = total + first;
            switch (count * (t + 1) / tiles - first) {
                case 1: add_rows<1>(w, w_stride, whole_rows, x, first, begin, end, ahead, to); break;
                case 2: add_rows<2>(w, w_stride, whole_rows, x, first, begin, end, ahead, to); break;
                case 3: add_rows<3>(w, w_stride, whole_rows, x, first, begin, end, ahead, to); break;
                case 4: add_rows<4>(w, w_stride, whole_rows, x, first, begin, end, ahead, to); break;
                case 5: add_rows<5>(w, w_stride, whole_rows, x, first, begin, end, ahead, to); break;
                default:
                    if constexpr (tile == 6) add_rows<6>(w, w_stride, whole_rows, x, first, begin, end, ahead, to);
            }
        }
    }
    if (whole_rows < rows)
        add_last_rows(w + whole_rows * w_stride, w_stride, rows - whole_rows, x, whole, total + whole_rows * count);
    if (whole < n) add_last_step(w, w_stride, rows, x, whole, n, total);
    add_lanes<W>(total, rows, count, out);
}

}  // namespace TT_ISA
}  // namespace tt

#include "skinny_amx.h"
