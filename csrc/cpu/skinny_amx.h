// skinny.h in bfloat16 by AMX's tiles: see amx_product.h for the tiles and their order of summation.
//
// A panel has up to 64 rows of x and is kept pair by pair of numbers, [pair][row][2]: 16 pairs are the rows of right
// tiles, which lie side by side. The last of these reaches into the next pair where the rows do not fill it; what it
// finds there makes columns of sums that nobody reads.
//
// For each tile of 16 rows of w, read straight from memory, there is a product per tile of x. With one, sums wait 52
// cycles for each other: 20 bytes of w a cycle, 50 GB/s on a core, more than its memory gives; with four, 64 cycles. So
// few tokens of an expert cost the reading of its weights. (By the counts in amx.h; nothing here has been measured: no
// machine with AMX was at hand.)
#pragma once

#include "amx_product.h"

#if defined(TT_AMX)
namespace tt {
namespace TT_ISA {

template <>
struct Panel<float, bf16> {
    using Kept = bf16;
    static constexpr int tile = 16, most = 64;  // rows of x, side by side and in all
    static constexpr int spare = 1;             // rows of memory behind the last panel, for its last tile to reach into
    Kept* data;
    int64_t count;

    static int64_t padded(int64_t n) { return up_to(n, tile_numbers); }
    Kept* at(int64_t row, int64_t i) const { return data + (i / 2 * count + row) * 2; }  // i is even
    static Kept kept(float x) { return {uint16_t(bit_cast<uint32_t>(x) >> 16)}; }
    void put(int64_t row, int64_t i, const float* values, int some) const {  // i is even
        Kept* to = at(row, i);
        for (int r = 0; r < some; ++r) to[r / 2 * (2 * count) + r % 2] = kept(values[r]);
    }
    void clear(int64_t row, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i) at(row, i / 2 * 2)[i % 2] = {0};
    }
    void fill(int64_t row, const View& x, int64_t offset, int64_t n) const {
        const bf16* from = x.as<bf16>() + offset;
        Kept* to = at(row, 0);
        for (int64_t i = 0; i + 2 <= n; i += 2, to += 2 * count) std::memcpy(to, from + i, 2 * sizeof(bf16));
        if (n % 2) to[0] = from[n - 1];
        clear(row, n, padded(n));
    }
};

// Sums of 16 rows of w and G tiles of x, by tiles 0 to G - 1.
template <int G>
inline void add_skinny(const char* w, int64_t w_row, const char* x, int64_t x_row, int64_t steps, Ahead& ahead,
                       int64_t lines) {
    for (int64_t i = 0; i < steps; ++i, w += tile_bytes, x += tile_height * x_row) {
        ahead.fetch(lines);
        tile_load<4>(w, w_row);
        tile_load<5>(x, x_row);
        tile_dot<0, 4, 5>();
        if constexpr (G > 1) {
            tile_load<6>(x + tile_bytes, x_row);
            tile_dot<1, 4, 6>();
        }
        if constexpr (G > 2) {
            tile_load<7>(x + 2 * tile_bytes, x_row);
            tile_dot<2, 4, 7>();
        }
        if constexpr (G > 3) {
            tile_load<5>(x + 3 * tile_bytes, x_row);
            tile_dot<3, 4, 5>();
        }
    }
}

template <int G>
void skinny_tiles(const bf16* w, int64_t w_stride, int rows, const Panel<float, bf16>& x, int64_t n, Ahead ahead,
                  float* out) {
    tile_zero<0>();
    if constexpr (G > 1) tile_zero<1>();
    if constexpr (G > 2) tile_zero<2>();
    if constexpr (G > 3) tile_zero<3>();
    const int64_t whole = rows < tile_height ? 0 : n / tile_numbers, steps = tiles_of(n, tile_numbers);
    const int64_t lines = tiles_of(ahead.lines(), larger<int64_t>(1, steps));
    const int64_t x_row = x.count * 2 * int64_t(sizeof(bf16));
    const char* right = reinterpret_cast<const char*>(x.data);
    add_skinny<G>(reinterpret_cast<const char*>(w), w_stride * int64_t(sizeof(bf16)), right, x_row, whole, ahead,
                  lines);
    alignas(64) char tile[tile_size];
    for (int64_t i = whole; i < steps; ++i) {  // what does not fill its tile: few rows, or the last numbers
        pack_left(tile, w + i * tile_numbers, w_stride, rows, smaller<int64_t>(tile_numbers, n - i * tile_numbers));
        add_skinny<G>(tile, tile_bytes, right + i * tile_height * x_row, x_row, 1, ahead, lines);
    }
    const auto put = [&](int g) {
        for_sums(tile, smaller<int64_t>(tile_rows_of_x, x.count - g * tile_rows_of_x),
                 [&](int64_t m, FloatVector sums) {
                     std::memcpy(out + (g * tile_rows_of_x + m) * skinny_rows, &sums, sizeof(sums));
                 });
    };
    tile_store<0>(tile, tile_bytes), put(0);
    if constexpr (G > 1) tile_store<1>(tile, tile_bytes), put(1);
    if constexpr (G > 2) tile_store<2>(tile, tile_bytes), put(2);
    if constexpr (G > 3) tile_store<3>(tile, tile_bytes), put(3);
}

inline void skinny(const bf16* w, int64_t w_stride, int rows, const Panel<float, bf16>& x, int64_t n, const bf16* next,
                   float* out) {
    const Ahead ahead = {reinterpret_cast<const char*>(next), w_stride * int64_t(sizeof(bf16)),
                         n * int64_t(sizeof(bf16)), next != w ? rows : 0};
    switch (tiles_of(x.count, tile_rows_of_x)) {
        case 1: return skinny_tiles<1>(w, w_stride, rows, x, n, ahead, out);
        case 2: return skinny_tiles<2>(w, w_stride, rows, x, n, ahead, out);
        case 3: return skinny_tiles<3>(w, w_stride, rows, x, n, ahead, out);
        default: return skinny_tiles<4>(w, w_stride, rows, x, n, ahead, out);
    }
}

// What a thread holds while it multiplies.
template <>
struct SkinnyThread<bf16> {
    Tiles tiles;
};

}  // namespace TT_ISA
}  // namespace tt
#endif
