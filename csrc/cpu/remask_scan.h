// Stage A of a remasking step: what one position's logits say, from one pass over them.
//
// A position is read in stretches of 512 tokens that stay in L1 while all that is wanted of them is taken: the two best
// tokens, the sums of the softmax and its entropy, the two best with Gumbel noise. Sums refer to the largest value so
// far and are scaled when it grows, so one pass is enough. The exact bookkeeping (which token, ties) runs only for
// stretches whose largest value enters the two best, of which there are a handful; likewise Gumbel noise is computed
// only where a word is small enough to win. Positions are cut into pieces of a fixed size, whatever the number of
// threads, so that results do not depend on it. Rows with top-k or top-p are read once into a thread's scratch of three
// vocabularies, where the filter is found (remask_filter.h) before the draw.
#pragma once

#include "exponential.h"
#include "parallel.h"
#include "philox.h"
#include "remask_filter.h"
#include "remask_row.h"

namespace tt {
namespace TT_ISA {

constexpr int64_t stretch = 512, piece_size = 32 * stretch;
template <class W>
constexpr W infinity = W(__builtin_inff());

// The two largest values and their tokens. Offered in the order of the tokens, equal ones stay with the lowest.
template <class W>
struct Two {
    W value[2] = {-infinity<W>, -infinity<W>};
    int64_t token[2] = {0, 0};
    void offer(W v, int64_t t) {
        if (v > value[0]) {
            value[1] = value[0], token[1] = token[0];
            value[0] = v, token[0] = t;
        } else if (v > value[1]) {
            value[1] = v, token[1] = t;
        }
    }
    void offer(const W* v, int64_t n, int64_t base, W largest) {
        if (!(largest > value[1])) return;
        for (int64_t i = 0; i < n; ++i) offer(v[i], base + i);
    }
    void merge(const Two& other) {
        offer(other.value[0], other.token[0]);
        offer(other.value[1], other.token[1]);
    }
};

// The largest of n values, and whether one is NaN or +infinity (then the first may be anything).
template <class W>
W peak(const W* x, int64_t n, bool& wrong) {
    constexpr int lanes = 16;
    constexpr W most = sizeof(W) == 4 ? W(__FLT_MAX__) : W(__DBL_MAX__);
    W best[lanes];
    int32_t odd[lanes];
    for (int j = 0; j < lanes; ++j) best[j] = -infinity<W>, odd[j] = 0;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int j = 0; j < lanes; ++j) {
            const W v = x[i + j];
            best[j] = v > best[j] ? v : best[j];
            odd[j] |= v <= most ? 0 : 1;
        }
    for (; i < n; ++i) {
        best[0] = x[i] > best[0] ? x[i] : best[0];
        odd[0] |= x[i] <= most ? 0 : 1;
    }
    for (int j = 1; j < lanes; ++j) best[0] = best[j] > best[0] ? best[j] : best[0], odd[0] |= odd[j];
    wrong = odd[0] != 0;
    return best[0];
}

// Sum of e^((x - top) / t), and of it times (top - x) / t, from which entropy follows without cancellation.
template <class W>
struct Sum {
    W top = -infinity<W>;
    double mass = 0, drop = 0;

    void lift(W to, W t) {
        if (!(to > top)) return;
        if (mass > 0) {
            const double by = (double(to) - double(top)) / double(t), factor = ::exp(-by);
            drop = factor > 0 ? factor * (drop + mass * by) : 0;
            mass *= factor;
        }
        top = to;
    }
    void add(const W* x, int64_t n, W largest, W t) {
        if (largest == -infinity<W>) return;
        lift(largest, t);
        if constexpr (sizeof(W) == sizeof(double))
            add_exactly(x, n, double(t));
        else if (t == 1)
            add_floats(x, n, t, [](FloatVector u, float) { return u; });
        else
            add_floats(x, n, t, [](FloatVector u, float by) { return u / by; });
    }
    // Four vectors of sums: a single one would wait for itself, and on a machine of short vectors also err more.
    template <class Scale>
    void add_floats(const W* x, int64_t n, W t, Scale scale) {
        constexpr int lanes = int(sizeof(FloatVector) / sizeof(float)), unroll = 4;
        const FloatVector zero{}, high = zero + float(top);
        FloatVector m[unroll] = {}, d[unroll] = {};
        int64_t i = 0;
        for (; i + unroll * lanes <= n; i += unroll * lanes)
#pragma GCC unroll 4
            for (int j = 0; j < unroll; ++j) {
                FloatVector v;
                std::memcpy(&v, x + i + j * lanes, sizeof(v));
                const FloatVector u = scale(v - high, float(t)), e = exp_negative(u);
                m[j] += e;
                d[j] += e > zero ? -u * e : zero;  // not 0 * infinity
            }
        for (int j = 0; j < unroll; ++j)
            for (int k = 0; k < lanes; ++k) mass += double(m[j][k]), drop += double(d[j][k]);
        for (; i < n; ++i) {
            const W u = (x[i] - top) / t, e = exponential(u);
            mass += double(e);
            drop += e > 0 ? double(-u * e) : 0;
        }
    }
    // float64 logits: there is no wider type to add up in, so the rounding errors are added up too.
    void add_exactly(const W* x, int64_t n, double t) {
        double lost_mass = 0, lost_drop = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double u = (double(x[i]) - double(top)) / t, e = ::exp(u);
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
    void merge(Sum other, W t) {
        if (other.mass == 0) return;
        lift(other.top, t);
        other.lift(top, t);
        mass += other.mass;
        drop += other.drop;
    }
    double log() const { return ::log(mass); }  // of the mass above; the logarithm of all is top / t more
    double entropy() const { return ::log(mass) + drop / mass; }
};

// What a piece of a position says; pieces of a position are merged in order.
template <class W>
struct Findings {
    Two<W> best;                                     // of what may be proposed
    Two<W> scored;                                   // of what the statistics see
    Two<W> drawn;                                    // with noise, of what the filter keeps
    Sum<W> sum;                                      // of what the statistics see
    Sum<W> all;                                      // posterior: of what may be proposed, untempered
    Sum<W> kept;                                     // posterior: of what the filter keeps, tempered
    W largest = -infinity<W>;                        // of all that is filtered: x is tempered from here
    W least = -infinity<W>, least_x = -infinity<W>;  // of the filter: of z by top-k, of x by top-p
    bool mask_kept = true, none_kept = false;        // posterior: whether the filter keeps the mask, or only it
    bool wrong = false;                              // NaN or +infinity

    void merge(const Findings& o, W t, W own) {
        best.merge(o.best);
        scored.merge(o.scored);
        drawn.merge(o.drawn);
        sum.merge(o.sum, own);
        all.merge(o.all, 1);
        kept.merge(o.kept, t);
        wrong |= o.wrong;
    }
};

template <class X>
class Scan {
   public:
    using W = Wide<X>;
    explicit Scan(const Remask& a)
        : a_(a),
          suppressed_(a.suppressed),
          unscored_(a.unscored),
          vocabulary_(a.logits.size[2]),
          posterior_(a.options.schedule == RemaskChoice::posterior),
          tempered_(a.options.statistics == RemaskChoice::filtered),
          margin_(a.options.score == RemaskChoice::margin) {}

    // Tokens [begin, end) of position s of row b.
    Findings<W> piece(const RemaskRow& row, int64_t b, int64_t s, int64_t begin, int64_t end) {
        Findings<W> f;
        const Stream stream(row.seed, row.offset, row.step, s);
        for (int64_t base = begin; base < end; base += stretch) {
            const int64_t n = smaller(stretch, end - base);
            const W* z = load(b, s, base, n);
            const W largest = admit(z, n, base, f);
            draw(row, stream, z, n, base, largest, f);
        }
        return f;
    }

    // A whole position of a row with top-k or top-p.
    Findings<W> filtered(const RemaskRow& row, int64_t b, int64_t s, W* z, W* x, W* weight) {
        Findings<W> f;
        for (int64_t base = 0; base < vocabulary_; base += stretch) {
            const int64_t n = smaller(stretch, vocabulary_ - base);
            const W* from = load(b, s, base, n);
            for (int64_t i = 0; i < n; ++i) z[base + i] = from[i];
            admit(z + base, n, base, f);
        }
        f.largest = f.best.value[0];
        if (f.wrong || f.largest == -infinity<W>) return f;
        if (posterior_) {
            z[a_.mask_token_id] = mask_logit(row, f);
            f.largest = larger(f.largest, z[a_.mask_token_id]);
        }
        find_filter(row, z, x, weight, f);
        if (posterior_) {
            f.mask_kept = keeps(row, z[a_.mask_token_id], f);
            z[a_.mask_token_id] = -infinity<W>;
        }
        const Stream stream(row.seed, row.offset, row.step, s);
        for (int64_t base = 0; base < vocabulary_; base += stretch) {
            const int64_t n = smaller(stretch, vocabulary_ - base);
            W* y = stretch_z_;
            for (int64_t i = 0; i < n; ++i) y[i] = keeps(row, z[base + i], f) ? z[base + i] : -infinity<W>;
            bool unused;
            draw(row, stream, y, n, base, peak(y, n, unused), f);
        }
        return f;
    }

    // The mask token's logit in q(x_s | x_t): it gives the mask the probability 1 - leave.
    W mask_logit(const RemaskRow& row, const Findings<W>& f) const {
        return W(double(f.all.top) + f.all.log()) + W(::log1p(-row.leave) - ::log(row.leave));
    }

    bool keeps(const RemaskRow& row, W z, const Findings<W>& f) const {
        if (!row.filtered) return true;
        if (f.none_kept || !(z >= f.least)) return false;
        return row.top_p >= 1 || nucleus_value(row, z, f) >= f.least_x;
    }

    W temperature(const RemaskRow& row) const { return row.temperature > 0 ? W(row.temperature) : W(1); }
    W own_temperature(const RemaskRow& row) const { return tempered_ ? temperature(row) : W(1); }

    // The logit of a token as the statistics see it, -infinity if they do not.
    W scored_logit(const RemaskRow& row, int64_t b, int64_t s, int64_t token, const Findings<W>& f) const {
        if (suppressed_.has(token) || unscored_.has(token)) return -infinity<W>;
        const W z = widen((logits(b, s))[token]);
        return tempered_ && !keeps(row, z, f) ? -infinity<W> : z;
    }

   private:
    const X* logits(int64_t b, int64_t s) const {
        return a_.logits.as<X>() + b * a_.logits.stride[0] + s * a_.logits.stride[1];
    }

    const W* load(int64_t b, int64_t s, int64_t base, int64_t n) {
        const X* from = logits(b, s) + base;
        for (int64_t i = 0; i < n; ++i) stretch_z_[i] = widen(from[i]);
        suppressed_.exclude<W>(stretch_z_, base, n);
        return stretch_z_;
    }

    W admit(const W* z, int64_t n, int64_t base, Findings<W>& f) {
        bool wrong;
        const W largest = peak(z, n, wrong);
        f.wrong |= wrong;
        f.best.offer(z, n, base, largest);
        if (!tempered_) score(z, n, base, largest, 1, f);
        if (posterior_) f.all.add(z, n, largest, 1);
        return largest;
    }

    // Everything that comes after the filter.
    void draw(const RemaskRow& row, const Stream& stream, const W* y, int64_t n, int64_t base, W largest,
              Findings<W>& f) {
        const W t = temperature(row);
        if (tempered_) score(y, n, base, largest, t, f);
        if (posterior_) f.kept.add(y, n, largest, t);
        if (!row.sampled) return;
        const double bound = word_bound(double(largest) / double(t), double(f.drawn.value[1]));
        if (bound < 0.4) return;  // not even the word 0 would do
        philox_words(stream, uint32_t(base >> 2), (n + 3) / 4, words_);
        if (bound < 4294967295.0) {
            const uint32_t limit = uint32_t(bound) + 1;
            uint32_t hits = 0;
#pragma omp simd reduction(| : hits)
            for (int64_t i = 0; i < n; ++i) hits |= words_[i] < limit;
            if (!hits) return;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) noisy_[i] = y[i] / t + W(gumbel(words_[i]));
        bool unused;
        f.drawn.offer(noisy_, n, base, peak(noisy_, n, unused));
    }

    // Noise falls as the word grows. So where the best of a stretch is far below what the second best has drawn, only
    // words below a bound can matter, and most stretches have none: their noise, two logarithms per token, is never
    // computed. The margin is wider than all rounding, so the draw is the same to the bit.
    static double word_bound(double largest, double second) {
        if (second == -infinity<double>) return 0x1p32;
        const double margin = 1e-3 + 1e-5 * (::fabs(largest) + ::fabs(second));
        return -::expm1(-::exp(largest - second + margin)) * 0x1p32;
    }

    void score(const W* y, int64_t n, int64_t base, W largest, W t, Findings<W>& f) {
        if (unscored_.any(base, base + n)) {
            for (int64_t i = 0; i < n; ++i) stretch_x_[i] = y[i];
            unscored_.exclude<W>(stretch_x_, base, n);
            bool unused;
            largest = peak(static_cast<const W*>(stretch_x_), n, unused);
            y = stretch_x_;
        }
        if (margin_) f.scored.offer(y, n, base, largest);
        f.sum.add(y, n, largest, t);
    }

    W nucleus_value(const RemaskRow& row, W z, const Findings<W>& f) const {
        return a_.options.top_p_tempered ? (z - f.largest) / temperature(row) : z;
    }

    void find_filter(const RemaskRow& row, const W* z, W* x, W* weight, Findings<W>& f) const {
        const int64_t v = vocabulary_;
        if (row.top_k > 0 && row.top_k < v) {
            for (int64_t i = 0; i < v; ++i) x[i] = z[i];
            f.least = least_kept<W>(x, nullptr, v, double(row.top_k - 1), false);
        }
        if (row.top_p >= 1) return;
        if (f.largest == infinity<W>) {  // the posterior of a mask that stays for certain has no nucleus of tokens
            f.none_kept = true;
            return;
        }
        Sum<W> total;
        for (int64_t base = 0; base < v; base += stretch) {
            const int64_t n = smaller(stretch, v - base);
            for (int64_t i = base; i < base + n; ++i) {
                const W value = nucleus_value(row, z[i], f);
                x[i] = a_.options.top_p_first || z[i] >= f.least ? value : -infinity<W>;
            }
            bool unused;
            total.add(x + base, n, peak(static_cast<const W*>(x + base), n, unused), 1);
        }
        for (int64_t i = 0; i < v; ++i) weight[i] = W(double(exponential(x[i] - total.top)) / total.mass);
        f.least_x = least_kept<W>(x, weight, v, row.top_p, !a_.options.top_p_keep_crossing);
    }

    const Remask& a_;
    const Ids suppressed_, unscored_;
    const int64_t vocabulary_;
    const bool posterior_, tempered_, margin_;
    alignas(64) W stretch_z_[stretch];
    alignas(64) W stretch_x_[stretch];
    alignas(64) W noisy_[stretch];
    alignas(64) uint32_t words_[stretch];
};

}  // namespace TT_ISA
}  // namespace tt
