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

// What comes next is not fetched meanwhile: see linear_amx.h.
inline void skinny(const bf16* w, int64_t w_stride, int rows, const Panel<float, bf16>& x, int64_t n, const bf16*,
                   float* out) {
    const int64_t pair = x.count * 2 * int64_t(sizeof(bf16)), tiles = tiles_of(x.count, tile_rows_of_x);
    alignas(64) char sums[few_tiles * tile_size];
    few_sums(w, w_stride, rows, n, {reinterpret_cast<const char*>(x.data), pair, tile_height * pair, tile_bytes}, tiles,
             sums);
    for (int64_t t = 0; t < tiles; ++t)
        for_sums(sums + t * tile_size, smaller<int64_t>(tile_rows_of_x, x.count - t * tile_rows_of_x),
                 [&](int64_t m, FloatVector of_row) {
                     std::memcpy(out + (t * tile_rows_of_x + m) * skinny_rows, &of_row, sizeof(of_row));
                 });
}

// What a thread holds while it multiplies.
template <>
struct SkinnyThread<bf16> {
    Tiles tiles;
};

}  // namespace TT_ISA
}  // namespace tt
#endif
