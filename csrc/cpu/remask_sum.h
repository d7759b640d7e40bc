// Stage A of a remasking step, its arithmetic: the largest of some logits, the sums of their softmax and its entropy.
//
// Sums are taken by the stretch, whose largest value is known beforehand: every term lies between 0 and 1, so nothing
// overflows, and a certain token has exactly the probability 1. Finding that value costs no pass of its own. While a
// stretch is summed, the largest value of a later one is found: those loads and comparisons fill what the exponentials
// leave idle. They compare integers, as do the terms with the least exponent that counts: floating-point units have
// enough to do.
//
// Per vector: 8 fused multiply-adds, 1 product, 3 sums, 2 comparisons, 1 shift, which a Zen 3 could start in 4.8
// cycles, and for which it takes 7 (8 floats in 2.3 ns at 3 GHz). Tried: the polynomial in pairs (Estrin), a tenth
// slower; sums brought together every 512 tokens in scalars, an eighth slower; four vectors' instructions in turn
// instead of one vector after the other, the same with float32, a tenth faster with bfloat16, and so kept. With vectors
// of 64 bytes a permutation reads a table of thirty-seconds, which saves three terms: a Zen 4 takes 13 % less time (16
// rows of 131072 in the cache, one thread: 546 to 478 us). With shorter vectors, a table of eighths takes as long as
// what it saves. Comparing integers: a Zen 5 takes 9 % less time with float32 and 25 % with bfloat16, of which one
// comparison then serves 32 (16 rows in the cache, one thread: 1.52 to 1.39 ns and 1.89 to 1.41 ns for 16 tokens).
#pragma once

#include "exponential.h"
#include "philox.h"

#if defined(__FMA__) || defined(__aarch64__)
#define TT_FUSED true
#else
#define TT_FUSED false
#endif

namespace tt {
namespace TT_ISA {

// Arrays that are summed are padded with -infinity to a multiple of `padding`. Floats are added up over `block` tokens
// only, then as doubles.
constexpr int64_t stretch = 2048, block = 512, padding = 4 * lanes_of<float>;
template <class W>
constexpr W infinity = W(__builtin_inff());

inline int64_t padded(int64_t n) {
    return up_to(n, padding);
}
template <class W>
void pad(W* x, int64_t n) {
    for (int64_t i = n; i < padded(n); ++i) x[i] = -infinity<W>;
}

// Two vectors from memory that holds X, in an order that is always the same, but not always that of memory.
template <class W, class X>
struct LoadTwo {
    static void from(const X* p, Vector<W>& a, Vector<W>& b) {
        a = Load<W, X>::from(p), b = Load<W, X>::from(p + lanes_of<W>);
    }
};
template <>
struct LoadTwo<float, bf16> {  // the even ones and the odd ones: one instruction each
    static void from(const bf16* p, FloatVector& a, FloatVector& b) {
        const WordVector bits = unaligned<WordVector>(p);
        a = (FloatVector)(bits << 16), b = (FloatVector)(bits & 0xffff0000u);
    }
};

template <class W>
inline W largest_of(Vector<W> v) {
    W largest = v[0];
    for (int i = 1; i < lanes_of<W>; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// Numbers as the integers that their bits are. As such they are in order from 0 on, a NaN with a positive sign beyond
// infinity, and everything with a negative sign lies below: comparing integers costs less, and of 16 bits, half.
typedef int16_t ShortVector __attribute__((vector_size(TT_VECTOR_BYTES), may_alias));
template <class X>
struct Bits {
    using Number = int16_t;
    using Vector = ShortVector;
    static X number(int16_t bits) { return {uint16_t(bits)}; }
};
template <>
struct Bits<float> {
    using Number = int32_t;
    using Vector = IntVector;
    static float number(int32_t bits) { return bit_cast<float>(bits); }
};
// The largest number, NaN for that NaN; -infinity where all signs are negative.
template <class X>
float number_of_largest(typename Bits<X>::Vector v) {
    typename Bits<X>::Number all[sizeof(v) / sizeof(typename Bits<X>::Number)], largest = -1;
    std::memcpy(all, &v, sizeof(v));
    for (const auto bits : all) largest = larger(largest, bits);  // becomes instructions on vectors
    return largest < 0 ? -infinity<float> : widen(Bits<X>::number(largest));
}
inline DoubleVector doubled(FloatVector v) {  // in half as many sums
    HalfFloats half[2];
    std::memcpy(half, &v, sizeof(v));
    return widened(half[0]) + widened(half[1]);
}

// The largest of n values, n padded; NaN is passed over.
template <class W, class X>
W peak(const X* x, int64_t n) {
    Vector<W> best[2] = {Vector<W>{} - infinity<W>, Vector<W>{} - infinity<W>};
    for (int64_t i = 0; i < n; i += 2 * lanes_of<W>) {
        Vector<W> a, b;
        LoadTwo<W, X>::from(x + i, a, b);
        best[0] = larger_of(a, best[0]), best[1] = larger_of(b, best[1]);
    }
    return largest_of<W>(larger_of(best[0], best[1]));
}

// The same for whole vectors, which costs less where a value is 0 or more; NaN if there is one with a positive sign.
template <class X>
float peak_or_nan(const X* x, int64_t n) {
    using V = typename Bits<X>::Vector;
    constexpr int64_t step = sizeof(V) / sizeof(X);
    V best[2] = {V{} - 1, V{} - 1};
    for (int64_t i = 0; i < n; i += 2 * step) {
        best[0] = larger_of(unaligned<V>(x + i), best[0]);
        best[1] = larger_of(unaligned<V>(x + i + step), best[1]);
    }
    const float largest = number_of_largest<X>(larger_of(best[0], best[1]));
    return largest == -infinity<float> ? peak<float>(x, n) : largest;
}

// Whether one of n values, n padded, is NaN or +infinity.
template <class W, class X>
bool unusable(const X* x, int64_t n) {
    constexpr W most = sizeof(W) == 4 ? W(__FLT_MAX__) : W(__DBL_MAX__);
    auto odd = Vector<W>{} != 0;
    for (int64_t i = 0; i < n; i += 2 * lanes_of<W>) {
        Vector<W> a, b;
        LoadTwo<W, X>::from(x + i, a, b);
        odd |= ~(a <= most) | ~(b <= most);
    }
    return any(odd);
}

// The index of the first value that is this one, which is there.
template <class W, class X>
int64_t index_of(const X* x, W value) {
    constexpr int lanes = lanes_of<W>;
    int64_t i = 0;
    for (;; i += 4 * lanes) {
        auto found = Load<W, X>::from(x + i) == value;
        for (int j = 1; j < 4; ++j) found |= Load<W, X>::from(x + i + j * lanes) == value;
        if (any(found)) break;
    }
    while (W(widen(x[i])) != value) ++i;
    return i;
}

// e^(-v / t) for v >= 0 and one t. -v is split into n t log(2) / parts + r with |r| at most half of that step; 2^(n /
// parts) comes from a table, if there are parts, and from the bits of an exponent; the polynomial's terms contain the
// powers of 1 / t, so that no temperature costs a division, or a rounding more than the temperature 1.
struct Exponential {
    // For others, v / t is what is to be handed over, and t = 1.
    static bool serves(double t) { return t >= 1e-6 && t <= 1e7; }

    explicit Exponential(double t) {
        const double step = t * 0.693147180559945309 / parts;
        two_parts = !TT_FUSED || ::fabs(double(float(step)) / step - 1) > 4e-9;
        // n times the first part is exact; a fused multiply-add needs no second one where one float is as good
        high = two_parts ? bit_cast<float>(bit_cast<uint32_t>(float(step)) & 0xffffff80u) : float(step);
        low = float(step - double(high));
        per = float(1 / step);
        most = float(127 * parts * step);
        double power = 1;
        for (int i = 0; i < degree; ++i) term[i] = float(terms[i] * (power /= t));
#if TT_VECTOR_BYTES == 64
        for (int i = 0; i < parts; ++i)
            table[i / 16][i % 16] = bit_cast<uint32_t>(float(::exp2(double(i) / parts))) - (uint32_t(i) << 18);
#endif
    }
    // e^(-v / t) of K vectors within 2 units in the last position, as far as 87.3; 0 at `most`, 88.03, and as little as
    // that between them, where results would be subnormal; NaN stays NaN. 0 <= v <= most. Instructions of the K
    // alternate: each waits for the one before, and a processor does not look far enough ahead to find the next
    // vector's by itself.
    template <bool in_two_parts, int K>
    void of(const FloatVector* v, FloatVector* e) const {
        FloatVector shifted[K], r[K];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) shifted[j] = biased - v[j] * per;
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) r[j] = shifted[j] - biased;
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) e[j] = -(r[j] * high + v[j]);
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) r[j] = in_two_parts ? e[j] - r[j] * low : e[j];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) e[j] = r[j] * term[degree - 1] + term[degree - 2];
#pragma GCC unroll 3
        for (int i = degree - 3; i >= 0; --i)
#pragma GCC unroll 4
            for (int j = 0; j < K; ++j) e[j] = e[j] * r[j] + term[i];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) e[j] = e[j] * r[j] + 1.f;
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) e[j] *= power_of_two(shifted[j]);
    }

    // Adding `biased` leaves n in the last bits, without a table the exponent n + 127. The polynomials are 1 at 0, with
    // the least largest relative error, 9e-8 without and 5e-8 with a table.
#if TT_VECTOR_BYTES == 64
    static constexpr int parts = 32, degree = 2;
    static constexpr float biased = 0x1.8p23f;
    static constexpr double terms[degree] = {1.0000146495182828, 0.5000009126689087};
    WordVector table[2];  // the bits of 2^(i / parts), without what i adds to an exponent's bits

    FloatVector power_of_two(FloatVector shifted) const {
        const WordVector n = (WordVector)shifted;
#if defined(__clang__)  // it lacks the other
        const WordVector entries =
            (WordVector)_mm512_permutex2var_epi32((__m512i)table[0], (__m512i)n, (__m512i)table[1]);
#else
        const WordVector entries = __builtin_shuffle(table[0], table[1], n);
#endif
        return (FloatVector)(entries + (n << 18));
    }
#else
    static constexpr int parts = 1, degree = 5;
    static constexpr float biased = 0x1.8p23f + 127;
    static constexpr double terms[degree] = {0.9999997063133584, 0.4999914784113307, 0.16667638127240636,
                                             0.041898159618241046, 0.008290272112428693};

    static FloatVector power_of_two(FloatVector shifted) {
        return (FloatVector)((WordVector)shifted << 23);  // n = -127 makes 0
    }
#endif
    float per, high, low, most, term[degree];
    bool two_parts;
};

struct Moments {
    double mass, moment;
    float ahead;  // of what comes next the largest, as `number_of_largest` has it
};

// The sums of e^(-v / t) and of v e^(-v / t), v = top - x, over n values, n padded, of which `top` is the largest; and
// the largest of as many values at `next`. A NaN with a negative sign makes NaN of the sums; one with a positive sign
// is taken for -infinity, and must have been found before, when these values were the next.
template <bool in_two_parts, class X>
Moments moments(const X* x, const X* next, int64_t n, float top, const Exponential& exponential) {
    using Raw = typename Bits<X>::Vector;
    constexpr int lanes = lanes_of<float>, vectors = 4, raw_size = int(sizeof(Raw) / sizeof(X));
    const FloatVector zero{}, high = zero + top, most = zero + exponential.most;
    Raw best = Raw{} - 1;
    DoubleVector masses{}, moments{};
    const X* fetched = x + 3 * stretch;  // nothing is read there, so it may lie behind the logits
    for (int64_t begin = 0; begin < n; begin += block) {
        FloatVector m[2] = {}, d[2] = {};
        for (int64_t i = begin; i < smaller(begin + block, n); i += vectors * lanes) {
            FloatVector v[vectors], e[vectors];
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j += 2) LoadTwo<float, X>::from(x + i + j * lanes, v[j], v[j + 1]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) {  // as integers the smaller: v has no sign
                const IntVector bits = (IntVector)(high - v[j]), limit = (IntVector)most;
                v[j] = (FloatVector)(bits < limit ? bits : limit);
            }
            for (int64_t line = 0; line < vectors * lanes * int64_t(sizeof(X)); line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(fetched + i) + line, 0, 2);  // second level
#pragma GCC unroll 4
            for (int j = 0; j < vectors * lanes; j += raw_size) best = larger_of(unaligned<Raw>(next + i + j), best);
            exponential.of<in_two_parts, vectors>(v, e);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) m[j & 1] += e[j], d[j & 1] += v[j] * e[j];
        }
        masses += doubled(m[0] + m[1]);
        moments += doubled(d[0] + d[1]);
    }
    Moments sums = {0, 0, number_of_largest<X>(best)};
    for (int i = 0; i < lanes_of<double>; ++i) sums.mass += masses[i], sums.moment += moments[i];
    return sums;
}

// Sum of e^((x - top) / t), and of it times (top - x) / t, from which entropy follows without cancellation.
template <class W>
struct Sum {
    W top = -infinity<W>;
    double mass = 0, drop = 0;

    void lift(W to, double t) {
        if (!(to > top)) return;
        if (mass > 0) {
            const double by = (double(to) - double(top)) / t, factor = ::exp(-by);
            drop = factor > 0 ? factor * (drop + mass * by) : 0;
            mass *= factor;
        }
        top = to;
    }
    // n floats, n padded, of which `largest` is the largest; see `moments`. Returns the largest of as many at `next`.
    template <class X>
    float add(const X* x, const X* next, int64_t n, float largest, const Exponential& exponential, double t) {
        lift(largest, t);
        const Moments sums = exponential.two_parts ? moments<true>(x, next, n, top, exponential)
                                                   : moments<false>(x, next, n, top, exponential);
        mass += sums.mass;
        drop += sums.moment / t;
        return sums.ahead;
    }
    // float64 logits: there is no wider type to add up in, so the rounding errors are added up too.
    void add_exactly(const double* x, int64_t n, double largest, double t) {
        lift(largest, t);
        double lost_mass = 0, lost_drop = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double u = (x[i] - top) / t, e = ::exp(u);
            two_sum(mass, lost_mass, e);
            two_sum(drop, lost_drop, e > 0 ? -u * e : 0);
        }
        mass += lost_mass;
        drop += lost_drop;
    }
    static void two_sum(double& sum, double& lost, double x) {
        const double next = sum + x, added = next - sum;
        lost += (sum - (next - added)) + (x - added);
        sum = next;
    }
    void merge(Sum other, double t) {
        if (other.mass == 0) return;
        lift(other.top, t);
        other.lift(top, t);
        mass += other.mass;
        drop += other.drop;
    }
    double log() const { return ::log(mass); }  // of the mass above; the logarithm of all is top / t more
    double entropy() const { return ::log(mass) + drop / mass; }
};

}  // namespace TT_ISA
}  // namespace tt
