// Products of quantized matrices with a few rows of activations, per instruction set (see isa.h).
//
//     out[m][r] = sum over groups g of scale[r][g] * (sum over i of g of code[r][i] * x[m][i])
//
// As skinny.h, this is the reading of weights; they are read as they are stored, and codes become operands in
// registers. A code is exact in bfloat16, so with bfloat16 activations the pairs of AVX512-BF16 and Arm multiply codes,
// and a group's sum is scaled in float; elsewhere codes are floats. Nothing is rounded but sums.
//
// A step is a vector of 32-bit words from a row: 8 columns in each lane of 4-bit codes, 4 of 8-bit ones. An operand
// takes the same column (or pair of columns) of every lane, so x is kept in that order, and a lane belongs to one
// group, for groups are of 16 columns or more: the sums of a step times one vector of scales.
//
// The order of a sum depends on the step alone, not on the rows of x or their number: a row's bits are its own.
#pragma once

#include <type_traits>

#include "codes.h"
#include "moe_schedule.h"
#include "packed_weight.h"
#include "parallel.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

// Tags in the place of a weight's type: codes of four or eight bits, multiplied as pairs of bfloat16 or as floats.
template <int bits, bool pairs>
struct Codes {};

#if defined(TT_BF16_DOT)
template <int bits, class T>
using CodesFor = Codes<bits, std::is_same<T, bf16>::value>;
#else
template <int bits, class T>
using CodesFor = Codes<bits, false>;
#endif

template <bool pairs>
struct CodeOperand {
    using type = FloatVector;
};
template <>
struct CodeOperand<true> {
    using type = WordVector;
};

template <int bits, bool pairs>
struct Factors<float, Codes<bits, pairs>> {
    static constexpr int in_word = 32 / bits;                    // columns
    static constexpr int step = lanes_of<float> * in_word;       // columns
    static constexpr int parts = pairs ? in_word / 2 : in_word;  // operands
    static constexpr int bytes = TT_VECTOR_BYTES;                // of a row's codes
    using Kept = typename std::conditional<pairs, bf16, float>::type;
    using Operand = typename CodeOperand<pairs>::type;
    static int place(int i) {
        const int lane = i / in_word, column = i % in_word;
        return pairs ? column / 2 * (2 * lanes_of<float>)+2 * lane + column % 2 : column * lanes_of<float> + lane;
    }
    static Kept kept(float x) {
        if constexpr (pairs)
            return {uint16_t(bit_cast<uint32_t>(x) >> 16)};
        else
            return x;
    }
    static void add(FloatVector& sum, Operand w, Operand x) {
#if defined(TT_BF16_DOT)
        if constexpr (pairs)
            sum = bf16_dot(sum, w, x);
        else
#endif
            sum += w * x;
    }
};

// --- products -------------------------------------------------------------------------------------------------------

// R rows of codes, and their scales.
template <int R>
struct CodeRows {
    const char* words[R];
    const float* scales[R];  // null: one for the whole row, by which sums are multiplied in the end
};

// A step's words of a row with n columns; behind them codes of 0.
template <PackedWeight::Format format, class F>
inline WordVector words_of(const char* row, int64_t step, int64_t n) {
    const char* from = row + step * F::bytes;
    if ((step + 1) * F::step <= n) return unaligned<WordVector>(from);
    char rest[F::bytes];
    std::memset(rest, format == PackedWeight::int4 ? 0x88 : 0, sizeof(rest));
    std::memcpy(rest, from, size_t((n - step * F::step) * F::bytes / F::step));
    return unaligned<WordVector>(rest);
}

// total[r][m] += the products of a step's codes with the panel's M rows from `first` on.
template <PackedWeight::Format format, int R, int M, class Q>
[[gnu::always_inline]] inline void add_step(const WordVector (&words)[R], const typename Factors<float, Q>::Kept* x,
                                            FloatVector (&sums)[R][M]) {
    using F = Factors<float, Q>;
    constexpr bool pairs = !std::is_same<typename F::Kept, float>::value;
#pragma GCC unroll 8
    for (int part = 0; part < F::parts; ++part) {
        typename F::Operand row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = operand<format, pairs>(words[r], part);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            auto column = unaligned<typename F::Operand>(x + m * F::step + part * (F::step / F::parts));
            if (R > 1) in_register(column);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) F::add(sums[r][m], row[r], column);
        }
    }
}

template <PackedWeight::Format format, int R, int M, class Q>
[[gnu::noinline]] void add_code_rows(const CodeRows<R>& w, const LaneScales& lanes, const Panel<float, Q>& x, int first,
                                     int64_t n, Prefetch& ahead, FloatVector* total) {
    using F = Factors<float, Q>;
    FloatVector all[R][M] = {};
    const typename F::Kept* from = x.at(first, 0);
    const int64_t x_step = x.count * F::step;
    const auto add = [&](const WordVector(&words)[R], int64_t i) {
        if (w.scales[0] == nullptr) return add_step<format, R, M, Q>(words, from, all);
        FloatVector sums[R][M] = {};
        add_step<format, R, M, Q>(words, from, sums);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const FloatVector scale = lanes.at(w.scales[r], i);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) all[r][m] += scale * sums[r][m];
        }
    };
#pragma GCC unroll 1
    for (int64_t step = 0; step * F::step < n; ++step, from += x_step) {
        ahead.fetch();
        WordVector words[R];
        for (int r = 0; r < R; ++r) words[r] = words_of<format, F>(w.words[r], step, n);
        add(words, step * F::step);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r * x.count + m] = all[r][m];
}

// With more rows of x than a tile has, codes of 8 bits become operands once for all tiles: those of a stretch of steps,
// [step][part][row]. All rows of w go over a stretch before the next, so that x's stays in the first-level cache. Codes
// of 4 bits are operands sooner than they are stored and loaded.
constexpr int widest_tile = vector_registers == 32 ? 6 : 2;  // rows of x
constexpr int decoded_rows = 2, decoded_steps = 4;

template <PackedWeight::Format format, class Q>
[[gnu::noinline]] void decode(const CodeRows<decoded_rows>& w, int64_t begin, int64_t end, int64_t n,
                              typename Factors<float, Q>::Operand* to) {
    using F = Factors<float, Q>;
    constexpr bool pairs = !std::is_same<typename F::Kept, float>::value;
    for (int64_t step = begin; step < end; ++step)
        for (int r = 0; r < decoded_rows; ++r) {
            const WordVector words = words_of<format, F>(w.words[r], step, n);
#pragma GCC unroll 8
            for (int part = 0; part < F::parts; ++part)
                to[((step - begin) * F::parts + part) * decoded_rows + r] = operand<format, pairs>(words, part);
        }
}

// As add_code_rows, for the steps [begin, end), on from what total holds.
template <int M, class Q>
[[gnu::noinline]] void add_decoded_rows(const typename Factors<float, Q>::Operand* w,
                                        const float* const (&scales)[decoded_rows], const LaneScales& lanes,
                                        const Panel<float, Q>& x, int first, int64_t begin, int64_t end,
                                        FloatVector* total) {
    using F = Factors<float, Q>;
    constexpr int R = decoded_rows;
    FloatVector all[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) all[r][m] = total[r * x.count + m];
    const auto add = [&](const typename F::Kept* from, FloatVector(&to)[R][M]) {
#pragma GCC unroll 8
        for (int part = 0; part < F::parts; ++part, w += R)
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                auto column = unaligned<typename F::Operand>(from + m * F::step + part * (F::step / F::parts));
                in_register(column);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) F::add(to[r][m], w[r], column);
            }
    };
    for (int64_t step = begin; step < end; ++step) {
        const typename F::Kept* from = x.at(first, step * F::step);
        if (scales[0] == nullptr) {
            add(from, all);
            continue;
        }
        FloatVector sums[R][M] = {};
        add(from, sums);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            const FloatVector scale = lanes.at(scales[r], step * F::step);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) all[r][m] += scale * sums[r][m];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r * x.count + m] = all[r][m];
}

// For the steps [begin, end) of two rows, which are a stretch.
template <PackedWeight::Format format, class Q>
void add_decoded(const CodeRows<decoded_rows>& w, const LaneScales& lanes, const Panel<float, Q>& x, int64_t n,
                 int64_t begin, int64_t end, FloatVector* total) {
    using F = Factors<float, Q>;
    const int count = int(x.count), tiles = (count + widest_tile - 1) / widest_tile;
    typename F::Operand codes[decoded_steps * F::parts * decoded_rows];
    decode<format, Q>(w, begin, end, n, codes);
    for (int t = 0; t < tiles; ++t) {
        const int first = count * t / tiles;
        FloatVector* to = total + first;
        switch (count * (t + 1) / tiles - first) {
            case 1: add_decoded_rows<1>(codes, w.scales, lanes, x, first, begin, end, to); break;
            case 2: add_decoded_rows<2>(codes, w.scales, lanes, x, first, begin, end, to); break;
            case 3:
                if constexpr (widest_tile > 2) add_decoded_rows<3>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            case 4:
                if constexpr (widest_tile > 2) add_decoded_rows<4>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            case 5:
                if constexpr (widest_tile > 2) add_decoded_rows<5>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            default:
                if constexpr (widest_tile > 2) add_decoded_rows<6>(codes, w.scales, lanes, x, first, begin, end, to);
        }
    }
}

template <PackedWeight::Format format, int R, class Q>
void add_tiles(const CodeRows<R>& w, const LaneScales& lanes, const Panel<float, Q>& x, int64_t n, Prefetch& ahead,
               FloatVector* total) {
    constexpr int tile = vector_registers == 32 ? R == 4 ? 2 : 6 : R == 1 ? 4 : 2;
    const int count = int(x.count), tiles = (count + tile - 1) / tile;
    for (int t = 0; t < tiles; ++t) {
        const int first = count * t / tiles;
        FloatVector* to = total + first;
        switch (count * (t + 1) / tiles - first) {
            case 1: add_code_rows<format, R, 1>(w, lanes, x, first, n, ahead, to); break;
            case 2: add_code_rows<format, R, 2>(w, lanes, x, first, n, ahead, to); break;
            case 3:
                if constexpr (tile > 2) add_code_rows<format, R, 3>(w, lanes, x, first, n, ahead, to);
                break;
            case 4:
                if constexpr (tile > 2) add_code_rows<format, R, 4>(w, lanes, x, first, n, ahead, to);
                break;
            case 5:
                if constexpr (tile > 4) add_code_rows<format, R, 5>(w, lanes, x, first, n, ahead, to);
                break;
            default:
                if constexpr (tile > 4) add_code_rows<format, R, 6>(w, lanes, x, first, n, ahead, to);
        }
    }
}

// A quantized matrix per expert, or one.
template <int bits, bool pairs>
struct Stored<Codes<bits, pairs>> {
    struct Rows {
        const PackedWeight* of;
        int64_t expert, first;
        const char* words(int64_t r) const {
            const View& d = of->data;
            const int rows = d.ndim - 2;
            return d.as<char>() + (rows ? expert * d.stride[0] : 0) + (first + r) * d.stride[rows];
        }
    };
    const PackedWeight& w;
    int64_t experts() const { return w.data.size[0]; }
    int64_t rows() const { return w.data.size[w.data.ndim - 2]; }
    int64_t columns() const { return w.columns; }
    Rows from(int64_t expert, int64_t row) const { return {&w, expert, row}; }
};

// `scales` has room for those of all rows, `row` numbers each.
template <PackedWeight::Format format, class Q>
void multiply_codes(const typename Stored<Q>::Rows& w, int rows, const Panel<float, Q>& x, int64_t n,
                    const typename Stored<Q>::Rows& next, int64_t groups, float* scales, int64_t row, float* out) {
    using F = Factors<float, Q>;
    FloatVector total[skinny_rows * skinny_panel];
    const LaneScales lanes(w.of->group, F::in_word, F::step);
    const bool wanted = next.first != w.first || next.expert != w.expert || next.of != w.of;
    const char* first_line = next.words(0);
    Prefetch ahead = {first_line, wanted ? next.words(rows) : first_line, 1};
    for (int r = 0; r < rows; ++r) load_scales(*w.of, w.expert, w.first + r, groups, scales + r * row);
    const auto rows_from = [&](int r, auto count) {
        constexpr int R = decltype(count)::value;
        CodeRows<R> some;
        for (int i = 0; i < R; ++i) {
            const int from = smaller(r + i, rows - 1);
            some.words[i] = w.words(from);
            some.scales[i] = groups > 1 ? scales + from * row : nullptr;
        }
        return some;
    };
    if (F::in_word == 4 && x.count > widest_tile) {  // of 8 bits
        const int64_t steps = (n + F::step - 1) / F::step;
        for (int i = 0; i < (rows + 1) / 2 * 2 * x.count; ++i) total[i] = FloatVector{};
        for (int64_t begin = 0; begin < steps; begin += decoded_steps)
            for (int r = 0; r < rows; r += decoded_rows)  // of an odd number the last one twice
                add_decoded<format, Q>(rows_from(r, std::integral_constant<int, decoded_rows>()), lanes, x, n, begin,
                                       smaller<int64_t>(steps, begin + decoded_steps), total + r * x.count);
    } else {
        const auto add = [&](int r, auto count) {
            constexpr int R = decltype(count)::value;
            ahead.lines = R;
            add_tiles<format, R>(rows_from(r, count), lanes, x, n, ahead, total + r * x.count);
        };
        int r = 0;
        if (vector_registers == 32 && x.count <= 2)
            for (; r + 4 <= rows; r += 4) add(r, std::integral_constant<int, 4>());
        for (; r + 2 <= rows; r += 2) add(r, std::integral_constant<int, 2>());
        for (; r < rows; ++r) add(r, std::integral_constant<int, 1>());
    }
    add_lanes<float>(total, rows, int(x.count), out);
    if (groups > 1) return;
    for (int64_t m = 0; m < x.count; ++m)
        for (int i = 0; i < rows; ++i) out[m * skinny_rows + i] *= scales[i * row];
}

template <PackedWeight::Format format, class Q>
void multiply_codes(const typename Stored<Q>::Rows& w, int rows, const Panel<float, Q>& x, int64_t n,
                    const typename Stored<Q>::Rows& next, float* out) {
    constexpr int64_t most = 336;  // scales of a row that the stack has room for
    const int64_t groups = (n + w.of->group - 1) / w.of->group, row = groups + lanes_of<float>;
    if (groups <= most) {
        float scales[skinny_rows * (most + lanes_of<float>)];
        return multiply_codes<format>(w, rows, x, n, next, groups, scales, row, out);
    }
    Scratch<float> scales(skinny_rows, row);
    multiply_codes<format>(w, rows, x, n, next, groups, scales, row, out);
}

template <int bits, bool pairs>
inline void multiply_rows(const typename Stored<Codes<bits, pairs>>::Rows& w, int rows,
                          const Panel<float, Codes<bits, pairs>>& x, int64_t n,
                          const typename Stored<Codes<bits, pairs>>::Rows& next, float* out) {
    if constexpr (bits == 4)
        w.of->format == PackedWeight::int4 ? multiply_codes<PackedWeight::int4>(w, rows, x, n, next, out)
                                           : multiply_codes<PackedWeight::e2m1>(w, rows, x, n, next, out);
    else
        w.of->format == PackedWeight::int8 ? multiply_codes<PackedWeight::int8>(w, rows, x, n, next, out)
                                           : multiply_codes<PackedWeight::fp8>(w, rows, x, n, next, out);
}

}  // namespace TT_ISA
}  // namespace tt
