// The experts' two products and the weighted sum over each token's experts (reference/moe.py).
//
// With few tokens this is the reading of weights: at N = 16, k = 6 and E = 128 some 69 experts are read for 96 pairs
// of token and expert. So every row of weights is read once, for all tokens of its expert (see skinny.h), and work is
// cut along the weights' rows, not along the tokens: 16 rows of one expert's up projection, or 16 rows of all experts'
// down projections. The latter makes one thread the owner of its columns of the output: experts are added in
// ascending order without atomics, and the result does not depend on the threads.
//
// With many tokens, pairs are taken in groups of 1024, whole experts where they fit, between which everything is as
// above: scratch memory is bounded by the group, and an expert's weights are still read once per 1024 of its tokens.
// Each product, the activation and each expert's result round to the tensors' dtype, as when the model was trained; the
// sums inside a product and the weighted sum over experts are float (or double). Keeping more digits in between is
// another model: a router downstream then chooses other experts at the boundaries between them.
#include "moe.h"
#include "moe_activation.h"
#include "numeric.h"
#include "parallel.h"
#include "rounding.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int64_t group_pairs = 1024;

// Some pairs of one expert: `count` of them, from `begin` in the group.
struct Tile {
    int64_t expert, begin, count;
};

// One set of experts with their pairs. Without a plan there is one expert, which takes every token with weight 1.
struct Experts {
    const MoeExperts& a;
    const View &up, &down;  // without a plan, a matrix each
    bool planned;
    int64_t count() const { return planned ? up.size[0] : 1; }
    int64_t pairs() const { return planned ? a.pairs.size[0] : a.x.size[0]; }
    int64_t end(int64_t expert) const { return planned ? a.offsets.as<int64_t>()[expert + 1] : pairs(); }
    template <class T>
    const T* row(const View& w, int64_t expert, int64_t r) const {
        return w.as<T>() + (planned ? expert * w.stride[0] + r * w.stride[1] : r * w.stride[0]);
    }
    int64_t row_stride(const View& w) const { return w.stride[planned ? 1 : 0]; }
    int64_t rows(const View& w) const { return w.size[planned ? 1 : 0]; }
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
template <class T>
struct Group {
    using W = Wide<T>;
    using P = Panel<W, T>;
    Group(int64_t pairs, int64_t h, int64_t i)
        : x_row(P::padded(h)),
          hidden_row(P::padded(i)),
          x(pairs, x_row),
          hidden(pairs, hidden_row),
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
template <class T>
bool advance(const Experts& experts, Group<T>& group, int64_t& expert) {
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

template <class T>
void gather(const Experts& experts, Group<T>& group) {
    using W = Wide<T>;
    const MoeExperts& a = experts.a;
    const int64_t h = a.x.size[1];
    const Tile* tiles = group.tiles;
    parallel_for(group.tile_count, 8, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const Tile tile = tiles[t];
            for_panels<W, T>(group.x + tile.begin * group.x_row, tile.count, h, [&](auto panel, int64_t first) {
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
template <class T>
void up(const Experts& experts, Group<T>& group) {
    using W = Wide<T>;
    const View& w = experts.up;
    const bool gated = experts.a.activation >= Activation::silu_gated;
    const Activate<T> activate(experts.a);
    const int64_t h = experts.a.x.size[1], stride = experts.row_stride(w);
    const int64_t i_size = gated ? experts.rows(w) / 2 : experts.rows(w);
    const int64_t blocks = (i_size + skinny_rows - 1) / skinny_rows, pieces = group.tile_count * blocks;
    const Tile* tiles = group.tiles;
    const auto first_row = [&](int64_t piece) {
        return experts.row<T>(w, tiles[piece / blocks].expert, piece % blocks * skinny_rows);
    };
    parallel_for(pieces, grain(skinny_rows * h), [&](int64_t begin, int64_t end) {
        W gate[skinny_panel * skinny_rows], value[skinny_panel * skinny_rows];
        for (int64_t piece = begin; piece < end; ++piece) {
            const Tile tile = tiles[piece / blocks];
            const int64_t i = piece % blocks * skinny_rows;
            const int rows = int(smaller<int64_t>(skinny_rows, i_size - i));
            const T *row = first_row(piece), *next = first_row(piece + 1 < end ? piece + 1 : piece);
            const T* value_row = gated ? row + i_size * stride : row;
            const T* bias = experts.bias<T>(experts.a.up_bias, tile.expert);
            for_panels<W, T>(group.x + tile.begin * group.x_row, tile.count, h, [&](auto x, int64_t first) {
                if (gated) skinny(row, stride, rows, x, h, value_row, gate);
                skinny(value_row, stride, rows, x, h, next, value);
                if (bias) {
                    if (gated) add_bias(gate, x.count, bias + i, rows);
                    add_bias(value, x.count, gated ? bias + i_size + i : bias + i, rows);
                }
                const Panel<W, T> hidden = {group.hidden + (tile.begin + first) * group.hidden_row, x.count};
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
template <class T>
void down(const Experts& experts, Group<T>& group) {
    using W = Wide<T>;
    const View& w = experts.down;
    const int64_t h_size = experts.a.x.size[1], i_size = w.size[experts.planned ? 2 : 1];
    const int64_t stride = experts.row_stride(w), blocks = (h_size + skinny_rows - 1) / skinny_rows;
    const Tile* tiles = group.tiles;
    const W* weight = group.weight;
    const int64_t* token = group.token;
    const int64_t products = skinny_rows * i_size * group.tile_count;
    parallel_for(blocks, grain(products), [&](int64_t begin, int64_t end) {
        W y[skinny_panel * skinny_rows];
        for (int64_t t = 0; t < group.tile_count; ++t) {
            const Tile tile = tiles[t];
            for (int64_t block = begin; block < end; ++block) {
                const int64_t h = block * skinny_rows;
                const int rows = int(smaller<int64_t>(skinny_rows, h_size - h));
                const T *row = experts.row<T>(w, tile.expert, h), *next = row;
                if (block + 1 < end)
                    next = row + skinny_rows * stride;
                else if (t + 1 < group.tile_count)
                    next = experts.row<T>(w, tiles[t + 1].expert, begin * skinny_rows);
                const T* bias = experts.bias<T>(experts.a.down_bias, tile.expert);
                for_panels<W, T>(group.hidden + tile.begin * group.hidden_row, tile.count, i_size,
                                 [&](auto hidden, int64_t first) {
                                     skinny(row, stride, rows, hidden, i_size, next, y);
                                     if (bias) add_bias(y, hidden.count, bias + h, rows);
                                     for (int64_t m = 0; m < hidden.count; ++m) {
                                         const int64_t p = tile.begin + first + m;
                                         W* total = experts.a.total.as<W>() + token[p] * h_size + h;
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

template <class T>
void add(const Experts& experts) {
    const int64_t i_size = experts.down.size[experts.planned ? 2 : 1];
    Group<T> group(smaller(group_pairs, experts.pairs()), experts.a.x.size[1], i_size);
    for (int64_t expert = 0; advance(experts, group, expert);) {
        gather<T>(experts, group);
        up<T>(experts, group);
        down<T>(experts, group);
    }
}

template <class T>
void experts_of(const MoeExperts& a) {
    using W = Wide<T>;
    const int64_t n = a.x.size[0], h = a.x.size[1];
    W* total = a.total.as<W>();
    parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) total[i] = 0;
    });
    add<T>({a, a.up, a.down, true});
    if (a.shared_up) {
        parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) total[i] = rounded<T>(total[i]);
        });
        add<T>({a, a.shared_up, a.shared_down, false});
    }
    if (a.total.data == a.out.data) return;
    parallel_for(n * h, 65536, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) a.out.as<T>()[i] = narrow<T>(total[i]);
    });
}

}  // namespace

void moe_experts(const MoeExperts& a) {
    for_fast(
        a.x.dtype, [&](auto type) { experts_of<typename decltype(type)::type>(a); }, [&] { baseline::moe_experts(a); });
}

}  // namespace TT_ISA
}  // namespace tt
