// Attention of a block over its context and over itself (reference/attention.py has the formulas).
//
// Softmax is computed online, one tile of keys after the other (Milakov & Gimelshein 2018; Dao et al. 2022): the
// context is read once, where it lies, and the block's own keys are just more tiles. A tile is widened to float, or its
// bfloat16 numbers paired where the processor multiplies pairs, once for all query rows of its key head,
// S * Hq / Hkv of them; attention_tile.h has what is done with it. Sums over a tile start from zero, which errs less
// than one running sum.
//
// A row's bits depend on the row alone. Work is split over batch rows, key heads and pieces of the query rows; keys are
// split into parts at fixed tiles, each with a state of its own, and the states are added up in order, by one thread or
// by many. Under a causal mask context and block are one sequence whose tiles start at multiples of their size, counted
// from the first token that is not left padding, so it does not matter where the block begins, whether its keys lie in
// the context already, or how it is padded: tokens at once see what they see one by one. (A key that is hidden weighs
// exactly 0, and so does a part of which a row sees nothing.) A sink comes last, when all parts are added up.
#include "attention.h"

#include "attention_tile.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int64_t rows_of_piece = 256;         // query rows of a piece, and
constexpr int64_t numbers_of_piece = 1 << 15;  // its numbers: queries and sums take 128 KB each

// Keys are split into parts of 4 tiles, and beyond 64 tiles of a sixteenth of what lies before them: enough to do for
// many threads, and little to add up. The tile with which a part begins, and the part that holds a tile.
constexpr int64_t tiles_of_part = 4, parts_of_octave = 16;
inline int64_t first_tile(int64_t part) {
    if (part < parts_of_octave) return part * tiles_of_part;
    const int64_t octave = part / parts_of_octave - 1, rest = part % parts_of_octave;
    return (parts_of_octave + rest) * (tiles_of_part << octave);
}
inline int64_t part_of(int64_t tile) {
    int64_t octave = 0;
    while ((2 * parts_of_octave * tiles_of_part << octave) <= tile) ++octave;
    return octave * parts_of_octave + tile / (tiles_of_part << octave);
}
constexpr int64_t most_states = 1 << 27;  // numbers, of parts at a time

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

// A problem in numbers, the same for all of its pieces.
template <class Kind>
struct Problem {
    using T = typename Kind::Number;
    using W = typename Kind::W;
    using Factor = typename Kind::Factor;
    using Lanes = Vector<W>;
    static constexpr int64_t L = lanes_of<W>, widest = most_vectors * L;  // lanes of a vector, and of a full panel

    explicit Problem(const BlockAttention& a)
        : a(a),
          softmax{a.scale, a.softcap},
          batch(a.q.size[0]),
          length(a.q.size[1]),
          dim(a.q.size[3]),
          value_dim(a.out.size[3]),
          width(Columns(value_dim).width),
          kv_heads(a.k ? a.k.size[2] : a.k_context.size[2]),
          group(a.q.size[2] / kv_heads),
          query_rows(length * group),
          step(larger(smaller(a.causal, length), int64_t(1))),
          piece(smaller(
              smaller(rows_of_piece, larger(numbers_of_piece / larger(dim, value_dim) / widest, int64_t(1)) * widest),
              up_to(query_rows, L))),
          pieces(piece ? (query_rows + piece - 1) / piece : 0) {}

    const BlockAttention& a;
    Softmax softmax;
    int64_t batch, length, dim, value_dim, width, kv_heads, group, query_rows, step, piece, pieces;

    // A work item: some query rows of one key head of one batch row, and the keys they see.
    struct Item {
        int64_t b, head, first, query_rows, real_rows;  // those from real_rows on are padding
        int64_t begin, end, own;                        // context [begin, end), then own keys [0, own)
        int64_t origin;                                 // where the first query's own key is, or would be
        int64_t seen, window;                           // the first key that a row sees; keys that each sees, -1: all
        int64_t context_tiles, tiles;                   // context_tiles: only where there is no causal mask
        int64_t start, skipped;                         // where tiles are counted from; those before the first
        int64_t first_part() const { return part_of(skipped); }
        int64_t parts() const { return tiles ? part_of(skipped + tiles - 1) + 1 - first_part() : 1; }
        // Of a part, counted from the item's first: its tiles, counted from the item's first.
        int64_t part_begin(int64_t part) const {
            return smaller(larger(first_tile(first_part() + part) - skipped, int64_t(0)), tiles);
        }
    };
    Item item(int64_t n) const {  // the last pieces first: under a causal mask they see the most
        Item item;
        item.head = n % kv_heads;
        item.b = n / kv_heads % batch;
        item.first = (pieces - 1 - n / kv_heads / batch) * piece;
        item.query_rows = smaller(piece, query_rows - item.first);
        const int64_t tokens = index_or(a.block_lens, item.b, length);
        item.real_rows = smaller(larger(tokens * group - item.first, int64_t(0)), item.query_rows);
        item.begin = item.end = item.own = item.start = item.origin = 0;
        item.window = -1;
        if (item.real_rows && a.k_context) {
            const Context context(a.k_context, a.context_index, a.block_table, item.b);
            item.end = index_or(a.context_lens, item.b, context.tokens());
            item.begin = item.start = smaller(index_or(a.context_starts, item.b, 0), item.end);
            if (a.window >= 0 && (a.k || !a.causal)) item.begin = larger(item.end - a.window, item.start);
            if (a.window >= 0 && !a.k && a.causal) item.window = smaller(a.window, context.tokens() + length);
        }
        item.seen = item.begin;
        item.origin = item.end;
        const int64_t last = item.real_rows ? (item.first + item.real_rows - 1) / group : 0;
        if (item.real_rows && a.k) item.own = a.causal ? smaller(last / step * step + step, tokens) : tokens;
        if (item.real_rows && !a.k && a.causal) {  // the block's own keys are the context's last
            item.origin -= tokens;
            item.end = larger(item.origin + last / step * step + step, item.begin);
            if (item.window >= 0) item.seen = larger(item.origin + item.first / group - item.window + 1, item.begin);
        }
        const auto tiles = [](int64_t keys) { return (keys + keys_of_tile - 1) / keys_of_tile; };
        item.skipped = a.causal ? (item.seen - item.start) / keys_of_tile : 0;
        item.context_tiles = a.causal ? 0 : tiles(item.end - item.begin);
        if (!a.causal)
            item.tiles = item.context_tiles + tiles(item.own);
        else
            item.tiles = item.seen < item.end + item.own ? tiles(item.end + item.own - item.start) - item.skipped : 0;
        return item;
    }

    // State of one item: sums of values, maxima, sums of weights.
    int64_t state_size() const { return piece * (width + 2); }
    // Panels for rows [begin, end) of an item, as wide as they are full: f(panel, first row).
    template <class F>
    void each_panel(Factor* queries, W* state, int64_t begin, int64_t end, F f) const {
        int vectors = most_vectors;
        for (int64_t r = begin; r < end; r += vectors * L) {
            while ((vectors - 1) * L >= end - r) vectors /= 2;
            f(Panel<Kind>{queries + r * factors_of<Kind>(dim), state + r * width, state + piece * width + r,
                          state + piece * (width + 1) + r, vectors},
              r);
        }
    }

    // Where row r of an item is in a tensor [B, S, Hq, ...].
    int64_t offset(const View& view, const Item& item, int64_t r) const {
        const int64_t row = item.first + r, head = item.head * group + row % group;
        return item.b * view.stride[0] + row / group * view.stride[1] + head * view.stride[2];
    }

    // Queries as factors, rows along the lanes. lines: [L, up_to(factors, L)].
    void pack(const Item& item, Factor* queries, Factor* lines) const {
        using Factors = typename Kind::Factors;
        const int64_t factors = factors_of<Kind>(dim), line = up_to(factors, L);
        std::memset(lines, 0, size_t(L * line) * sizeof(Factor));
        each_panel(queries, nullptr, 0, item.real_rows, [&](const Panel<Kind>& panel, int64_t first) {
            for (int64_t j = 0; j < panel.vectors; ++j) {
                for (int64_t i = 0; i < L; ++i) {
                    const int64_t r = first + j * L + i;
                    Factor* to = lines + i * line;
                    if (r < item.real_rows)
                        Kind::widen_row(to, a.q.as<T>() + offset(a.q, item, r), dim);
                    else
                        std::memset(to, 0, size_t(factors) * sizeof(Factor));
                }
                Factors* to = reinterpret_cast<Factors*>(panel.q) + j;
                for (int64_t d = 0; d < factors; d += L) {
                    Factors block[L];
                    for (int64_t i = 0; i < L; ++i) block[i] = *reinterpret_cast<Factors*>(lines + i * line + d);
                    transpose(block);
                    for (int64_t i = 0; i < smaller(L, factors - d); ++i) to[(d + i) * panel.vectors] = block[i];
                }
            }
        });
    }

    // Where a tile of a causal item begins, as a position in context and block.
    int64_t position(const Item& item, int64_t t) const {
        return larger(item.begin, item.start + (item.skipped + t) * keys_of_tile);
    }

    // f(tokens, key, value) for a tile; key(i) and value(i) point to a token's.
    template <class F>
    void with_tile(const Item& item, int64_t t, F f) const {
        if (a.causal) {
            const int64_t begin = position(item, t), end = item.start + (item.skipped + t + 1) * keys_of_tile;
            auto at = [&](const View& storage, const View& block) {
                const Context context(storage, a.context_index, a.block_table, item.b);
                const int64_t own = item.b * block.stride[0] + item.head * block.stride[2];
                return [&storage, &block, &item, context, begin, own](int64_t i) {
                    const int64_t at = larger(begin + i, item.seen);  // in place of keys that no row sees
                    if (at < item.end) return storage.as<T>() + context.offset(at) + item.head * storage.stride[2];
                    return block.as<T>() + own + (at - item.end) * block.stride[1];
                };
            };
            return f(smaller(end, item.end + item.own) - begin, at(a.k_context, a.k), at(a.v_context, a.v));
        }
        if (t >= item.context_tiles) {
            const int64_t begin = (t - item.context_tiles) * keys_of_tile;
            auto at = [&](const View& view) {
                const int64_t from = item.b * view.stride[0] + begin * view.stride[1] + item.head * view.stride[2];
                return [&view, from](int64_t i) { return view.as<T>() + from + i * view.stride[1]; };
            };
            return f(smaller(keys_of_tile, item.own - begin), at(a.k), at(a.v));
        }
        const int64_t begin = item.begin + t * keys_of_tile;
        auto at = [&](const View& view) {
            const Context context(view, a.context_index, a.block_table, item.b);
            return [&view, &item, context, begin](int64_t i) {
                return view.as<T>() + context.offset(begin + i) + item.head * view.stride[2];
            };
        };
        f(smaller(keys_of_tile, item.end - begin), at(a.k_context), at(a.v_context));
    }

    void look_ahead(Ahead& ahead, const Item& item, int64_t t) const {
        with_tile(item, t, [&](int64_t n, auto key, auto value) {
            for (int64_t i = 0; i < n; ++i) {
                ahead.addresses[2 * i] = reinterpret_cast<const char*>(key(i));
                ahead.addresses[2 * i + 1] = reinterpret_cast<const char*>(value(i));
            }
            ahead.count = 2 * n;
        });
        ahead.bytes = larger(dim, value_dim) * int64_t(sizeof(T));
        ahead.next = ahead.offset = 0;
        const int64_t calls = (item.real_rows + widest - 1) / widest * (keys_of_tile / 6);
        ahead.lines = (ahead.count * up_to(ahead.bytes, 64) / 64 + calls - 1) / calls;
    }

    // What a thread works with.
    struct Workspace {
        explicit Workspace(const Problem& p)
            : queries_size(up_to(p.piece * factors_of<Kind>(p.dim), 16)),
              tile_size(up_to(Tile<Kind>::size(p.dim, p.value_dim), 16)),
              lines_size(up_to(L * up_to(larger(p.dim, p.width), L), 16)),
              memory((queries_size + tile_size + lines_size) * int64_t(sizeof(Factor)) +
                     (keys_of_tile * widest + 2 * p.state_size()) * int64_t(sizeof(W))),
              queries(reinterpret_cast<Factor*>(static_cast<char*>(memory))),
              tile(queries + queries_size, p.dim, p.value_dim),
              lines(queries + queries_size + tile_size),
              logits(reinterpret_cast<W*>(lines + lines_size)),
              state(logits + keys_of_tile * widest),
              part(state + p.state_size()) {}
        int64_t queries_size, tile_size, lines_size;
        Scratch<char> memory;
        Factor* queries;  // [piece, factors], panel by panel
        Tile<Kind> tile;
        Factor* lines;  // [L, up_to(dim or width, L)], for transpositions
        W* logits;      // [keys_of_tile, widest]
        W *state, *part;
    };

    // All of an item's keys in tiles [begin, end), into a fresh state. The queries are packed. next: the tile that this
    // thread comes to after them, to be fetched ahead.
    void attend(const Item& item, int64_t begin, int64_t end, int64_t next, Workspace& workspace, W* state) const {
        if (begin == end)
            each_panel(workspace.queries, state, 0, item.real_rows,
                       [&](const Panel<Kind>& panel, int64_t) { panel.clear(width); });
        Ahead ahead;
        for (int64_t t = begin; t < end; ++t) {
            with_tile(item, t, [&](int64_t n, auto key, auto value) { workspace.tile.read(n, key, value); });
            ahead.count = 0;
            if (t + 1 < end || next < item.tiles) look_ahead(ahead, item, t + 1 < end ? t + 1 : next);
            const int64_t keys = workspace.tile.keys, key = a.causal ? position(item, t) - item.origin : -keys;
            each_panel(workspace.queries, state, 0, item.real_rows, [&](const Panel<Kind>& panel, int64_t r) {
                const Sight sight{key, item.first + r, group, step, item.window};
                if (sight.any(keys, panel.vectors * L))
                    panel.add(workspace.tile, softmax, sight, t == begin, workspace.logits, ahead);
                else if (t == begin)
                    panel.clear(width);
            });
        }
    }

    // Adds a part's state to what came before it, for the panels of rows [begin, end).
    void merge(W* states, W* part, int64_t begin, int64_t end) const {
        const int64_t to_part = part - states;
        each_panel(nullptr, states, begin, end, [&](const Panel<Kind>& panel, int64_t) {
            const auto at = [](W* numbers, int64_t i) -> Lanes& { return reinterpret_cast<Lanes*>(numbers)[i]; };
            for (int64_t j = 0; j < panel.vectors; ++j) {
                Lanes &m_i = at(panel.m_i, j), &l_i = at(panel.l_i, j);
                const Lanes part_m = at(panel.m_i + to_part, j), top = larger_of(m_i, part_m);
                const Lanes base = replaced(top, W(-INFINITY), W(0));
                const Lanes before = weight_of(m_i - base), more = weight_of(part_m - base);
                l_i = before * l_i + more * at(panel.l_i + to_part, j);
                for (int64_t d = 0; d < value_dim; ++d) {
                    Lanes& sum = at(panel.acc, d * panel.vectors + j);
                    sum = before * sum + more * at(panel.acc + to_part, d * panel.vectors + j);
                }
                m_i = top;
            }
        });
    }

    // Takes the sinks of rows [first, first + L) into maxima and sums of weights. Returns what values are to be
    // multiplied by.
    Lanes sink(const Item& item, int64_t first, Lanes& m_i, Lanes& l_i) const {
        if (!a.sinks) return Lanes{} + W(1);
        Lanes sinks;
        for (int64_t i = 0; i < L; ++i)
            sinks[i] = a.sinks.as<W>()[(item.head * group + (item.first + first + i) % group) * a.sinks.stride[0]];
        const Lanes top = larger_of(m_i, sinks), base = replaced(top, W(-INFINITY), W(0)),
                    alpha = weight_of(m_i - base);
        l_i = alpha * l_i + weight_of(sinks - base);
        m_i = top;
        return alpha;
    }

    // Divides sums by weights and writes rows [begin, end); rows that saw no key, and padding, get 0 and -inf.
    // lines: [L, up_to(value_dim, L)].
    void finish(const Item& item, W* state, int64_t begin, int64_t end, W* lines) const {
        const int64_t line = up_to(value_dim, L);
        each_panel(nullptr, state, begin, smaller(end, item.real_rows), [&](const Panel<Kind>& panel, int64_t first) {
            for (int64_t j = 0; j < panel.vectors && first + j * L < item.real_rows; ++j) {
                const Lanes* sums = reinterpret_cast<Lanes*>(panel.acc) + j;
                Lanes m_i = reinterpret_cast<Lanes*>(panel.m_i)[j], l_i = reinterpret_cast<Lanes*>(panel.l_i)[j];
                const Lanes alpha = sink(item, first + j * L, m_i, l_i), weights = replaced(l_i, W(0), W(1));
                for (int64_t d = 0; d < value_dim; d += L) {
                    Lanes block[L];
                    for (int64_t i = 0; i < L; ++i)
                        block[i] = d + i < value_dim ? alpha * sums[(d + i) * panel.vectors] / weights : Lanes{};
                    transpose(block);
                    for (int64_t i = 0; i < L; ++i) *reinterpret_cast<Lanes*>(lines + i * line + d) = block[i];
                }
                for (int64_t i = 0; i < smaller(L, item.real_rows - first - j * L); ++i) {
                    const int64_t r = first + j * L + i;
                    T* out = a.out.as<T>() + offset(a.out, item, r);
                    for (int64_t d = 0; d < value_dim; ++d) out[d] = narrow<T>(lines[i * line + d]);
                    a.lse.as<W>()[offset(a.lse, item, r)] = m_i[i] + std::log(l_i[i]);
                }
            }
        });
        for (int64_t r = larger(begin, item.real_rows); r < end; ++r) {
            T* out = a.out.as<T>() + offset(a.out, item, r);
            for (int64_t d = 0; d < value_dim; ++d) out[d] = narrow<T>(W(0));
            a.lse.as<W>()[offset(a.lse, item, r)] = -INFINITY;
        }
    }

    // An item by one thread.
    void run_whole(const Item& item, Workspace& workspace) const {
        pack(item, workspace.queries, workspace.lines);
        for (int64_t part = 0; part < item.parts(); ++part) {
            W* state = part ? workspace.part : workspace.state;
            const int64_t end = item.part_begin(part + 1);
            attend(item, item.part_begin(part), end, end, workspace, state);
            if (part) merge(workspace.state, state, 0, item.real_rows);
        }
        finish(item, workspace.state, 0, item.query_rows, reinterpret_cast<W*>(workspace.lines));
    }

    void run() const {
        const int64_t items = batch * kv_heads * pieces;
        const int64_t threads = max_threads();
        int64_t longest = 0, total = 0, parts = 1;
        for (int64_t n = 0; n < items; ++n) {
            const Item item = this->item(n);
            longest = larger(longest, item.tiles);
            parts = larger(parts, item.parts());
            total += item.tiles;
        }
        const bool even = items % threads == 0 && longest * items <= total + total / 8;
        const bool fine = longest * threads * 4 <= total;
        if (threads == 1 || even || fine || parts == 1 || items * parts > most_states / state_size()) {
            parallel_for(items, 1, [&](int64_t begin, int64_t end) {
                Workspace workspace(*this);
                for (int64_t n = begin; n < end; ++n) run_whole(item(n), workspace);
            });
            return;
        }
        Scratch<W> states(items, parts, state_size());
        W* all = states;
        parallel_for(items * parts, 1, [&](int64_t begin, int64_t end) {
            Workspace workspace(*this);
            for (int64_t n = begin; n < end; ++n) {
                const Item item = this->item(n / parts);
                if (n == begin || n % parts == 0) pack(item, workspace.queries, workspace.lines);
                const int64_t part = parts - 1 - n % parts;  // the last first: they are the longest
                if (part < item.parts())
                    attend(item, item.part_begin(part), item.part_begin(part + 1),
                           part && n + 1 < end ? item.part_begin(part - 1) : item.tiles, workspace,
                           all + (n / parts * parts + part) * state_size());
            }
        });
        const int64_t panels = (piece + widest - 1) / widest;
        parallel_for(items * panels, 1, [&](int64_t begin, int64_t end) {
            Scratch<W> lines(L, up_to(value_dim, L));
            for (int64_t n = begin; n < end; ++n) {
                const Item item = this->item(n / panels);
                const int64_t row = n % panels * widest;
                if (row >= item.query_rows) continue;
                W* state = all + n / panels * parts * state_size();
                for (int64_t part = 1; part < item.parts(); ++part)
                    merge(state, state + part * state_size(), row, smaller(row + widest, item.real_rows));
                finish(item, state, row, smaller(row + widest, item.query_rows), lines);
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
            const auto lse_at = [n](const View& lse) {  // -inf, or +inf as others write it: a side without keys
                const W value = lse.as<W>()[n * lse.stride[0]];
                return value == INFINITY ? W(-INFINITY) : value;
            };
            const W a = lse_at(m.lse_a), b = lse_at(m.lse_b);
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
    for_fast(
        a.q.dtype, [&](auto type) { Problem<typename KindOf<typename decltype(type)::type>::type>(a).run(); },
        [&] { baseline::block_attention(a); });
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
