// How a set of experts goes over its tokens (moe_experts.cpp says why so), for matrices stored as Q: the tensors' dtype
// T itself, or codes (quantized.h).
#pragma once

#include "moe.h"
#include "moe_activation.h"
#include "numeric.h"
#include "parallel.h"
#include "rounding.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

constexpr int64_t group_pairs = 1024;

// Some pairs of one expert: `count` of them, from `begin` in the group.
struct Tile {
    int64_t expert, begin, count;
};

// A matrix per expert, or one for all tokens, stored as numbers of Q; see quantized.h for codes.
template <class Q>
struct Stored {
    struct Rows {  // from one row on
        const Q* first;
        int64_t stride;
    };
    const View& w;
    bool per_expert;
    int64_t experts() const { return w.size[0]; }
    int64_t rows() const { return w.size[per_expert ? 1 : 0]; }
    int64_t columns() const { return w.size[per_expert ? 2 : 1]; }
    Rows from(int64_t expert, int64_t row) const {
        if (per_expert) return {w.as<Q>() + expert * w.stride[0] + row * w.stride[1], w.stride[1]};
        return {w.as<Q>() + row * w.stride[0], w.stride[0]};
    }
};
template <class W, class T>
inline void multiply_rows(const typename Stored<T>::Rows& w, int rows, const Panel<W, T>& x, int64_t n,
                          const typename Stored<T>::Rows& next, W* out) {
    skinny(w.first, w.stride, rows, x, n, next.first, out);
}

// One set of experts with their pairs. Without a plan there is one expert, which takes every token with weight 1.
template <class Q>
struct Experts {
    const MoeExperts& a;
    Stored<Q> up, down;
    bool planned;
    int64_t count() const { return planned ? up.experts() : 1; }
    int64_t pairs() const { return planned ? a.pairs.size[0] : a.x.size[0]; }
    int64_t end(int64_t expert) const { return planned ? a.offsets.as<int64_t>()[expert + 1] : pairs(); }
    template <class T>
    const T* bias(const View& of_all, int64_t expert) const {  // null: none
        return planned && of_all ? of_all.as<T>() + expert * of_all.stride[0] : nullptr;
    }
};

// The products of a panel's pairs, plus the bias of their rows.
template <class T>
inline void add_bias(Wide<T>* products, int64_t pairs, const T* bias, int rows) {
    for (int64_t m = 0; m < pairs; ++m)
        for (int r = 0; r < rows; ++r) products[m * skinny_rows + r] += widen(bias[r]);
}

// The pairs at work: their activations before and in between, as panels of each tile, and where their results go.
template <class T, class Q>
struct Group {
    using W = Wide<T>;
    using P = Panel<W, Q>;
    Group(int64_t pairs, int64_t h, int64_t i)
        : x_row(P::padded(h)),
          hidden_row(P::padded(i)),
          x(pairs + P::spare, x_row),
          hidden(pairs + P::spare, hidden_row),
          weight(pairs),
          token(pairs),
          tiles(pairs) {}
    int64_t x_row, hidden_row;
    Scratch<typename P::Kept> x, hidden;
    Scratch<W> weight;
    Scratch<int64_t> token;
    Scratch<Tile> tiles;
    int64_t tile_count = 0, first = 0, count = 0;  // pairs [first, first + count) of all
};

// The next pairs, at most group_pairs; false after the last.
template <class T, class Q>
bool advance(const Experts<Q>& experts, Group<T, Q>& group, int64_t& expert) {
    group.first += group.count;
    group.count = group.tile_count = 0;
    Tile* tiles = group.tiles;
    while (expert < experts.count() && group.count < group_pairs) {
        const int64_t left = experts.end(expert) - group.first - group.count;
        const int64_t taken = smaller(left, group_pairs - group.count);
        if (taken > 0) tiles[group.tile_count++] = {expert, group.count, taken};
        group.count += taken;
        if (taken == left) ++expert;
    }
    return group.count > 0;
}

template <class T, class Q>
void gather(const Experts<Q>& experts, Group<T, Q>& group) {
    using W = Wide<T>;
    const MoeExperts& a = experts.a;
    const int64_t h = a.x.size[1];
    const Tile* tiles = group.tiles;
    parallel_for(group.tile_count, 8, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const Tile tile = tiles[t];
            for_panels<W, Q>(group.x + tile.begin * group.x_row, tile.count, h, [&](auto panel, int64_t first) {
                for (int64_t m = 0; m < panel.count; ++m) {
                    const int64_t p = tile.begin + first + m;
                    int64_t token = group.first + p;
                    W weight = 1;
                    if (experts.planned) {
                        const int64_t k = a.weights.size[1], pair = a.pairs.as<int64_t>()[token];
                        token = pair / k;
                        load<W>(&weight, a.weights, token * a.weights.stride[0] + pair % k, 1);
                    }
                    static_cast<int64_t*>(group.token)[p] = token;
                    static_cast<W*>(group.weight)[p] = weight;
                    panel.fill(m, a.x, token * a.x.stride[0], h);
                }
            });
        }
    });
}

// Pieces of so many products that together are worth a thread's while, about 2^16.
inline int64_t grain(int64_t products) {
    return larger<int64_t>(1, 65536 / larger<int64_t>(1, products));
}

// hidden = act(up x): one piece of work is 16 of I of one tile.
template <class T, class Q>
void up(const Experts<Q>& experts, Group<T, Q>& group) {
    using W = Wide<T>;
    const bool gated = experts.a.activation >= Activation::silu_gated;
    const Activate<T> activate(experts.a);
    const int64_t h = experts.a.x.size[1], i_size = experts.up.rows() / (gated ? 2 : 1);
    const int64_t blocks = (i_size + skinny_rows - 1) / skinny_rows, pieces = group.tile_count * blocks;
    const Tile* tiles = group.tiles;
    const auto rows_of = [&](int64_t piece) {
        return experts.up.from(tiles[piece / blocks].expert, piece % blocks * skinny_rows);
    };
    parallel_for(pieces, grain(skinny_rows * h), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const SkinnyThread<Q> ready;
        W gate[Panel<W, Q>::most * skinny_rows], value[Panel<W, Q>::most * skinny_rows];
        for (int64_t piece = begin; piece < end; ++piece) {
            const Tile tile = tiles[piece / blocks];
            const int64_t i = piece % blocks * skinny_rows;
            const int rows = int(smaller<int64_t>(skinny_rows, i_size - i));
            const auto row = rows_of(piece), next = rows_of(piece + 1 < end ? piece + 1 : piece);
            const auto value_row = gated ? experts.up.from(tile.expert, i_size + i) : row;
            const T* bias = experts.template bias<T>(experts.a.up_bias, tile.expert);
            for_panels<W, Q>(group.x + tile.begin * group.x_row, tile.count, h, [&](auto x, int64_t first) {
                if (gated) multiply_rows(row, rows, x, h, value_row, gate);
                multiply_rows(value_row, rows, x, h, next, value);
                if (bias) {
                    if (gated) add_bias(gate, x.count, bias + i, rows);
                    add_bias(value, x.count, gated ? bias + i_size + i : bias + i, rows);
                }
                const Panel<W, Q> hidden = {group.hidden + (tile.begin + first) * group.hidden_row, x.count};
                for (int64_t m = 0; m < x.count; ++m) {
                    W* act = value + m * skinny_rows;
                    activate(gate + m * skinny_rows, act, rows);
                    hidden.put(m, i, act, rows);
                    if (i + rows == i_size) hidden.clear(m, i_size, group.hidden_row);
                }
            });
        }
    });
}

// total += weight * down hidden: one piece of work is 16 of H, for all tiles in their order.
template <class T, class Q>
void down(const Experts<Q>& experts, Group<T, Q>& group) {
    using W = Wide<T>;
    const int64_t h_size = experts.a.x.size[1], i_size = experts.down.columns();
    const int64_t blocks = (h_size + skinny_rows - 1) / skinny_rows;
    const Tile* tiles = group.tiles;
    const W* weight = group.weight;
    const int64_t* token = group.token;
    const int64_t products = skinny_rows * i_size * group.tile_count;
    parallel_for(blocks, grain(products), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const SkinnyThread<Q> ready;
        W y[Panel<W, Q>::most * skinny_rows];
        for (int64_t t = 0; t < group.tile_count; ++t) {
            const Tile tile = tiles[t];
            for (int64_t block = begin; block < end; ++block) {
                const int64_t h = block * skinny_rows;
                const int rows = int(smaller<int64_t>(skinny_rows, h_size - h));
                const auto row = experts.down.from(tile.expert, h);
                auto next = row;
                if (block + 1 < end)
                    next = experts.down.from(tile.expert, h + skinny_rows);
                else if (t + 1 < group.tile_count)
                    next = experts.down.from(tiles[t + 1].expert, begin * skinny_rows);
                const T* bias = experts.template bias<T>(experts.a.down_bias, tile.expert);
                for_panels<W, Q>(group.hidden + tile.begin * group.hidden_row, tile.count, i_size,
                                 [&](auto hidden, int64_t first) {
                                     multiply_rows(row, rows, hidden, i_size, next, y);
                                     if (bias) add_bias(y, hidden.count, bias + h, rows);
                                     for (int64_t m = 0; m < hidden.count; ++m) {
                                         const int64_t p = tile.begin + first + m;
                                         W* total = experts.a.total.template as<W>() + token[p] * h_size + h;
                                         const W by = weight[p], *of = y + m * skinny_rows;
                                         for_vectors<W>(rows, [=](int64_t r, auto n) {
                                             const auto added = by * Rounding<T>::rounded(load_some<W>(of + r, n));
                                             store_some<W>(total + r, load_some<W>(total + r, n) + added, n);
                                         });
                                     }
                                 });
            }
        }
    });
}

template <class T, class Q>
void add(const Experts<Q>& experts) {
    const int64_t i_size = experts.down.columns();
    Group<T, Q> group(smaller(group_pairs, experts.pairs()), experts.a.x.size[1], i_size);
    for (int64_t expert = 0; advance(experts, group, expert);) {
        gather(experts, group);
        up(experts, group);
        down(experts, group);
    }
}

}  // namespace TT_ISA
}  // namespace tt
