// Stage A of a remasking step: what one position's logits say, from one pass over them.
//
// A position is read in stretches of 2048 tokens that stay in L1 while all that is wanted of them is taken: the best
// token, the sums of the softmax and its entropy (remask_sum.h), the two best with Gumbel noise. Sums refer to the
// largest value so far and are scaled when it grows, so one pass is enough. Which token is the best is looked up once,
// in the last stretch whose largest value was a new one; likewise noise is computed only for words small enough to win.
// Logits are read where they are, except in stretches with a token that is left out, which
// are copied. Positions are cut into pieces of a fixed size, whatever the number of threads, so that results do not
// depend on it. Rows with top-k or top-p are read once into a thread's scratch of three vocabularies, where the filter
// is found (remask_filter.h) before the draw.
//
// On two cores of a Zen 3 (AVX2), float32, TwoTower's rule: [16, 16, 131072] in 9.1 ms greedy and 21.9 ms sampled,
// where reading alone takes 5.4 to 6.5 ms; [1, 16, 131072], which stays in the L3, in 0.55 and 1.38 ms, bound by
// exponentials.
#pragma once

#include "parallel.h"
#include "philox.h"
#include "remask_filter.h"
#include "remask_row.h"
#include "remask_sum.h"

namespace tt {
namespace TT_ISA {

constexpr int64_t piece_size = 8 * stretch, noisy_size = 512;

// The largest value and its token, the lowest one of equals.
template <class W>
struct Best {
    W value = -infinity<W>;
    int64_t token = 0;
    bool found = true;  // else token is the first of the stretch
    template <class X>
    void offer(const X* x, int64_t base, W largest) {  // x of the tokens from base on
        if (largest > value) value = largest, token = base + index_of<W>(x, largest), found = true;
    }
    // As offer, but the token is found by `find`: in the last of several stretches with a new largest value alone.
    void note(int64_t base, W largest) {
        if (largest > value) value = largest, token = base, found = false;
    }
    template <class X>
    void find(const X* x) {  // of all tokens
        if (!found) token += index_of<W>(x + token, value), found = true;
    }
    void merge(const Best& other) {
        if (other.value > value) *this = other;
    }
};

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
    template <class X>
    void offer(const X* x, int64_t n, int64_t base) {  // n padded
        for (int64_t i = 0; i < n; i += lanes_of<W>)
            if (any(Load<W, X>::from(x + i) > value[1]))
                for (int64_t j = i; j < i + lanes_of<W>; ++j) offer(W(widen(x[j])), base + j);
    }
    void merge(const Two& other) {
        offer(other.value[0], other.token[0]);
        offer(other.value[1], other.token[1]);
    }
};

// What a piece of a position says; pieces of a position are merged in order.
template <class W>
struct Summary {
    Best<W> best;                                     // of what may be proposed
    Two<W> scored;                                    // of what the statistics see
    Two<W> drawn;                                     // with noise, of what the filter keeps
    Sum<W> sum;                                       // of what the statistics see
    Sum<W> all;                                       // posterior: of what may be proposed, untempered
    Sum<W> survivors;                                 // posterior: of what the filter keeps, tempered
    W largest = -infinity<W>;                         // of all that is filtered: x is tempered from here
    W least = -infinity<W>, least_x = -infinity<W>;   // of the filter: of z by top-k, of x by top-p
    bool mask_survives = true, none_survive = false;  // whether the filter keeps the posterior's mask; no token
    bool wrong = false;                               // NaN or +infinity; the rest may then be anything

    // Of the posterior.
    W mask_logit(double leave) const { return tt::TT_ISA::mask_logit<W>(double(all.top) + all.log(), leave); }

    void merge(const Summary& o, W t, W own) {
        wrong |= o.wrong;
        if (wrong) return;
        best.merge(o.best);
        scored.merge(o.scored);
        drawn.merge(o.drawn);
        sum.merge(o.sum, double(own));
        all.merge(o.all, 1);
        survivors.merge(o.survivors, double(t));
    }
};

// Temperatures: of the draw, of the statistics.
template <class W>
struct Heat {
    Heat(W draw, W statistics) : t(draw), own(statistics), draw(usable(draw)), statistics(usable(statistics)) {}
    static double usable(W t) { return Exponential::serves(double(t)) ? double(t) : 1; }
    W t, own;
    Exponential draw, statistics;
};

// The noise of one position, and what all its pieces so far have drawn second best: threads share that number.
class Noise {
   public:
    Noise(const RemaskRow& row, int64_t s, double* reached)
        : stream(row.token_stream(s)), small(stream), reached_(reached) {}
    double reached() const {
        double value;
        __atomic_load(reached_, &value, __ATOMIC_RELAXED);
        return value;
    }
    void raise(double to) {  // may be lost to another thread's, which costs time only
        if (to > reached()) __atomic_store(reached_, &to, __ATOMIC_RELAXED);
    }
    const Stream stream;
    const SmallWords small;

   private:
    double* reached_;
};

template <class X>
class Scan {
   public:
    using W = Wide<X>;
    explicit Scan(const Remask& a)
        : a_(a),
          suppressed_(a.suppressed),
          unscored_(a.unscored),
          vocabulary_(a.vocabulary),
          posterior_(a.options.schedule == RemaskChoice::posterior),
          tempered_(a.options.statistics == RemaskChoice::filtered),
          margin_(a.options.score == RemaskChoice::margin) {}

    // Tokens [begin, end) of position s of row b. reached: -infinity at first, shared by all pieces of the position.
    Summary<W> piece(const RemaskRow& row, int64_t b, int64_t s, int64_t begin, int64_t end, double* reached) {
        Summary<W> f;
        const X* x = logits(b, s);
        Noise noise(row, s, reached);
        const Heat<W>& heat = heat_of(row);
        for (int64_t base = begin; base < end && !f.wrong; base += stretch) {
            const int64_t n = smaller(stretch, end - base);
            if constexpr (sizeof(W) == sizeof(float)) {
                if (plain(base, n) && Exponential::serves(heat.own)) {
                    Known& known = known_[base / stretch % 2];
                    const float largest = known.of == x + base ? known.largest : peak_or_nan(x + base, n);
                    const X* next = base + 3 * stretch <= vocabulary_ ? x + base + 2 * stretch : x + base;
                    known = {next, add_plain(x + base, next, base, largest, heat, f)};
                    if (row.sampled && !f.wrong) draw(noise, x + base, n, base, largest, heat.t, f);
                    continue;
                }
            }
            const W* z = load(b, s, base, n);
            const W largest = admit(z, n, base, heat, f);
            if (!f.wrong) after_filter(row, noise, z, n, base, largest, heat, f);
        }
        if constexpr (sizeof(W) == sizeof(float))
            if (!f.wrong) f.best.find(x);
        return f;
    }

    // A whole position of a row with top-k or top-p. z, x and weight: room for a padded vocabulary.
    Summary<W> filtered(const RemaskRow& row, int64_t b, int64_t s, W* z, W* x, W* weight) {
        Summary<W> f;
        const Heat<W>& heat = heat_of(row);
        for (int64_t base = 0; base < vocabulary_ && !f.wrong; base += stretch) {
            const int64_t n = smaller(stretch, vocabulary_ - base);
            load(b, s, base, n);
            std::memcpy(z + base, stretch_z_, size_t(n) * sizeof(W));
            admit(stretch_z_, n, base, heat, f);
        }
        f.largest = f.best.value;
        if (f.wrong || f.largest == -infinity<W>) return f;
        if (posterior_) {
            z[a_.mask_token_id] = f.mask_logit(row.leave);
            f.largest = larger(f.largest, z[a_.mask_token_id]);
        }
        find_filter(row, z, x, weight, f);
        if (posterior_) {
            f.mask_survives = survives(row, z[a_.mask_token_id], f);
            z[a_.mask_token_id] = -infinity<W>;
        }
        double reached = -infinity<double>;
        Noise noise(row, s, &reached);
        for (int64_t base = 0; base < vocabulary_; base += stretch) {
            const int64_t n = smaller(stretch, vocabulary_ - base);
            W* y = stretch_z_;
            for (int64_t i = 0; i < n; ++i) y[i] = survives(row, z[base + i], f) ? z[base + i] : -infinity<W>;
            pad(y, n);
            after_filter(row, noise, y, n, base, peak<W>(y, padded(n)), heat, f);
        }
        return f;
    }

    bool survives(const RemaskRow& row, W z, const Summary<W>& f) const {
        if (!row.filtered) return true;
        if (f.none_survive || !(z >= f.least)) return false;
        return row.top_p >= 1 || nucleus_value(row, z, f) >= f.least_x;
    }

    W temperature(const RemaskRow& row) const { return row.temperature > 0 ? W(row.temperature) : W(1); }
    W own_temperature(const RemaskRow& row) const { return tempered_ ? temperature(row) : W(1); }

    // The logit of a token as the statistics see it, -infinity if they do not.
    W scored_logit(const RemaskRow& row, int64_t b, int64_t s, int64_t token, const Summary<W>& f) const {
        if (suppressed_.has(token) || unscored_.has(token)) return -infinity<W>;
        const W z = widen((logits(b, s))[token]);
        return tempered_ && !survives(row, z, f) ? -infinity<W> : z;
    }

   private:
    // Of a row, which most often is that of the piece before.
    const Heat<W>& heat_of(const RemaskRow& row) {
        const W t = temperature(row), own = own_temperature(row);
        if (t != heat_.t || own != heat_.own) heat_ = Heat<W>(t, own);
        return heat_;
    }

    const X* logits(int64_t b, int64_t s) const { return logits_at<X>(a_, b, s); }

    // Whether logits can be used where they are: a whole stretch of which no token is left out, for one sum.
    bool plain(int64_t base, int64_t n) const {
        return n == stretch && !posterior_ && !suppressed_.any(base, base + n) && !unscored_.any(base, base + n);
    }

    // Returns the largest of `next`.
    float add_plain(const X* x, const X* next, int64_t base, float largest, const Heat<W>& heat, Summary<W>& f) {
        if (!(largest > -infinity<float>) || largest == infinity<float>) {
            f.wrong = unusable<float>(x, stretch);
            return peak_or_nan(next, stretch);
        }
        f.best.note(base, largest);
        if (margin_ && largest > f.scored.value[1]) f.scored.offer(x, stretch, base);
        const float ahead = f.sum.add(x, next, stretch, largest, heat.statistics, double(heat.own));
        f.wrong = f.sum.mass != f.sum.mass;  // a NaN among them
        return ahead == -infinity<float> ? peak<float>(next, stretch) : ahead;
    }

    const W* load(int64_t b, int64_t s, int64_t base, int64_t n) {
        const X* from = logits(b, s) + base;
        int64_t i = 0;
        for (; i + lanes_of<W> <= n; i += lanes_of<W>) {
            const Vector<W> v = Load<W, X>::from(from + i);
            std::memcpy(stretch_z_ + i, &v, sizeof(v));
        }
        for (; i < n; ++i) stretch_z_[i] = widen(from[i]);
        pad(stretch_z_, n);
        suppressed_.exclude<W>(stretch_z_, base, n);
        return stretch_z_;
    }

    // z: n values, padded. Returns the largest.
    W admit(const W* z, int64_t n, int64_t base, const Heat<W>& heat, Summary<W>& f) {
        const W largest = peak<W>(z, padded(n));
        f.wrong = unusable<W>(z, padded(n));
        if (f.wrong) return largest;
        f.best.offer(z, base, largest);
        if (!tempered_) score(z, n, base, largest, heat.statistics, 1, f);
        if (posterior_) add(f.all, z, n, largest, one_, 1);
        return largest;
    }

    void after_filter(const RemaskRow& row, Noise& noise, const W* y, int64_t n, int64_t base, W largest,
                      const Heat<W>& heat, Summary<W>& f) {
        if (tempered_) score(y, n, base, largest, heat.statistics, heat.own, f);
        if (posterior_) add(f.survivors, y, n, largest, heat.draw, heat.t);
        if (row.sampled) draw(noise, y, n, base, largest, heat.t, f);
    }

    void score(const W* y, int64_t n, int64_t base, W largest, const Exponential& exponential, W t, Summary<W>& f) {
        if (unscored_.any(base, base + n)) {
            std::memcpy(stretch_x_, y, size_t(n) * sizeof(W));
            pad(stretch_x_, n);
            unscored_.exclude<W>(stretch_x_, base, n);
            largest = peak<W>(static_cast<const W*>(stretch_x_), padded(n));
            y = stretch_x_;
        }
        if (margin_ && largest > f.scored.value[1]) f.scored.offer(y, padded(n), base);
        add(f.sum, y, n, largest, exponential, t);
    }

    // Adds n values, padded.
    void add(Sum<W>& sum, const W* y, int64_t n, W largest, const Exponential& exponential, W t) {
        if (largest == -infinity<W>) return;
        if constexpr (sizeof(W) == sizeof(double)) {
            sum.add_exactly(y, n, largest, t);
        } else if (Exponential::serves(t)) {
            sum.add(y, y, padded(n), largest, exponential, double(t));
        } else {  // far-off temperatures divide beforehand
            sum.lift(largest, double(t));
            for (int64_t i = 0; i < n; ++i) divided_[i] = (y[i] - sum.top) / t;
            pad(divided_, n);
            Sum<W> part;
            part.add(divided_, divided_, padded(n), 0, one_, 1);
            sum.mass += part.mass, sum.drop += part.drop;
        }
    }

    // Noise falls as the word grows. So where the best of a stretch is far below what the second best has drawn, only
    // words below a bound can matter, which are few; their noise, two logarithms per token, is computed one by one. The
    // margins are wider than all rounding, so the two best of the position are the same to the bit, whichever piece
    // comes first.
    template <class Y>
    void draw(Noise& noise, const Y* y, int64_t n, int64_t base, W largest, W t, Summary<W>& f) {
        if (!(largest > -infinity<W>)) return;
        const double best = double(largest) / double(t);
        for (int64_t begin = 0; begin < n; begin += noisy_size) {
            const int64_t size = smaller(noisy_size, n - begin), first = base + begin;
            double second = noise.reached();
            if (second == infinity<double>) return;  // noise does not matter
            const double margin = 1e-3 + 1e-5 * (::fabs(best) + ::fabs(second));
            const double bound = second == -infinity<double> ? 1 : ::exp(best - second + margin);  // of w
            if (bound < 0x1p-34) return;  // not even the word 0 would do
            if (bound > 1.0 / 16) {
                add_noise(noise.stream, y + begin, size, first, t, f);
            } else {
                const auto offer = [&](int64_t token, uint32_t word) {
                    if (token - first >= size) return;
                    const W value = W(widen(y[token - base])) / t;
                    if (double(value) + double(most_gumbel(word)) + margin < second) return;
                    f.drawn.offer(value + W(gumbel(word)), token);
                    second = larger(second, double(f.drawn.value[1]));
                };
                noise.small.below(uint32_t(bound * 0x1p32) + 1, uint32_t(first >> 2), (size + 3) / 4, offer);
            }
            noise.raise(double(f.drawn.value[1]));
        }
    }

    template <class Y>
    void add_noise(const Stream& stream, const Y* y, int64_t n, int64_t first, W t, Summary<W>& f) {
        philox_words(stream, uint32_t(first >> 2), (n + 3) / 4, words_);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) noisy_[i] = W(widen(y[i])) / t + W(gumbel(words_[i]));
        pad(noisy_, n);
        f.drawn.offer(static_cast<const W*>(noisy_), padded(n), first);
    }

    W nucleus_value(const RemaskRow& row, W z, const Summary<W>& f) const {
        return a_.options.top_p_tempered ? (z - f.largest) / temperature(row) : z;
    }

    void find_filter(const RemaskRow& row, const W* z, W* x, W* weight, Summary<W>& f) {
        const int64_t v = vocabulary_;
        if (row.top_k > 0 && row.top_k < v) {
            for (int64_t i = 0; i < v; ++i) x[i] = z[i];
            f.least = least_survivor<W>(x, nullptr, v, double(row.top_k - 1), false);
        }
        if (row.top_p >= 1) return;
        f.none_survive = f.largest == infinity<W>;  // the posterior of a mask that stays for certain has no nucleus
        if (f.none_survive) return;
        Sum<W> total;
        for (int64_t i = 0; i < v; ++i) {
            const W value = nucleus_value(row, z[i], f);
            x[i] = a_.options.top_p_first || z[i] >= f.least ? value : -infinity<W>;
        }
        pad(x, v);
        for (int64_t base = 0; base < v; base += stretch) {
            const int64_t n = smaller(stretch, v - base);
            add(total, x + base, n, peak<W>(static_cast<const W*>(x + base), padded(n)), one_, 1);
        }
        for (int64_t i = 0; i < v; ++i) weight[i] = W(double(exponential(x[i] - total.top)) / total.mass);
        f.least_x = least_survivor<W>(x, weight, v, row.top_p, !a_.options.top_p_keep_crossing);
    }

    const Remask& a_;
    const Ids suppressed_, unscored_;
    const int64_t vocabulary_;
    const bool posterior_, tempered_, margin_;
    const Exponential one_{1.0};
    Heat<W> heat_{1, 1};
    // Stretches whose largest value is known, those of odd numbers apart from the others. It is found two stretches
    // ahead: if it were one, nothing of a stretch could begin before the one before is through.
    struct Known {
        const X* of;
        float largest;
    } known_[2] = {};
    alignas(64) W stretch_z_[stretch];
    alignas(64) W stretch_x_[stretch];
    alignas(64) W divided_[stretch];
    alignas(64) W noisy_[noisy_size];
    alignas(64) uint32_t words_[noisy_size];
};

}  // namespace TT_ISA
}  // namespace tt
