// What a step makes of a row's and of a position's numbers (reference/remask.py), once the logits have been read.
//
// Included by both the CPU's kernel and the GPU's, as remask_schedule.h is. `Step` has options and bounds
// (remask_policy.h). W is what statistics are rounded to, float or double: bounds are compared with them at that
// precision, while all numbers are held as doubles.
#pragma once

// --- a row ----------------------------------------------------------------------------------------------------------

// The temperature at which a draw is the argmax, as it is at all below. The tempered statistics of these are its own:
// then no temperature is 0 or subnormal as a float, and its inverse is a float.
constexpr double coldest = 1e-36;

// Whether committed positions are looked at, too.
REMASK_FUNCTION bool looks_at_committed(const RemaskOptions& options) {
    return options.renoise || options.has_edit_threshold || options.has_remask_threshold;
}

// Whether what stands at a position has to be a token of the vocabulary.
REMASK_FUNCTION bool asks_for_standing(const RemaskOptions& options) {
    return options.standing || options.schedule == RemaskChoice::uniform;
}

// Whether random tokens are the op's own draws although the caller gives numbers, which have another purpose then.
REMASK_FUNCTION bool renoises_by_itself(const RemaskOptions& options) {
    return options.schedule == RemaskChoice::uniform || options.schedule == RemaskChoice::corrupt;
}

// `Row` has step, num_steps, top_k and top_p, and temperature as it was given. Sets temperature to that of this step,
// and whether tokens are drawn and whether a filter matters.
template <class Step, class Row>
REMASK_FUNCTION void derive(const Step& a, int64 vocabulary, Row& row) {
    if (a.options.has_temperature_end && row.temperature > 0) {
        const int64 left = row.num_steps > row.step ? row.num_steps - row.step : 0;
        const float rest = float(left) / float(row.num_steps);  // a quotient of integers is float in the definition
        row.temperature = a.bounds.temperature_end + (row.temperature - a.bounds.temperature_end) * double(rest);
    }
    if (row.temperature > 0 && row.temperature < coldest) row.temperature = coldest;
    const bool ends = a.options.renoise && a.options.finish && row.step >= row.num_steps - 1;
    row.sampled = row.temperature > coldest && !a.options.greedy && !a.options.standing && !ends;
    const bool filters = (row.top_k > 0 && row.top_k < vocabulary) || row.top_p < 1;
    const bool matters =
        row.sampled || a.options.statistics == RemaskChoice::filtered || a.options.schedule == RemaskChoice::posterior;
    row.filtered = filters && matters;
}

// Whether noise can matter to a draw from logits of which `best` is the largest: where best / temperature is too large
// to be a number, the argmax is drawn.
template <class W>
REMASK_FUNCTION bool noise_matters(W best, double temperature) {
    const W largest = best / W(temperature);
    return largest - largest == 0;
}

// --- the logits of a position ---------------------------------------------------------------------------------------

struct RemaskLogits {
    const void* data;
    int64 first;  // the element of `data` that is token 0's
};

template <class Step>
REMASK_FUNCTION RemaskLogits logits_of(const Step& a, int64 b, int64 s) {
    if (s < a.shift && a.shift_logits) return {a.shift_logits, b * a.shift_logits_stride_b};
    const int64 row = s < a.shift ? 0 : s - a.shift;
    return {a.logits.data, b * a.logits.stride_b + row * a.logits.stride_s};
}

// --- the posterior of a position ------------------------------------------------------------------------------------

// The mask token's logit in q(x_s | x_t): it gives the mask the probability 1 - leave beside tokens whose e^z add up to
// e^log_sum.
template <class W>
REMASK_FUNCTION W mask_logit(double log_sum, double leave) {
    return W(log_sum) + W(log1p(-leave) - log(leave));
}

template <class W>
struct Posterior {
    W mask;              // the mask token's logit
    bool mask_best;      // it is the argmax: larger than every token's, or as large and of a lower number
    bool mask_survives;  // by the filter
    W top;               // the largest of the tokens that the filter keeps
    double mass;         // of those: the sum of e^((z - top) / temperature)
};

// The probability that a draw is a token and not the mask; without a temperature, whether the argmax is one.
template <class W>
REMASK_FUNCTION double token_probability(const Posterior<W>& q, double temperature) {
    if (!(temperature > 0)) return q.mask_best ? 0 : 1;
    if (q.mass == 0) return 0;  // no token is kept
    if (!q.mask_survives) return 1;
    const double ahead = (double(q.mask) - double(q.top)) / temperature;
    return double(W(ahead > 0 ? q.mass * exp(-ahead) / (q.mass * exp(-ahead) + 1) : q.mass / (q.mass + exp(ahead))));
}

// --- the uniform-state posterior of a position ----------------------------------------------------------------------

// The fraction of clean tokens before and after a step.
struct RemaskClean {
    double before, after;
};

// What a draw of the uniform-state q(x_s | x_t) is: the proposal, the token that stands there, or a random token.
enum RemaskDraw { draws_proposal, draws_standing, draws_noise };

// standing: the probability of the token that stands there; uniform: the position's number in [0, 1). In the last step
// nothing is noise, and with finish all take their proposal.
template <class Step>
REMASK_FUNCTION RemaskDraw uniform_draw(const Step& a, const RemaskClean& clean, bool last, double standing,
                                        double uniform) {
    const double before = clean.before, after = last ? 1.0 : clean.after, ratio = after > 0 ? before / after : 1.0;
    const double weight = before * double(a.vocabulary) * standing, whole = weight + 1 - before;
    const double noise = (1 - ratio) * (1 - after) / whole, keep = (weight + ratio - before) / whole;
    if (uniform < noise) return draws_noise;
    return uniform < noise + keep && !(last && a.options.finish) ? draws_standing : draws_proposal;
}

// --- a position -----------------------------------------------------------------------------------------------------

struct RemaskPosition {
    int64 before, candidate;  // tokens
    double confidence;        // NaN: its logits are not usable
    bool looked, masked;      // whether it was looked at, and whether it holds the mask token
};

// Committed, and sent back to wait.
template <class W, class Step>
REMASK_FUNCTION bool sent_back(const Step& a, const RemaskPosition& p) {
    return a.options.has_remask_threshold && p.looked && !p.masked &&
           p.confidence < double(W(a.bounds.remask_threshold));
}
template <class W, class Step>
REMASK_FUNCTION bool waits(const Step& a, const RemaskPosition& p) {
    return a.options.renoise ? p.looked : (p.looked && p.masked) || sent_back<W>(a, p);
}
// It waits and may be chosen. mask: the token, -1 if there is none.
template <class W, class Step>
REMASK_FUNCTION bool usable(const Step& a, int64 mask, const RemaskPosition& p) {
    const bool sits_out = a.options.skip_mask_candidates && mask >= 0 && p.candidate == mask;
    return waits<W>(a, p) && p.confidence == p.confidence && !sits_out;
}
// Committed, and rewritten.
template <class W, class Step>
REMASK_FUNCTION bool edited(const Step& a, const RemaskPosition& p) {
    return a.options.has_edit_threshold && p.looked && !p.masked && !sent_back<W>(a, p) &&
           p.confidence > double(W(a.bounds.edit_threshold)) && p.candidate != p.before;
}

// The score of a position with Gumbel noise made from its number in [0, 1): the best of these are draws without
// replacement, with chances that are the softmax of score / rank_temperature.
template <class Step>
REMASK_FUNCTION double noisy_score(const Step& a, double score, double uniform) {
    const double t = a.bounds.rank_temperature < coldest ? coldest : a.bounds.rank_temperature;
    return score / t - log(-log1p(-uniform));
}

struct RemaskOutcome {
    int64 token;
    bool written;  // it took its candidate
    bool left;     // it counts as one that is left to do
};

// uniform: the position's number in [0, 1), which becomes a random token under renoise; asked for only then.
template <class W, class Step, class Uniform>
REMASK_FUNCTION RemaskOutcome outcome(const Step& a, int64 mask, int64 vocabulary, const RemaskPosition& p, bool chosen,
                                      const Uniform& uniform) {
    const bool written = chosen || edited<W>(a, p);
    if (a.options.renoise) {
        const bool rejected = !written && usable<W>(a, mask, p);
        const bool as_mask = a.options.renoise_as == RemaskChoice::as_mask;
        if (rejected) return {as_mask ? mask : int64(uniform() * double(vocabulary)), false, true};
        return {written ? p.candidate : p.before, written, false};
    }
    const int64 token = written ? p.candidate : sent_back<W>(a, p) ? mask : p.before;
    return {token, written, p.looked && token == mask};
}
