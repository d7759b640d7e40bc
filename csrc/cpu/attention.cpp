// Attention of a block over its context and over itself (reference/attention.py has the formulas).
//
// Softmax is computed online, one tile of keys after the other (Milakov & Gimelshein 2018; Dao et al. 2022): the
// context is read once, where it lies, and the block's own keys are just more tiles. A tile is widened to float once
// and serves all query rows of its key head, S * Hq / Hkv of them, which are packed with one row per SIMD lane: then
// both products take a tile's numbers one by one as scalars, so that neither keys nor values are transposed, and
// maximum and sum of the softmax go straight down the lanes. Sums over a tile start from zero, which errs less than one
// running sum.
//
// Work is split over batch rows, key heads and pieces of the query rows; when those would leave threads idle, also over
// the keys, and the parts are merged by their maxima and sums. How many parts there are depends on shapes, lengths and
// the number of threads, and so do the last bits of the result.
#include "attention.h"

#include <cstring>

#include "pair.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int64_t SIX = 6;     // rows of a product held in registers: with two vectors each, 12 sums of 16 registers
constexpr int64_t KEYS = 60;   // keys of a tile: K and V of head dimension 128 take 60 KB, well inside L2
constexpr int64_t TERMS = 64;  // of a logit that are summed on their own: one long sum of 512 would err more
constexpr int64_t ROWS = 256;  // query rows of a piece, and
constexpr int64_t PIECE = 1 << 15;  // numbers of a piece: queries and sums take 128 KB each

constexpr int64_t up_to(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

int64_t index_or(const View& view, int64_t i, int64_t otherwise) {
    return view ? index_at(view, i) : otherwise;
}

// Where the tokens of one batch row's context lie: an offset into storage for each position.
struct Context {
    Context(const View& storage, const View& context_index, const View& block_table, int64_t b)
        : storage(storage), table(block_table), row(index_or(context_index, b, b)) {}
    int64_t offset(int64_t position) const {
        if (!table) return row * storage.stride[0] + position * storage.stride[1];
        const int64_t page = storage.size[1], entry = row * table.stride[0] + position / page * table.stride[1];
        const int64_t at = table.dtype == DType::int64 ? table.as<int64_t>()[entry] : table.as<int32_t>()[entry];
        return at * storage.stride[0] + position % page * storage.stride[1];
    }
    int64_t tokens() const { return table ? table.size[1] * storage.size[1] : storage.size[1]; }
    const View &storage, &table;
    int64_t row;
};

// sums[i] = sum over k < n of a[i * row + k * step] * b[k], for six i; b[k] is a pair of vectors.
template <class W>
[[gnu::always_inline]] inline void product(Pair<W> (&sums)[SIX], const W* a, int64_t row, int64_t step, const W* b,
                                           int64_t n) {
    Pair<W> c0{}, c1{}, c2{}, c3{}, c4{}, c5{};
    for (int64_t k = 0; k < n; ++k, a += step, b += Pair<W>::lanes) {
        const Pair<W> p = load_pair(b);
        c0 = c0 + a[0] * p;
        c1 = c1 + a[row] * p;
        c2 = c2 + a[2 * row] * p;
        c3 = c3 + a[3 * row] * p;
        c4 = c4 + a[4 * row] * p;
        c5 = c5 + a[5 * row] * p;
    }
    sums[0] = c0, sums[1] = c1, sums[2] = c2, sums[3] = c3, sums[4] = c4, sums[5] = c5;
}

// One lane per query row: the query, and what has been summed so far over keys, relative to the largest logit.
template <class W>
struct Panel {
    W* q;    // [D, lanes]
    W* sum;  // [width, lanes], of values
    W* max;  // [lanes]
    W* all;  // [lanes], of weights
};

template <class W>
struct Tile {
    explicit Tile(int64_t dim, int64_t width) : k(KEYS * dim), v(KEYS * width), logits(KEYS * Pair<W>::lanes) {
        std::memset(v, 0, size_t(KEYS * width) * sizeof(W));  // columns from dim to width stay 0
    }
    Scratch<W> k, v, logits;  // [KEYS, D], [KEYS, width], [KEYS, lanes]
    int64_t n = 0;
};

// A problem in numbers, the same for all of its pieces.
template <class T>
struct Problem {
    using W = Wide<T>;
    static constexpr int64_t lanes = Pair<W>::lanes;

    explicit Problem(const BlockAttention& a)
        : a(a),
          batch(a.q.size[0]),
          length(a.q.size[1]),
          dim(a.q.size[3]),
          width(up_to(dim, SIX)),
          kv_heads(a.k ? a.k.size[2] : a.k_context.size[2]),
          group(a.q.size[2] / kv_heads),
          rows(length * group),
          piece(smaller(smaller(ROWS, larger(PIECE / dim / lanes, int64_t(1)) * lanes), up_to(rows, lanes))),
          pieces(piece ? (rows + piece - 1) / piece : 0) {}

    const BlockAttention& a;
    int64_t batch, length, dim, width, kv_heads, group, rows, piece, pieces;

    // A work item: some query rows of one key head of one batch row, and the keys they see.
    struct Item {
        int64_t b, head, first, rows, real;  // rows from `real` on are padding
        int64_t begin, end, own;             // context [begin, end), then own keys [0, own)
        int64_t context_tiles, tiles;
    };
    Item item(int64_t n) const {  // the last pieces first: under a causal mask they see the most
        Item item;
        item.head = n % kv_heads;
        item.b = n / kv_heads % batch;
        item.first = (pieces - 1 - n / kv_heads / batch) * piece;
        item.rows = smaller(piece, rows - item.first);
        const int64_t tokens = index_or(a.block_lens, item.b, length);
        item.real = smaller(larger(tokens * group - item.first, int64_t(0)), item.rows);
        item.begin = item.end = item.own = 0;
        if (item.real && a.k_context) {
            const Context context(a.k_context, a.context_index, a.block_table, item.b);
            item.end = index_or(a.context_lens, item.b, context.tokens());
            if (a.window >= 0) item.begin = larger(item.end - a.window, int64_t(0));
        }
        if (item.real && a.k) item.own = a.causal ? (item.first + item.real - 1) / group + 1 : tokens;
        item.context_tiles = (item.end - item.begin + KEYS - 1) / KEYS;
        item.tiles = item.context_tiles + (item.own + KEYS - 1) / KEYS;
        return item;
    }

    // State of one item: queries, sums of values, maxima, sums of weights.
    int64_t state_size() const { return piece * (width + 2); }
    Panel<W> panel(W* queries, W* state, int64_t row) const {
        return {queries + row * dim, state + row * width, state + piece * width + row,
                state + piece * (width + 1) + row};
    }

    const T* query(const Item& item, int64_t r) const {
        const int64_t row = item.first + r, head = item.head * group + row % group;
        return a.q.as<T>() + item.b * a.q.stride[0] + row / group * a.q.stride[1] + head * a.q.stride[2];
    }

    void pack(const Item& item, W* queries) const {
        for (int64_t r = 0; r < up_to(item.real, lanes); ++r) {
            W* to = queries + r / lanes * lanes * dim + r % lanes;
            const T* from = r < item.real ? query(item, r) : nullptr;
            for (int64_t d = 0; d < dim; ++d) to[d * lanes] = from ? widen(from[d]) : W(0);
        }
    }

    static void widen_row(W* to, const View& view, int64_t offset, int64_t n) {
        const T* from = view.as<T>() + offset;
        for (int64_t d = 0; d < n; ++d) to[d] = widen(from[d]);
    }

    void read_context(Tile<W>& tile, const Item& item, int64_t begin) const {
        const Context keys(a.k_context, a.context_index, a.block_table, item.b);
        const Context values(a.v_context, a.context_index, a.block_table, item.b);
        tile.n = smaller(KEYS, item.end - begin);
        for (int64_t i = 0; i < tile.n; ++i) {
            widen_row(tile.k + i * dim, a.k_context, keys.offset(begin + i) + item.head * a.k_context.stride[2], dim);
            widen_row(tile.v + i * width, a.v_context, values.offset(begin + i) + item.head * a.v_context.stride[2],
                      dim);
        }
    }

    void read_own(Tile<W>& tile, const Item& item, int64_t begin) const {
        tile.n = smaller(KEYS, item.own - begin);
        auto offset = [&](const View& view, int64_t i) {
            return item.b * view.stride[0] + (begin + i) * view.stride[1] + item.head * view.stride[2];
        };
        for (int64_t i = 0; i < tile.n; ++i) {
            widen_row(tile.k + i * dim, a.k, offset(a.k, i), dim);
            widen_row(tile.v + i * width, a.v, offset(a.v, i), dim);
        }
    }

    // Adds a tile's keys to a panel. Key i is hidden from the first hidden + i * group lanes.
    void add(const Panel<W>& panel, Tile<W>& tile, int64_t hidden) const {
        W* logits = tile.logits;
        const W *keys = tile.k, *weights = logits, *values = tile.v;
        Pair<W> sums[SIX], more[SIX];
        for (int64_t i = 0; i < tile.n; i += SIX) {
            product(sums, keys + i * dim, dim, 1, panel.q, smaller(dim, TERMS));
            for (int64_t d = TERMS; d < dim; d += TERMS) {
                product(more, keys + i * dim + d, dim, 1, panel.q + d * lanes, smaller(dim - d, TERMS));
                for (int64_t j = 0; j < SIX; ++j) sums[j] = sums[j] + more[j];
            }
            for (int64_t j = 0; j < SIX; ++j) store_pair(logits + (i + j) * lanes, W(a.scale) * sums[j]);
        }
        if (a.softcap > 0)
            for (int64_t i = 0; i < tile.n * lanes; ++i) logits[i] = W(a.softcap) * std::tanh(logits[i] / W(a.softcap));
        for (int64_t i = 0; i < tile.n && hidden + (tile.n - 1) * group > 0; ++i)
            for (int64_t lane = 0; lane < smaller(hidden + i * group, lanes); ++lane)
                logits[i * lanes + lane] = -INFINITY;

        const Pair<W> before = load_pair(panel.max);
        Pair<W> top = before, all{};
        for (int64_t i = 0; i < tile.n; ++i) top = larger(top, load_pair(logits + i * lanes));
        const Pair<W> base = replaced(top, W(-INFINITY), W(0));  // no key yet: -inf less -inf would be NaN
        const Pair<W> kept = exp_negative(before - base);
        for (int64_t i = 0; i < tile.n; ++i) {
            const Pair<W> weight = exp_negative(load_pair(logits + i * lanes) - base);
            all = all + weight;
            store_pair(logits + i * lanes, weight);
        }
        store_pair(panel.max, top);
        store_pair(panel.all, load_pair(panel.all) * kept + all);
        for (int64_t d = 0; d < width; d += SIX) {
            product(sums, values + d, 1, width, weights, tile.n);
            W* sum = panel.sum + d * lanes;
            for (int64_t j = 0; j < SIX; ++j) store_pair(sum + j * lanes, load_pair(sum + j * lanes) * kept + sums[j]);
        }
    }

    // All of an item's keys in tiles [begin, end), into a fresh state.
    void attend(const Item& item, int64_t begin, int64_t end, W* state) const {
        Scratch<W> queries(piece * dim);
        Tile<W> tile(dim, width);
        pack(item, queries);
        for (int64_t i = 0; i < piece * width; ++i) state[i] = 0;
        for (int64_t i = 0; i < piece; ++i) state[piece * width + i] = -INFINITY, state[piece * (width + 1) + i] = 0;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t own = (t - item.context_tiles) * KEYS;  // of the tile's first key, if it is an own key
            if (own < 0)
                read_context(tile, item, item.begin + t * KEYS);
            else
                read_own(tile, item, own);
            for (int64_t i = tile.n; i < up_to(tile.n, SIX); ++i)
                std::memset(tile.k + i * dim, 0, size_t(dim) * sizeof(W));
            for (int64_t r = 0; r < item.real; r += lanes) {
                int64_t hidden = -tile.n * group;  // from no row
                if (own >= 0 && a.causal) hidden = own * group - item.first - r;
                if (hidden < lanes) add(panel(queries, state, r), tile, hidden);
            }
        }
    }

    // Merges the states of an item's parts into the first, for one panel.
    void merge(W* states, int64_t parts, int64_t row) const {
        const Panel<W> first = panel(nullptr, states, row);
        Pair<W> top = load_pair(first.max), all{};
        for (int64_t p = 1; p < parts; ++p)
            top = larger(top, load_pair(panel(nullptr, states + p * state_size(), row).max));
        const Pair<W> base = replaced(top, W(-INFINITY), W(0));
        for (int64_t p = 0; p < parts; ++p) {
            const Panel<W> part = panel(nullptr, states + p * state_size(), row);
            const Pair<W> weight = exp_negative(load_pair(part.max) - base);
            all = all + weight * load_pair(part.all);
            for (int64_t d = 0; d < dim; ++d) {
                const Pair<W> sum = weight * load_pair(part.sum + d * lanes);
                store_pair(first.sum + d * lanes, p ? load_pair(first.sum + d * lanes) + sum : sum);
            }
        }
        store_pair(first.max, top);
        store_pair(first.all, all);
    }

    // Divides a panel by its weights and writes its rows; rows that saw no key, and padding, get 0 and -inf.
    void finish(const Item& item, W* state, int64_t row) const {
        const Panel<W> panel = this->panel(nullptr, state, row);
        const Pair<W> weights = replaced(load_pair(panel.all), W(0), W(1));
        for (int64_t d = 0; d < dim; ++d) store_pair(panel.sum + d * lanes, load_pair(panel.sum + d * lanes) / weights);
        for (int64_t lane = 0; lane < smaller(lanes, item.rows - row); ++lane) {
            const int64_t r = item.first + row + lane, s = r / group, head = item.head * group + r % group;
            const bool real = row + lane < item.real;
            T* out = a.out.as<T>() + item.b * a.out.stride[0] + s * a.out.stride[1] + head * a.out.stride[2];
            for (int64_t d = 0; d < dim; ++d) out[d] = narrow<T>(real ? panel.sum[d * lanes + lane] : W(0));
            W* lse = a.lse.as<W>() + item.b * a.lse.stride[0] + s * a.lse.stride[1] + head * a.lse.stride[2];
            *lse = real ? panel.max[lane] + std::log(panel.all[lane]) : W(-INFINITY);
        }
    }

    void run() const {
        const int64_t items = batch * kv_heads * pieces;
        const int64_t threads = max_threads();
        int64_t longest = 0, total = 0, parts = 1;
        for (int64_t n = 0; n < items; ++n) {
            const int64_t tiles = item(n).tiles;
            longest = larger(longest, tiles);
            total += tiles;
        }
        const bool even = items % threads == 0 && longest * items <= total + total / 8;
        const bool fine = longest * threads * 4 <= total;
        if (!even && !fine)  // two parts for every thread, each of two tiles at least
            parts = larger(smaller((2 * threads + items - 1) / items, longest / 2), int64_t(1));
        if (parts == 1) {
            parallel_for(items, 1, [&](int64_t begin, int64_t end) {
                Scratch<W> state(state_size());
                for (int64_t n = begin; n < end; ++n) {
                    const Item item = this->item(n);
                    attend(item, 0, item.tiles, state);
                    for (int64_t r = 0; r < item.rows; r += lanes) finish(item, state, r);
                }
            });
            return;
        }
        Scratch<W> states(items * parts * state_size());
        W* all = states;
        parallel_for(items * parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                const Item item = this->item(n / parts);
                const int64_t part = n % parts;
                attend(item, item.tiles * part / parts, item.tiles * (part + 1) / parts, all + n * state_size());
            }
        });
        const int64_t panels = piece / lanes;
        parallel_for(items * panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                const Item item = this->item(n / panels);
                const int64_t row = n % panels * lanes;
                if (row >= item.rows) continue;
                W* state = all + n / panels * parts * state_size();
                merge(state, parts, row);
                finish(item, state, row);
            }
        });
    }
};

template <class T>
void merge_rows(const MergeAttention& m) {
    using W = Wide<T>;
    const int64_t dim = m.out.size[1];
    parallel_for(m.out.size[0], 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            const W a = m.lse_a.as<W>()[n * m.lse_a.stride[0]], b = m.lse_b.as<W>()[n * m.lse_b.stride[0]];
            const T* out_a = m.out_a.as<T>() + n * m.out_a.stride[0];
            const T* out_b = m.out_b.as<T>() + n * m.out_b.stride[0];
            T* out = m.out.as<T>() + n * m.out.stride[0];
            const W top = a > b ? a : b;
            const bool no_a = a == -INFINITY, no_b = b == -INFINITY;
            const W exp_a = no_a ? W(0) : std::exp(a - top), exp_b = no_b ? W(0) : std::exp(b - top);
            const W weight_a = no_a ? W(0) : exp_a / (exp_a + exp_b), weight_b = no_b ? W(0) : exp_b / (exp_a + exp_b);
            for (int64_t d = 0; d < dim; ++d) {  // a side without keys may hold anything, NaN too
                const W from_a = no_a ? W(0) : weight_a * widen(out_a[d]),
                        from_b = no_b ? W(0) : weight_b * widen(out_b[d]);
                out[d] = narrow<T>(from_a + from_b);
            }
            W lse = top + std::log1p(std::exp(-std::fabs(a - b)));
            if (a == b) lse = top + W(0.693147180559945309);  // also where the difference is NaN: infinities
            m.lse.as<W>()[n * m.lse.stride[0]] = no_a ? b : no_b ? a : lse;
        }
    });
}

void append_rows(const View& context, const View& block, const AppendKv& a) {
    const int64_t length = block.size[1], heads = block.size[2];
    const int64_t size = block.dtype == DType::float64 ? 8 : block.dtype == DType::float32 ? 4 : 2;
    parallel_for(block.size[0] * length, 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            const int64_t b = n / length, s = n % length;
            if (s >= index_or(a.block_lens, b, length)) continue;
            const int64_t to =
                Context(context, a.context_index, a.block_table, b).offset(index_at(a.context_lens, b) + s);
            const int64_t from = b * block.stride[0] + s * block.stride[1];
            for (int64_t head = 0; head < heads; ++head)
                std::memcpy(context.as<char>() + (to + head * context.stride[2]) * size,
                            block.as<char>() + (from + head * block.stride[2]) * size, size_t(block.size[3] * size));
        }
    });
}

}  // namespace

void block_attention(const BlockAttention& a) {
    for_float(a.q.dtype, [&](auto type) { Problem<typename decltype(type)::type>(a).run(); });
}

void merge_attention(const MergeAttention& m) {
    for_float(m.out.dtype, [&](auto type) { merge_rows<typename decltype(type)::type>(m); });
}

void append_kv(const AppendKv& a) {
    append_rows(a.k_context, a.k, a);
    append_rows(a.v_context, a.v, a);
}

}  // namespace TT_ISA
}  // namespace tt
