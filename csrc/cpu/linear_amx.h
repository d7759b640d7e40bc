// linear in bfloat16 by AMX's tiles: see amx_product.h for the product and its order of summation.
//
// Few rows of x, 64 at most: it is the reading of the weight. 16 of its rows are read side by side, straight into
// tiles, for all k, and multiplied by all rows of x; their sums stay in tiles.
//
// Many rows: 128 rows of the weight by up to 512 rows of x are a piece of work. k is cut into blocks of 512 numbers; a
// panel of 32 rows of the weight by a block, copied into tiles, is 32 KB and lies in the first-level cache while the
// block of x, 512 KB, passes by from the second. Sums are kept in memory between blocks, 256 KB.
//
// What that should cost, by the counts in amx.h (no machine with AMX was at hand, so no product has been timed):
// - 16 rows of x: a product and two loads of tiles for 1 KB of the weight. Products of one sum wait for each other, 52
//   cycles: 20 bytes of the weight a cycle, some 50 GB/s on a core, above what its memory gives. 64 rows: 4 products in
//   64 cycles, and 5 KB from the second-level cache, 107 cycles at 48 bytes: 10 bytes of the weight a cycle.
// - The reading alone, tile loads replaced by 16 loads of vectors, has been timed on one core of a busy Zen 5, for 16
//   rows of x and k 2688: 28 GB/s where a plain loop reads 38, in another run 30 of 43, with 16 and with 32 rows side
//   by side; with the next rows, or the same ones' next numbers, fetched meanwhile by instructions, 16 to 25.
//   The processor fetches them by itself.
// - Many rows: 4 products and 4 loads, 64 cycles and 32 of the load ports, and 32 bytes a cycle from the
//   second-level cache, which gives 48. A block is 16 such steps, 1024 cycles;
//   to load and store its sums takes 96: 91 % of the peak, if nothing overlaps. A panel is copied by 512 loads and
//   stores for a block of every pair of tiles of x, 6 % at 256 rows; transposing sums is about 100 instructions a tile,
//   of k / 2 cycles of products.
// - From memory or the third-level cache a piece reads 640 rows, 1280 k bytes, in 128 k cycles: 10 bytes a cycle.
#pragma once

#include "amx_product.h"

#if defined(TT_AMX)
#include "linear.h"

namespace tt {
namespace TT_ISA {

constexpr int64_t panel_rows = 2 * tile_height, panel_numbers = 512;
constexpr int64_t piece_rows = 128, piece_tiles = 32;  // many: of the weight, of x

// One call's weight, bias and rows of out, from a certain row of x on.
struct LinearTiles {
    const Linear& a;
    RightTiles x;
    bf16* out;

    int64_t n() const { return a.weight.size[0]; }
    const bf16* row(int64_t r) const { return a.weight.as<bf16>() + r * a.weight.stride[0]; }
    int64_t stride() const { return a.weight.stride[0]; }

    // Rounds and stores a tile of sums: rows of the weight from r on, a tile of rows of x.
    void finish(const char* sums, int64_t r, int64_t x_tile) const {
        const int64_t m0 = x_tile * tile_rows_of_x, columns = smaller<int64_t>(tile_height, n() - r);
        float bias[tile_height] = {};
        if (a.bias) load<float>(bias, a.bias, r, columns);
        const auto added = unaligned<FloatVector>(bias);
        for_sums(sums, smaller<int64_t>(tile_rows_of_x, x.rows - m0), [&](int64_t m, FloatVector sum) {
            bf16* to = out + (m0 + m) * n() + r;
            if (columns == tile_height)
                Rounding<bf16>::store(to, sum + added);
            else
                store_some<bf16>(to, sum + added, columns);
        });
    }

    // Rows [r, r + 16) of the weight, or to its end, for all rows of x.
    void few(int64_t r) const {
        const int64_t x_tiles = tiles_of(x.rows, tile_rows_of_x), rows = smaller<int64_t>(tile_height, n() - r);
        alignas(64) char sums[few_tiles * tile_size];
        for (int64_t t = 0; t < x_tiles; t += few_tiles) {
            const int64_t some = smaller(few_tiles, x_tiles - t);
            few_sums(row(r), stride(), rows, x.k, x.from(t), some, sums);
            for (int64_t m = 0; m < some; ++m) finish(sums + m * tile_size, r, t + m);
        }
    }

    // Rows [begin, end) of the weight for some tiles of x. `panel` and `total` have room for what the names say.
    void many(int64_t begin, int64_t end, int64_t x_begin, int64_t x_end, char* panel, char* total) const {
        const int64_t k = x.k, x_tiles = x_end - x_begin, next_x = tile_size, next_w = x_tiles * tile_size;
        for (int64_t i = 0; i < k; i += panel_numbers) {
            const int64_t numbers = smaller(panel_numbers, k - i), steps = tiles_of(numbers, tile_numbers);
            for (int64_t r = begin; r < end; r += panel_rows) {
                const int64_t rows = smaller(panel_rows, end - r);
                pack_left(panel, row(r) + i, stride(), rows, numbers);
                const TilesAt w = {panel, tile_bytes, tile_size, steps * tile_size};
                for (int64_t t = 0; t < x_tiles; t += 2) {
                    char* sums = total + (r - begin) / tile_height * next_w + t * tile_size;
                    for_tiles(rows > tile_height, t + 1 < x_tiles, [&](auto w_count, auto x_count) {
                        constexpr int R = w_count, G = x_count;
                        if (i == 0)
                            zero_sums<R, G>();
                        else
                            load_sums<R, G>(sums, next_w, next_x);
                        add_many<R, G>(w, x.from(x_begin + t).after(i / tile_numbers), steps);
                        store_sums<R, G>(sums, next_w, next_x);
                    });
                }
            }
        }
        for (int64_t r = begin; r < end; r += tile_height)
            for (int64_t t = 0; t < x_tiles; ++t)
                finish(total + (r - begin) / tile_height * next_w + t * tile_size, r, x_begin + t);
    }

    void all() const {
        const int64_t x_tiles = tiles_of(x.rows, tile_rows_of_x), k = larger<int64_t>(1, x.k);
        if (x_tiles <= few_tiles || x.k == 0) {
            const int64_t blocks = tiles_of(n(), tile_height), products = tile_height * k * x.rows;
            parallel_for(blocks, larger<int64_t>(1, worth / products), [&](int64_t begin, int64_t end) {
                const Tiles tiles;
                for (int64_t block = begin; block < end; ++block) few(block * tile_height);
            });
            return;
        }
        // Where blocks are few, the rows of x are parted as well, so that all threads finish together.
        const int64_t blocks = tiles_of(n(), piece_rows), wanted = tiles_of(8 * max_threads(), blocks);
        const int64_t parts = larger(tiles_of(x_tiles, piece_tiles), smaller(wanted, x_tiles / (2 * few_tiles)));
        const int64_t most = tiles_of(x_tiles, larger<int64_t>(1, parts));
        const int64_t count = tiles_of(x_tiles, most), products = piece_rows * k * most * tile_rows_of_x;
        parallel_for(count * blocks, larger<int64_t>(1, worth / products), [&](int64_t begin, int64_t end) {
            const Tiles tiles;
            Scratch<char> panel(panel_rows, panel_numbers, sizeof(bf16)), total(piece_rows, most, tile_bytes);
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t r = piece % blocks * piece_rows, first = piece / blocks * most;
                many(r, smaller(r + piece_rows, n()), first, smaller(first + most, x_tiles), panel, total);
            }
        });
    }

    static constexpr int64_t worth = 1 << 18;  // products that are worth a thread's while
};

inline void linear_by_tiles(const Linear& a) {
    const int64_t rows = a.x.size[0], k = a.x.size[1], n = a.weight.size[0];
    if (rows == 0 || n == 0) return;
    // Rows of x that are packed at a time: 8 MB, or 1024 rows where these are more.
    const int64_t tile = larger<int64_t>(1, RightTiles::bytes(k)), x_tiles = tiles_of(rows, tile_rows_of_x);
    const int64_t chunk = larger<int64_t>(64, (1 << 23) / tile);
    Scratch<char> data(smaller(x_tiles, chunk), tile);
    for (int64_t first = 0; first < x_tiles; first += chunk) {
        const int64_t row = first * tile_rows_of_x, count = smaller(rows - row, chunk * tile_rows_of_x);
        const RightTiles x = {data, count, k};
        const auto from = [&](int64_t m) { return a.x.as<bf16>() + (row + m) * a.x.stride[0]; };
        parallel_for(tiles_of(count, tile_rows_of_x), larger<int64_t>(1, 2048 / larger<int64_t>(1, k)),
                     [&](int64_t begin, int64_t end) {
                         for (int64_t t = begin; t < end; ++t) x.fill(t, from);
                     });
        LinearTiles{a, x, a.out.as<bf16>() + row * n}.all();
    }
}

}  // namespace TT_ISA
}  // namespace tt
#endif
