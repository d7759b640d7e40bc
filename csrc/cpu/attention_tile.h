// A tile of keys and the query rows that attend to it, per instruction set (see isa.h): both products and the softmax.
//
// Query rows lie along the SIMD lanes. So both products take a tile's numbers one by one as scalars, keys are not
// transposed, and maximum and sum of the softmax go straight down the lanes. A product holds 6 keys (or 6 columns of
// the values) by 2 vectors of rows in registers, by 4 where there are 32 registers: 12 or 24 sums, enough to hide a
// multiply-add's latency, and 8 or 10 loads for them, fewer than the processor can do meanwhile.
//
// Measured on two cores of a Zen 3 at 198 GFLOP/s of multiply-adds in registers, 16 x 32 queries of dimension 128 on 2
// key heads over 8192 tokens: 169 GFLOP/s for bfloat16, which is widened there, and 157 for float, whose context is
// twice as long in bytes. With tiles of 60 keys, rows of values whole and the exponential over both vectors at once it
// was 155 and 143: sums were loaded and stored more often, columns padded from 128 to 132, constants spilled.
//
// With AVX512-BF16 the inner loops of both products are 24 vdpbf16ps to 10 loads, of the 38 instructions that GCC 12
// makes of them, and nothing is spilled; softmax takes about 22 instructions for a vector of weights beside the 128
// dot products of head dimension 128. Measured on two cores of a Zen 4, whose matrix products reach 431 GFLOP/s: 344,
// and 376 for a prefill of 2048 tokens.
//
// Logits are rounded where a naive program rounds them: product, scale, cap. Large ones err as much as two neighbouring
// floats differ, and no less can be asked of the weights.
#pragma once

#include "bf16_dot.h"
#include "exponential.h"
#include "transpose.h"

namespace tt {
namespace TT_ISA {

constexpr int64_t keys_of_tile = 96;   // K and V of head dimension 128 take 96 KB in float, well inside L2
constexpr int64_t terms_of_sum = 128;  // of a logit that are summed on their own: one long sum of 512 would err more
constexpr int most_vectors = vector_registers == 32 ? 4 : 2;  // of query rows, side by side

// --- functions of vectors -------------------------------------------------------------------------------------------

// 2^f - 1, |f| <= 1/2, within 1.5e-7 of itself: f times the polynomial that errs least.
inline FloatVector exp2_less_1(FloatVector f) {
    FloatVector sum = f * 0.000153533619f + 0.00133988744f;
    sum = sum * f + 0.00961843736f;
    sum = sum * f + 0.0555033247f;
    sum = sum * f + 0.240226479f;
    sum = sum * f + 0.693147203f;
    return sum * f;
}

// e^x for x <= 0: 2^n 2^f with n + f = x log2(e). The error is that of log2(e) in float and of the polynomial, 2 units
// in the last place where it matters, near 1, and 4e-6 at 1e-37. 0 below 2^-125, NaN for NaN.
inline FloatVector weight_of(FloatVector x) {
    const FloatVector shifted = x * log2_e + nearest_integer, zero{};
    const FloatVector part = exp2_less_1(x * log2_e - (shifted - nearest_integer)) + 1.f;
    const WordVector power = ((WordVector)shifted << 23) + 0x3f800000u;
    return x < zero - 86.6f ? zero : part * (FloatVector)power;
}
inline DoubleVector weight_of(DoubleVector x) {
    for (int i = 0; i < lanes_of<double>; ++i) x[i] = ::exp(x[i]);
    return x;
}

// tanh x = -z / (z + 2) with z = e^(-2x) - 1, for |x| and with x's sign: as good for small x as for large.
inline FloatVector hyperbolic_tangent(FloatVector x) {
    const FloatVector zero{}, size = (FloatVector)((WordVector)x & 0x7fffffffu);
    FloatVector t = size * (-2 * log2_e);
    t = t < zero - 40.f ? zero - 40.f : t;  // 1 from here; NaN passes
    const FloatVector shifted = t + nearest_integer;
    const FloatVector power = (FloatVector)(((WordVector)shifted << 23) + 0x3f800000u);
    const FloatVector z = exp2_less_1(t - (shifted - nearest_integer)) * power + (power - 1.f);
    const FloatVector y = -z / (z + 2.f);
    return (FloatVector)((WordVector)y | ((WordVector)x & 0x80000000u));
}
inline DoubleVector hyperbolic_tangent(DoubleVector x) {
    for (int i = 0; i < lanes_of<double>; ++i) x[i] = ::tanh(x[i]);
    return x;
}

template <class W>
inline Vector<W> replaced(Vector<W> a, W value, W by) {  // a, with `by` where it is `value`
    const Vector<W> zero{};
    return a == value + zero ? by + zero : a;
}

// --- the numbers that are multiplied --------------------------------------------------------------------------------

// As they are: factors of the accumulator's type, one for each number.
template <class T>
struct Plain {
    using Number = T;
    using W = Wide<T>;
    using Factor = W;
    using Factors = Vector<W>;
    static constexpr int64_t fold = 1;  // numbers in a factor
    // Keys whose values are summed on their own: a sum of 96 would show in a result of full precision.
    static constexpr int64_t keys_of_sum = sizeof(T) == 4 ? 48 : keys_of_tile;

    static Vector<W> multiply_add(Vector<W> sum, Factor a, Factors b) { return sum + a * b; }

    // A row of n numbers.
    static void widen_row(Factor* to, const T* from, int64_t n) {
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
    }
    // Rows one below the other, `fold` of them, the second null where there is none.
    static void widen_rows(Factor* to, const T* from, const T*, int64_t n) { widen_row(to, from, n); }
    // Weights of `fold` keys, the second's at `from + step`.
    static Factors weights(const Vector<W>* w) { return w[0]; }
};

template <class T>
struct KindOf {
    using type = Plain<T>;
};

#if defined(TT_BF16_DOT)
// Two bfloat16 numbers in a word, for the instruction that adds both products: twice as many in the same time.
struct Paired {
    using Number = bf16;
    using W = float;
    using Factor = uint32_t;
    using Factors = WordVector;
    static constexpr int64_t fold = 2;
    static constexpr int64_t keys_of_sum = keys_of_tile;

    static FloatVector multiply_add(FloatVector sum, Factor a, Factors b) { return bf16_dot(sum, Factors{} + a, b); }

    static void widen_row(Factor* to, const bf16* from, int64_t n) {
        std::memcpy(to, from, size_t(n / 2) * sizeof(Factor));
        if (n % 2) to[n / 2] = from[n - 1].bits;
    }
    static void widen_rows(Factor* to, const bf16* low, const bf16* high, int64_t n) {
        if (high)
            for (int64_t i = 0; i < n; ++i) to[i] = low[i].bits | uint32_t(high[i].bits) << 16;
        else
            for (int64_t i = 0; i < n; ++i) to[i] = low[i].bits;
    }
    // To nearest: a tie, one case of 2^16, is rounded up.
    static Factors weights(const FloatVector* w) {
        return ((WordVector)w[0] + 0x8000u) >> 16 | (((WordVector)w[1] + 0x8000u) & 0xffff0000u);
    }
};
template <>
struct KindOf<bf16> {
    using type = Paired;
};
#endif

template <class Kind>
constexpr int64_t factors_of(int64_t n) {
    return (n + Kind::fold - 1) / Kind::fold;
}

// sums[r] = sum over k < n of a[r * row + k * step] * b[k], for R rows; b[k] is N vectors.
template <class Kind, int R, int N>
[[gnu::always_inline]] inline void product(Vector<typename Kind::W> (&sums)[R][N], const typename Kind::Factor* a,
                                           int64_t row, int64_t step, const typename Kind::Factor* b, int64_t n) {
    using Factors = typename Kind::Factors;
    Vector<typename Kind::W> c[R][N] = {};
    for (; n > 0; --n, a += step, b += N * lanes_of<typename Kind::W>) {
        Factors p[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) p[j] = reinterpret_cast<const Factors*>(b)[j];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) c[r][j] = Kind::multiply_add(c[r][j], a[r * row], p[j]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sums[r][j] = c[r][j];
}

// --- a tile ---------------------------------------------------------------------------------------------------------

// Columns of the values in blocks of six and, so that few are padding, of four.
struct Columns {
    explicit Columns(int64_t dim) {
        const int64_t even = up_to(dim, 2);
        fours = even % 6 == 0 ? 0 : even % 6 == 4 || even == 2 ? 1 : 2;
        sixes = (even - 4 * fours) > 0 ? (even - 4 * fours) / 6 : 0;
        width = 6 * sixes + 4 * fours;
    }
    int64_t sixes, fours, width;
};

// Keys and values of a tile as factors.
template <class Kind>
struct Tile {
    using Number = typename Kind::Number;
    using W = typename Kind::W;
    using Factor = typename Kind::Factor;
    static constexpr int64_t steps = keys_of_tile / Kind::fold;           // of the second product, in a whole tile
    static constexpr int64_t block6 = 6 * steps + 2, block4 = 4 * steps;  // numbers from one block to the next

    static int64_t size(int64_t dim, int64_t value_dim) {  // in factors
        const Columns columns(value_dim);
        return up_to(keys_of_tile * factors_of<Kind>(dim), 16) + up_to(size_of_values(columns), 16) +
               up_to(columns.width + 2, 16);
    }
    static int64_t size_of_values(const Columns& columns) { return columns.sixes * block6 + columns.fours * block4; }
    Tile(Factor* memory, int64_t dim, int64_t value_dim)
        : columns(value_dim), dim(dim), value_dim(value_dim), row(factors_of<Kind>(dim)) {
        k = memory;
        v = k + up_to(keys_of_tile * row, 16);
        line = v + up_to(size_of_values(columns), 16);
        for (int64_t d = value_dim; d < columns.width + 2; ++d) line[d] = 0;
    }

    // Reads keys and values of n tokens; `key(i)` and `value(i)` say where.
    template <class Key, class Value>
    void read(int64_t n, Key key, Value value) {
        keys = n;
        for (int64_t i = 0; i < n; ++i) Kind::widen_row(k + i * row, key(i), dim);
        // The last rows of the first product: any key that is there already changes no maximum.
        for (int64_t i = n; i < n / 6 * 6 + (n % 6 == 0 ? 0 : n % 6 <= 4 ? 4 : 6); ++i)
            std::memcpy(k + i * row, k + (n - 1) * row, size_t(row) * sizeof(Factor));
        for (int64_t i = 0; i < n; i += Kind::fold) {
            Kind::widen_rows(line, value(i), i + 1 < n ? value(i + 1) : nullptr, value_dim);
            const Factor* from = line;
            const int64_t step = i / Kind::fold;
            Factor* to = v + step * 6;  // two more than six are copied, in one go; the next step writes over them
            for (int64_t c = 0; c < columns.sixes; ++c, from += 6, to += block6)
                std::memcpy(to, from, 8 * sizeof(Factor));
            to -= step * 2;
            for (int64_t c = 0; c < columns.fours; ++c, from += 4, to += block4)
                std::memcpy(to, from, 4 * sizeof(Factor));
        }
    }

    Columns columns;
    int64_t dim, value_dim, row;  // row: factors of a key
    int64_t keys = 0;
    Factor* k;     // [keys, row]
    Factor* v;     // blocks of columns, [steps, 6] and then [steps, 4]
    Factor* line;  // [width + 2], of values on their way
};

// Rows that will be read next, brought near a few cache lines at a time while the processor multiplies. (Fetched in one
// go, by reading them or ahead of that, the memory is what it waits for.)
struct Ahead {
    void fetch() {
        for (int64_t line = 0; line < lines && next < count; ++line) {
            __builtin_prefetch(addresses[next] + offset, 0, 2);
            offset += 64;
            if (offset >= bytes) offset = 0, ++next;
        }
    }
    const char* addresses[2 * keys_of_tile];
    int64_t bytes = 0, lines = 0;  // of a row; of a call
    int64_t count = 0, next = 0, offset = 0;
};

// --- query rows -----------------------------------------------------------------------------------------------------

// logit = scale * product, or softcap * tanh(scale * product / softcap) if there is one.
struct Softmax {
    double scale, softcap;
};

// Which lanes of a panel see key i of a tile: [begin(i), end(i)).
struct Sight {
    int64_t key;  // the tile's first, counted from the first query's own; before it, all lanes see it
    int64_t row;  // of the query that is the first lane, group rows to a token
    int64_t group;
    int64_t step;    // so many tokens see each other's keys, and none behind them
    int64_t window;  // keys that a query sees, its own the last; -1: all before it

    int64_t begin(int64_t i) const { return (key + i) / step * step * group - row; }
    int64_t end(int64_t i, int64_t lanes) const {
        return window < 0 ? lanes : smaller((key + i + window) * group - row, lanes);
    }
    // Whether there are lanes that see a key of the n, and some that do not see all.
    bool any(int64_t n, int64_t lanes) const { return begin(0) < lanes && end(n - 1, lanes) > 0; }
    bool masks(int64_t n, int64_t lanes) const { return begin(n - 1) > 0 || end(0, lanes) < lanes; }
};

// One lane per query row: the query, and what has been summed so far over keys, relative to the largest logit.
template <class Kind>
struct Panel {
    using W = typename Kind::W;
    using Factor = typename Kind::Factor;
    using Lanes = Vector<W>;
    static constexpr int L = lanes_of<W>;

    Factor* q;    // [row, lanes]
    W* acc;       // [width, lanes], of values
    W* m_i;       // [lanes]
    W* l_i;       // [lanes], of weights
    int vectors;  // lanes are so many vectors

    void clear(int64_t width) const {
        for (int64_t i = 0; i < width * vectors * L; ++i) acc[i] = 0;
        for (int64_t i = 0; i < vectors * L; ++i) m_i[i] = -INFINITY, l_i[i] = 0;
    }

    // Adds a tile's keys to the lanes that see them. logits: [keys_of_tile, lanes].
    void add(const Tile<Kind>& tile, const Softmax& softmax, const Sight& sight, bool first, W* logits,
             Ahead& ahead) const {
        if (most_vectors >= 4 && vectors == 4) return add_to<most_vectors>(tile, softmax, sight, first, logits, ahead);
        if (vectors == 2) return add_to<2>(tile, softmax, sight, first, logits, ahead);
        add_to<1>(tile, softmax, sight, first, logits, ahead);
    }

   private:
    template <int N>
    void add_to(const Tile<Kind>& tile, const Softmax& softmax, const Sight& sight, bool first, W* logits,
                Ahead& ahead) const {
        const int64_t n = tile.keys;
        const W scale = W(softmax.scale);
        Lanes m_old[N], m_new[N];
        for (int j = 0; j < N; ++j) m_old[j] = m_new[j] = first ? Lanes{} - W(INFINITY) : lanes(m_i)[j];
        for (int64_t i = 0; i < n; i += 6) {
            ahead.fetch();
            if (n - i <= 4)
                dot<4, N>(tile, i, scale, logits, m_new);
            else
                dot<6, N>(tile, i, scale, logits, m_new);
        }
        const bool masked = sight.masks(n, N * L);
        if (softmax.softcap > 0) cap(n * N, W(softmax.softcap), logits);
        if (masked) mask<N>(n, sight, logits);
        if (masked || softmax.softcap > 0)
            for (int j = 0; j < N; ++j) {
                m_new[j] = m_old[j];
                for (int64_t i = 0; i < n; ++i) m_new[j] = larger_of(m_new[j], lanes(logits)[i * N + j]);
            }

        Lanes base[N], alpha[N], sums[N] = {};
        for (int j = 0; j < N; ++j) {
            base[j] = replaced(m_new[j], W(-INFINITY), W(0));  // no key yet: -inf less -inf would be NaN
            alpha[j] = weight_of(m_old[j] - base[j]);
        }
        const int64_t steps = weigh<N>(n, base, logits, sums);
        for (int j = 0; j < N; ++j) {
            lanes(m_i)[j] = m_new[j];
            lanes(l_i)[j] = first ? sums[j] : lanes(l_i)[j] * alpha[j] + sums[j];
        }
        const Factor* weights = reinterpret_cast<const Factor*>(logits);
        const Factor* v = tile.v;
        Lanes* to = lanes(acc);
        for (int64_t c = 0; c < tile.columns.sixes; ++c, v += Tile<Kind>::block6, to += 6 * N)
            accumulate<6, N>(v, steps, weights, alpha, first, to);
        for (int64_t c = 0; c < tile.columns.fours; ++c, v += Tile<Kind>::block4, to += 4 * N)
            accumulate<4, N>(v, steps, weights, alpha, first, to);
    }

    static Lanes* lanes(W* at) { return reinterpret_cast<Lanes*>(at); }

    // Logits of R keys from i on, and the largest so far.
    template <int R, int N>
    void dot(const Tile<Kind>& tile, int64_t i, W scale, W* logits, Lanes (&m_new)[N]) const {
        constexpr int64_t terms = terms_of_sum / Kind::fold;
        Lanes sums[R][N], more[R][N];
        const Factor* keys = tile.k + i * tile.row;
        product<Kind>(sums, keys, tile.row, 1, q, smaller(tile.row, terms));
        for (int64_t d = terms; d < tile.row; d += terms) {
            product<Kind>(more, keys + d, tile.row, 1, q + d * N * L, smaller(tile.row - d, terms));
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < N; ++j) sums[r][j] += more[r][j];
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
                const Lanes logit = sums[r][j] * scale;
                m_new[j] = larger_of(m_new[j], logit);
                lanes(logits)[(i + r) * N + j] = logit;
            }
    }

    static void cap(int64_t n, W softcap, W* logits) {
        for (int64_t i = 0; i < n; ++i) lanes(logits)[i] = hyperbolic_tangent(lanes(logits)[i] / softcap) * softcap;
    }

    template <int N>
    static void mask(int64_t n, const Sight& sight, W* logits) {
        for (int64_t i = 0; i < n; ++i, logits += N * L) {
            for (int64_t lane = 0; lane < smaller(sight.begin(i), int64_t(N * L)); ++lane) logits[lane] = -INFINITY;
            for (int64_t lane = larger(sight.end(i, N * L), int64_t(0)); lane < N * L; ++lane) logits[lane] = -INFINITY;
        }
    }

    // Logits become weights, in place, and are added up. Returns the steps of the second product.
    template <int N>
    static int64_t weigh(int64_t n, const Lanes (&base)[N], W* logits, Lanes (&sums)[N]) {
        constexpr int fold = int(Kind::fold);
        using Factors = typename Kind::Factors;
        for (int64_t i = n; i < up_to(n, fold); ++i)  // a key that is not there
            for (int j = 0; j < N; ++j) lanes(logits)[i * N + j] = Lanes{} - W(INFINITY);
        const int64_t steps = (n + fold - 1) / fold;
        for (int j = 0; j < N; ++j) {  // one after the other, for there are constants to hold in registers
            const Lanes zero = base[j];
            Lanes sum{};
            for (int64_t begin = 0; begin < steps; begin += 16) {  // short sums err less
                Lanes part{};
                for (int64_t step = begin; step < smaller(begin + 16, steps); ++step) {
                    Lanes w[fold];
#pragma GCC unroll 2
                    for (int r = 0; r < fold; ++r) {
                        w[r] = weight_of(lanes(logits)[(step * fold + r) * N + j] - zero);
                        part += w[r];
                    }
                    reinterpret_cast<Factors*>(logits)[step * N + j] = Kind::weights(w);
                }
                sum += part;
            }
            sums[j] = sum;
        }
        return steps;
    }

    // A block of R columns of values times the weights.
    template <int R, int N>
    static void accumulate(const Factor* v, int64_t steps, const Factor* weights, const Lanes (&alpha)[N], bool first,
                           Lanes* to) {
        Lanes sums[R][N];
        constexpr int64_t most = Kind::keys_of_sum / Kind::fold;
        product<Kind>(sums, v, 1, R, weights, smaller(steps, most));
        if (most < Tile<Kind>::steps)
            for (int64_t step = most; step < steps; step += most) {
                Lanes more[R][N];
                product<Kind>(more, v + step * R, 1, R, weights + step * N * L, smaller(steps - step, most));
                for (int r = 0; r < R; ++r)
                    for (int j = 0; j < N; ++j) sums[r][j] += more[r][j];
            }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) to[r * N + j] = first ? sums[r][j] : to[r * N + j] * alpha[j] + sums[r][j];
    }
};

}  // namespace TT_ISA
}  // namespace tt
