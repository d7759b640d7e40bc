// Products of rows of a stored matrix with rows of activations by AMX's tiles (amx.h), in bfloat16.
//
//     sums[n][m] = sum over k of w[n][k] * x[m][k]
//
// A left tile is 16 rows of w by 32 numbers, as they lie in memory. A right tile is 16 rows of x, packed once: a row of
// it holds a pair of numbers of each. So sums have the rows of x along their lanes, and are transposed when they are
// complete.
//
// Every sum has one order: tile by tile of 32 numbers from 0 on, each added as the instruction does, into one sum. (A
// sum that is put into memory and taken up again is the same.) Neither the other rows nor the blocking change it, so a
// row's result is bit for bit the same alone as in any batch.
#pragma once

#include "amx.h"

#if defined(TT_AMX)
#include "parallel.h"
#include "rounding.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

constexpr int tile_rows_of_x = 16, tile_numbers = 32, tile_size = tile_height * tile_bytes;

inline int64_t tiles_of(int64_t n, int64_t each) {
    return (n + each - 1) / each;
}

// 16 words, of which `numbers` numbers are given: zeros behind them.
inline WordVector some_numbers(const bf16* from, int64_t numbers) {
    if (numbers >= tile_numbers) return unaligned<WordVector>(from);
    bf16 some[tile_numbers] = {};
    for (int64_t i = 0; i < numbers; ++i) some[i] = from[i];
    return unaligned<WordVector>(some);
}

// Left tiles of `rows` rows of w and `k` numbers, [tile of rows][tile of numbers], filled up with zeros.
inline void pack_left(char* to, const bf16* w, int64_t stride, int64_t rows, int64_t k) {
    for (int64_t r = 0; r < up_to(rows, tile_height); r += tile_height)
        for (int64_t i = 0; i < k; i += tile_numbers)
            for (int64_t row = r; row < r + tile_height; ++row, to += tile_bytes) {
                const WordVector v = row < rows ? some_numbers(w + row * stride + i, k - i) : WordVector{};
                std::memcpy(to, &v, sizeof(v));
            }
}

// Where tiles lie: `row` bytes from row to row, `step` to the tile of the next numbers, `next` to those of other 16
// rows.
struct TilesAt {
    const char* data;
    int64_t row, step, next;
    TilesAt after(int64_t steps) const { return {data + steps * step, row, step, next}; }
};

// Rows of x as right tiles, [tile of rows][tile of numbers], filled up with zeros.
struct RightTiles {
    char* data;
    int64_t rows, k;

    static int64_t bytes(int64_t k) { return tiles_of(k, tile_numbers) * tile_size; }  // of 16 rows
    TilesAt from(int64_t tile_of_rows) const {
        return {data + tile_of_rows * bytes(k), tile_bytes, tile_size, bytes(k)};
    }
    // A tile of rows; `from(row)` says where one lies.
    template <class F>
    void fill(int64_t tile_of_rows, F from) const {
        char* to = data + tile_of_rows * bytes(k);
        const int64_t first = tile_of_rows * tile_rows_of_x;
        for (int64_t i = 0; i < k; i += tile_numbers, to += tile_size) {
            WordVector square[tile_height];
            for (int m = 0; m < tile_rows_of_x; ++m)
                square[m] = first + m < rows ? some_numbers(from(first + m) + i, k - i) : WordVector{};
            transpose(square);
            std::memcpy(to, square, sizeof(square));
        }
    }
};

// --- few rows of x: 16 rows of w by G tiles of x; tiles 0 to 3 are the sums -----------------------------------------

template <int G>
inline void add_few(TilesAt w, TilesAt x, int64_t steps) {
    for (int64_t i = 0; i < steps; ++i, w.data += w.step, x.data += x.step) {
        tile_load<4>(w.data, w.row);
        tile_load<5>(x.data, x.row);
        tile_dot<0, 4, 5>();
        if constexpr (G > 1) {
            tile_load<6>(x.data + x.next, x.row);
            tile_dot<1, 4, 6>();
        }
        if constexpr (G > 2) {
            tile_load<7>(x.data + 2 * x.next, x.row);
            tile_dot<2, 4, 7>();
        }
        if constexpr (G > 3) {
            tile_load<5>(x.data + 3 * x.next, x.row);
            tile_dot<3, 4, 5>();
        }
    }
}

// Tiles of sums one after the other, for `rows` rows of w, 16 at most: read as they lie, but for what does not fill its
// tile, the last numbers or all numbers of fewer rows, which is copied.
template <int G>
[[gnu::noinline]] void few_sums(const bf16* w, int64_t stride, int64_t rows, int64_t k, TilesAt x, char* sums) {
    tile_zero<0>();
    if constexpr (G > 1) tile_zero<1>();
    if constexpr (G > 2) tile_zero<2>();
    if constexpr (G > 3) tile_zero<3>();
    const int64_t whole = rows < tile_height ? 0 : k / tile_numbers;
    add_few<G>({reinterpret_cast<const char*>(w), stride * int64_t(sizeof(bf16)), tile_bytes, 0}, x, whole);
    for (int64_t i = whole; i < tiles_of(k, tile_numbers); ++i) {
        alignas(64) char tile[tile_size];
        pack_left(tile, w + i * tile_numbers, stride, rows, smaller<int64_t>(tile_numbers, k - i * tile_numbers));
        add_few<G>({tile, tile_bytes, 0, 0}, x.after(i), 1);
    }
    tile_store<0>(sums, tile_bytes);
    if constexpr (G > 1) tile_store<1>(sums + tile_size, tile_bytes);
    if constexpr (G > 2) tile_store<2>(sums + 2 * tile_size, tile_bytes);
    if constexpr (G > 3) tile_store<3>(sums + 3 * tile_size, tile_bytes);
}

constexpr int64_t few_tiles = 4;
inline void few_sums(const bf16* w, int64_t stride, int64_t rows, int64_t k, TilesAt x, int64_t x_tiles, char* sums) {
    switch (x_tiles) {
        case 1: return few_sums<1>(w, stride, rows, k, x, sums);
        case 2: return few_sums<2>(w, stride, rows, k, x, sums);
        case 3: return few_sums<3>(w, stride, rows, k, x, sums);
        default: return few_sums<4>(w, stride, rows, k, x, sums);
    }
}

// --- many rows of x: R tiles of w by G tiles of x, 1 or 2 of each; tiles 0 to 3 are the sums ------------------------

template <int R, int G>
inline void zero_sums() {
    tile_zero<0>();
    if constexpr (G == 2) tile_zero<1>();
    if constexpr (R == 2) tile_zero<2>();
    if constexpr (R == 2 && G == 2) tile_zero<3>();
}
template <int R, int G>
inline void load_sums(const char* from, int64_t next_w, int64_t next_x) {
    tile_load<0>(from, tile_bytes);
    if constexpr (G == 2) tile_load<1>(from + next_x, tile_bytes);
    if constexpr (R == 2) tile_load<2>(from + next_w, tile_bytes);
    if constexpr (R == 2 && G == 2) tile_load<3>(from + next_w + next_x, tile_bytes);
}
template <int R, int G>
inline void store_sums(char* to, int64_t next_w, int64_t next_x) {
    tile_store<0>(to, tile_bytes);
    if constexpr (G == 2) tile_store<1>(to + next_x, tile_bytes);
    if constexpr (R == 2) tile_store<2>(to + next_w, tile_bytes);
    if constexpr (R == 2 && G == 2) tile_store<3>(to + next_w + next_x, tile_bytes);
}
template <int R, int G>
inline void add_many(TilesAt w, TilesAt x, int64_t steps) {
    for (int64_t i = 0; i < steps; ++i, w.data += w.step, x.data += x.step) {
        tile_load<4>(w.data, w.row);
        tile_load<6>(x.data, x.row);
        tile_dot<0, 4, 6>();
        if constexpr (G == 2) {
            tile_load<7>(x.data + x.next, x.row);
            tile_dot<1, 4, 7>();
        }
        if constexpr (R == 2) {
            tile_load<5>(w.data + w.next, w.row);
            tile_dot<2, 5, 6>();
            if constexpr (G == 2) tile_dot<3, 5, 7>();
        }
    }
}

// f(R, G) with constants for numbers of 1 or 2.
template <class F>
inline void for_tiles(bool two_of_w, bool two_of_x, F f) {
    struct One {
        constexpr operator int() const { return 1; }
    };
    struct Two {
        constexpr operator int() const { return 2; }
    };
    if (two_of_w)
        two_of_x ? f(Two(), Two()) : f(Two(), One());
    else
        two_of_x ? f(One(), Two()) : f(One(), One());
}

// What tiles give for a row of x: 16 sums of as many rows of w. f(m, sums) for the first `count` rows of x.
template <class F>
inline void for_sums(const char* tile, int64_t count, F f) {
    FloatVector square[tile_height];
    std::memcpy(square, tile, sizeof(square));
    transpose(square);
    for (int64_t m = 0; m < count; ++m) f(m, square[m]);
}

}  // namespace TT_ISA
}  // namespace tt
#endif
