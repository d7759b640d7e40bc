// A tile of keys and the query rows that attend to it, as in attention_tile.h, by the matrix tiles of AMX: bfloat16.
//
// Query rows lie along the lanes here, too, so that packing, softmax, masks and all that is done with a state is the
// same. amx.h says what a product of tiles is; the two are
//
//     logits [keys, rows]   = K Q^T    left: 16 keys x 32 numbers; right: queries, packed in pairs of numbers
//     sums [columns, rows] += V^T P    left: 16 columns x 32 keys; right: weights in pairs of keys, i and i + 16
//
// Keys are copied and values transposed once per tile of keys, for up to 256 query rows, into matrix tiles that lie one
// behind the other. So pages, ragged ends and head dimensions that are no multiple of 32, which zeros fill up, are all
// the same to the products, and rows whose distance is a power of two do not meet in a few sets of the cache. In a pair
// are keys 16 apart, for then the weights of a pair come from two vectors of logits without a shuffle, and the halves
// of two transposed vectors make two rows of V^T.
//
// A strip of 32 query rows holds 2 x 2 matrix tiles of sums and loads four for four products. 96 keys of head dimension
// 128 take, beside what was measured on one core of a Zen 5, which has no AMX but the same vectors, of four vector
// operations a cycle,
//
//     products      96 of 16 cycles                                           1536 cycles of the matrix unit
//     weights       192 vectors: 17 vector operations each, two a cycle       1632 cycles of Intel's vector units; 1370
//     maxima        192 loads and comparisons, two a cycle                    96; 130
//     rescaling     256 multiplications and stores, where a maximum grew      256; 340
//     matrix tiles  112 loads of 8 cycles, 28 stores of 16                    900 and 450 of the ports to memory
//     reading       its share of 384 vectors of keys copied and of 12         270, where 8 strips share 2200
//                   transpositions of 290 instructions
//
// so neither product nor weights should wait for the other: those of a panel's one strip stand between those of the
// other, in pieces of 16 products and 64 vectors of weights, near enough for the processor to overlap them. On a
// processor with AMX nothing was measured: not the time, not whether the overlap comes about, nor whether to copy the
// keys is dearer than to load them in place.
//
// A sum over a part of the keys stays one running sum: in bfloat16 results its error does not show. It is rescaled only
// where some maximum of the vector grew. Products flush subnormal sums to zero, even where they add nothing; as all
// sums come from products, a tile that is hidden from a row still leaves its numbers as they are.
#pragma once

#include "amx.h"
#include "attention_tile.h"

#if defined(TT_AMX)
namespace tt {
namespace TT_ISA {

struct Tiled : Paired {};
template <>
struct KindOf<bf16> {
    using type = Tiled;
};
template <>
constexpr int64_t factors_of<Tiled>(int64_t n) {
    return up_to(n, 32) / 2;
}

constexpr int64_t tile_words = 16 * 16, tile_keys = 32;  // words of a matrix tile; keys of a step of either product
constexpr int64_t groups_of_tile = keys_of_tile / tile_keys;
static_assert(keys_of_tile % tile_keys == 0 && most_vectors == 4, "tiles are whole, and a panel has two strips");

template <>
struct Tile<Tiled> {
    static int64_t width(int64_t value_dim) { return up_to(value_dim, 32); }
    static int64_t size(int64_t dim, int64_t value_dim) {
        return keys_of_tile * (factors_of<Tiled>(dim) + factors_of<Tiled>(value_dim));
    }
    Tile(uint32_t* memory, int64_t dim, int64_t value_dim)
        : dim(dim),
          value_dim(value_dim),
          steps(up_to(dim, 32) / 32),
          value_steps(up_to(value_dim, 32) / 32),
          k(memory),
          v(memory + keys_of_tile * factors_of<Tiled>(dim)) {}

    // Reads keys and values of n tokens; `key(i)` and `value(i)` say where.
    template <class Key, class Value>
    void read(int64_t n, Key key, Value value) {
        keys = n;
        groups = (n + tile_keys - 1) / tile_keys;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t from = g * tile_keys, count = smaller(tile_keys, n - from);
            Rows key_rows(count, dim), value_rows(count, value_dim);
            for (int64_t i = 0; i < count; ++i) key_rows.row[i] = key(from + i), value_rows.row[i] = value(from + i);
            for (int64_t s = 0; s < steps; ++s) {
                key_rows.go_to(s);
                WordVector* to = reinterpret_cast<WordVector*>(k + (2 * g * steps + s) * tile_words);
                for (int64_t i = 0; i < 16; ++i) to[i] = key_rows.words(i);
                to += steps * 16;
                for (int64_t i = 0; i < 16; ++i) to[i] = key_rows.words(16 + i);
            }
            for (int64_t s = 0; s < value_steps; ++s) {
                value_rows.go_to(s);
                transpose_values(value_rows, v + (2 * s * groups_of_tile + g) * tile_words);
            }
        }
    }

    Tiles tiles;                                 // as long as this thread works with them
    int64_t dim, value_dim, steps, value_steps;  // steps: of 32 numbers
    int64_t keys = 0, groups = 0;
    uint32_t* k;  // [keys_of_tile / 16, steps] matrix tiles
    uint32_t* v;  // [width / 16, groups_of_tile] matrix tiles

   private:
    // 32 rows, of which `count` are there, and a step of 32 numbers in them; zeros for what is not there.
    struct Rows {
        Rows(int64_t count, int64_t dim) : count(count), dim(dim) {}
        void go_to(int64_t step) {
            at = row, offset = 32 * step;
            const int64_t numbers = smaller(dim - offset, int64_t(32));
            if (count == tile_keys && numbers == 32) return;
            std::memset(filled, 0, sizeof(filled));
            for (int64_t i = 0; i < count; ++i) std::memcpy(filled[i], row[i] + offset, size_t(numbers) * sizeof(bf16));
            for (int64_t i = 0; i < tile_keys; ++i) filled_row[i] = filled[i];
            at = filled_row, offset = 0;
        }
        WordVector words(int64_t i) const { return unaligned<WordVector>(at[i] + offset); }

        int64_t count, dim, offset = 0;
        const bf16 *row[tile_keys], *filled_row[tile_keys];
        const bf16* const* at = row;
        bf16 filled[tile_keys][32];
    };

    // A column of words is two columns of numbers.
    [[gnu::noinline]] static void transpose_values(const Rows& rows, uint32_t* to) {
        WordVector low[16], high[16];
        for (int i = 0; i < 16; ++i) low[i] = rows.words(i);
        transpose(low);
        for (int i = 0; i < 16; ++i) high[i] = rows.words(16 + i);
        transpose(high);
        for (int i = 0; i < 16; ++i) {
            WordVector* column = reinterpret_cast<WordVector*>(to + i / 8 * groups_of_tile * tile_words) + 2 * (i % 8);
            column[0] = (low[i] & 0xffffu) | high[i] << 16;
            column[1] = low[i] >> 16 | (high[i] & 0xffff0000u);
        }
    }
};

// N vectors of a panel's query rows, whose products share their loads, over one tile of keys: dot for every group of
// keys, find_largest, weigh for every group, accumulate for every step.
template <int N>
struct Strip {
    using Lanes = FloatVector;
    static constexpr int64_t L = lanes_of<float>;

    const Tile<Tiled>& tile;
    const Softmax& softmax;
    const uint32_t* q;       // [factors, stride]
    float *acc, *m_i, *l_i;  // [width, stride], [N * L], [N * L]
    float* logits;           // [keys_of_tile, N * L]
    int64_t stride;          // numbers from one row of the panel to the next
    bool first;              // of the part's tiles
    Lanes negative_base[N], sums[N];
    float factor;  // of what lies in logits

    // Products of a group of keys with all rows.
    void dot(int64_t g) {
        const int64_t steps = tile.steps, row = stride;
        const uint32_t *keys = tile.k + 2 * g * steps * tile_words, *more = keys + steps * tile_words, *rows = q;
        tile_zero<0>(), tile_zero<1>();
        if constexpr (N == 2) tile_zero<2>(), tile_zero<3>();
        for (int64_t s = 0; s < steps; ++s, keys += tile_words, more += tile_words, rows += 16 * row) {
            tile_load<4>(keys, 64), tile_load<5>(more, 64);
            tile_load<6>(rows, row * 4);
            tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>();
            if constexpr (N == 2) {
                tile_load<7>(rows + L, row * 4);
                tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
            }
        }
        float *to = logits + g * tile_keys * N * L, *behind = to + 16 * N * L;
        tile_store<0>(to, N * 64), tile_store<1>(behind, N * 64);
        if constexpr (N == 2) tile_store<2>(to + L, N * 64), tile_store<3>(behind + L, N * 64);
    }

    // Masks, finds the largest logits, and rescales what was summed relative to others.
    void find_largest(const Sight& sight) {
        const int64_t n = tile.keys, whole = tile.groups * tile_keys;
        const float scale = float(softmax.scale), softcap = float(softmax.softcap);
        const bool scaled = softcap > 0 || !(scale > 0);  // in place, else with the exponential
        if (scaled)
            for (int64_t i = 0; i < n * N; ++i) {
                const Lanes logit = at(logits)[i] * scale;
                at(logits)[i] = softcap > 0 ? hyperbolic_tangent(logit / softcap) * softcap : logit;
            }
        factor = scaled ? 1.f : scale;
        if (sight.masks(n, N * L)) sight.mask<N * L>(n, logits);
        for (int64_t i = n * N; i < whole * N; ++i) at(logits)[i] = Lanes{} - INFINITY;  // keys that are not there

        Lanes top[4][N];
        for (int r = 0; r < 4; ++r)
            for (int j = 0; j < N; ++j) top[r][j] = at(logits)[r * N + j];
        for (int64_t i = 4; i < whole; i += 4)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) top[r][j] = larger_of(top[r][j], at(logits)[(i + r) * N + j]);
        for (int j = 0; j < N; ++j) {
            const Lanes largest = larger_of(larger_of(top[0][j], top[1][j]), larger_of(top[2][j], top[3][j])) * factor;
            const Lanes before = first ? Lanes{} - INFINITY : at(m_i)[j];
            const Lanes now = larger_of(before, largest);
            const Lanes base = replaced(now, float(-INFINITY), 0.f);  // no key yet: -inf less -inf would be NaN
            at(m_i)[j] = now;
            negative_base[j] = -base;
            sums[j] = Lanes{};
            if (!first && std::memcmp(&now, &before, sizeof(now)) != 0) rescale(j, weight_of(before - base));
        }
    }

    // A group's logits become weights, in pairs where the logits of its first 16 keys were, and are added up.
    void weigh(int64_t g, Ahead& ahead) {
        const Lanes* from = at(logits) + g * tile_keys * N;
        WordVector* to = reinterpret_cast<WordVector*>(logits) + g * tile_keys * N;
        for (int j = 0; j < N; ++j) {  // one after the other, for there are constants to hold in registers
            const Lanes less = negative_base[j];
            Lanes part{};
            for (int64_t i = 0; i < 16; ++i) {
                if (i % steps_of_fetch == 0) ahead.fetch();
                const Lanes w[2] = {weight_of(from[i * N + j] * factor + less),
                                    weight_of(from[(16 + i) * N + j] * factor + less)};
                part += w[0];
                part += w[1];
                to[i * N + j] = Tiled::weights(w);
            }
            sums[j] += part;
        }
        if (g + 1 == tile.groups)
            for (int j = 0; j < N; ++j) at(l_i)[j] = first ? sums[j] : at(l_i)[j] + sums[j];
    }

    // Adds the weights' products with 32 columns of the values.
    void accumulate(int64_t s) const {
        const int64_t groups = tile.groups, row = stride;
        const uint32_t *values = tile.v + 2 * s * groups_of_tile * tile_words,
                       *more = values + groups_of_tile * tile_words;
        const float* weights = logits;
        float *to = acc + 32 * s * row, *below = to + 16 * row;
        if (first) {
            tile_zero<0>(), tile_zero<1>();
            if constexpr (N == 2) tile_zero<2>(), tile_zero<3>();
        } else {
            tile_load<0>(to, row * 4), tile_load<1>(below, row * 4);
            if constexpr (N == 2) tile_load<2>(to + L, row * 4), tile_load<3>(below + L, row * 4);
        }
        for (int64_t g = 0; g < groups; ++g) {
            tile_load<4>(values, 64), tile_load<5>(more, 64);
            tile_load<6>(weights, N * 64);
            tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>();
            if constexpr (N == 2) {
                tile_load<7>(weights + L, N * 64);
                tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
            }
            values += tile_words, more += tile_words, weights += tile_keys * N * L;
        }
        tile_store<0>(to, row * 4), tile_store<1>(below, row * 4);
        if constexpr (N == 2) tile_store<2>(to + L, row * 4), tile_store<3>(below + L, row * 4);
    }

    static constexpr int64_t steps_of_fetch = 4;  // of the 16 that weigh a vector of rows and a group of keys

   private:
    static Lanes* at(float* numbers) { return reinterpret_cast<Lanes*>(numbers); }

    void rescale(int j, Lanes alpha) const {
        at(l_i)[j] *= alpha;
        const int64_t step = stride;
        float* const end = acc + 32 * tile.value_steps * step;
        for (float* row = acc; row < end; row += 2 * step) at(row)[j] *= alpha, at(row + step)[j] *= alpha;
    }
};

template <>
struct Panel<Tiled> {
    static constexpr int64_t L = lanes_of<float>;

    uint32_t* q;  // [factors, lanes]
    float* acc;   // [width, lanes], of values
    float* m_i;   // [lanes], relative to which the sums are
    float* l_i;   // [lanes], of weights
    int vectors;  // lanes are so many vectors

    // How often add fetches ahead while a whole tile meets `rows` query rows.
    static int64_t fetches(int64_t rows) {
        return (rows + L - 1) / L * groups_of_tile * (16 / Strip<1>::steps_of_fetch);
    }

    void clear(int64_t width) const {
        for (int64_t i = 0; i < width * vectors * L; ++i) acc[i] = 0;
        for (int64_t i = 0; i < vectors * L; ++i) m_i[i] = -INFINITY, l_i[i] = 0;
    }

    // Adds a tile's keys to the lanes that see them. logits: [keys_of_tile, lanes].
    void add(const Tile<Tiled>& tile, const Softmax& softmax, const Sight& sight, bool first, float* logits,
             Ahead& ahead) const {
        if (vectors == 1) return add_strip(strip<1>(tile, softmax, 0, first, logits), sight, ahead);
        if (vectors == 2) return add_strip(strip<2>(tile, softmax, 0, first, logits), sight, ahead);
        Strip<2> one = strip<2>(tile, softmax, 0, first, logits);
        Strip<2> two = strip<2>(tile, softmax, 2, first, logits + keys_of_tile * 2 * L);
        for (int64_t g = 0; g < tile.groups; ++g) one.dot(g);
        one.find_largest(sight);
        for (int64_t g = 0; g < tile.groups; ++g) {
            two.dot(g);
            one.weigh(g, ahead);
        }
        two.find_largest(sight.from_lane(2 * L));
        for (int64_t i = 0; i < larger(tile.groups, tile.value_steps); ++i) {
            if (i < tile.value_steps) one.accumulate(i);
            if (i < tile.groups) two.weigh(i, ahead);
        }
        for (int64_t s = 0; s < tile.value_steps; ++s) two.accumulate(s);
    }

   private:
    template <int N>
    Strip<N> strip(const Tile<Tiled>& tile, const Softmax& softmax, int64_t j, bool first, float* logits) const {
        return {tile, softmax, q + j * L, acc + j * L, m_i + j * L, l_i + j * L, logits, vectors * L, first, {}, {}, 0};
    }
    template <int N>
    static void add_strip(Strip<N> strip, const Sight& sight, Ahead& ahead) {
        for (int64_t g = 0; g < strip.tile.groups; ++g) strip.dot(g);
        strip.find_largest(sight);
        for (int64_t g = 0; g < strip.tile.groups; ++g) strip.weigh(g, ahead);
        for (int64_t s = 0; s < strip.tile.value_steps; ++s) strip.accumulate(s);
    }
};

}  // namespace TT_ISA
}  // namespace tt
#endif
