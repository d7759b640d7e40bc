// One remasking step: a candidate for every position that is looked at, then the positions that take it
// (reference/remask.py is the definition).
//
// Stage A (remask_scan.h) reads the logits of those positions once, all threads over pieces of positions; nothing of
// the size of the logits is written. Stage B, a row at a time, merges the pieces in order, scores the positions and
// selects (remask_select.h). Positions that are not looked at cost nothing, so a step late in a block is cheaper.
#include "remask.h"

#include "numeric.h"
#include "parallel.h"
#include "philox.h"
#include "remask_row.h"
#include "remask_scan.h"
#include "remask_select.h"

namespace tt {
namespace TT_ISA {

namespace {

// i: of the position, counted through all rows.
void write_token(const Remask& a, int64_t i, int64_t token) {
    if (holds_int64(a))
        static_cast<int64_t*>(a.tokens_out)[i] = token;
    else
        static_cast<int32_t*>(a.tokens_out)[i] = int32_t(token);
}

// The proposal: the caller's, the sample, or the argmax.
template <class X>
int64_t proposal(const Remask& a, const RemaskRow& row, int64_t b, int64_t s, const Summary<Wide<X>>& f) {
    using W = Wide<X>;
    if (a.candidates) {
        const int64_t given = a.candidates.at(b, s);
        if (given >= 0) return given;
    }
    if (a.options.standing) return token_at(a, b, s);
    if (!row.sampled || !noise_matters(f.best.value, row.temperature)) return f.best.token;
    const Two<W>& drawn = f.drawn;
    const W near = W(1e-4);
    if (!(drawn.value[0] - drawn.value[1] < near)) return drawn.token[0];
    const X* logits = logits_at<X>(a, b, s);
    const Stream stream = row.token_stream(s);
    const int64_t low = smaller(drawn.token[0], drawn.token[1]), high = larger(drawn.token[0], drawn.token[1]);
    const auto exactly = [&](int64_t token) {
        return double(widen(logits[token])) / row.temperature + exact_gumbel(philox_word(stream, uint32_t(token)));
    };
    return exactly(high) > exactly(low) ? high : low;
}

// What one position's logits come to: confidence, entropy, score; NaN where they are not usable.
template <class X>
void evaluate(const Remask& a, const Scan<X>& scan, const RemaskRow& row, int64_t b, int64_t s,
              const Summary<Wide<X>>& f, RemaskCandidate& position) {
    using W = Wide<X>;
    const bool posterior = a.options.schedule == RemaskChoice::posterior;
    const W mask = posterior ? f.mask_logit(row.leave) : -infinity<W>;
    const bool mask_is_certain = a.options.statistics == RemaskChoice::filtered && mask == infinity<W>;
    position.candidate = -1;
    position.score = position.confidence = position.entropy = __builtin_nan("");
    if (f.wrong || f.sum.mass == 0 || mask_is_certain) return;
    const bool known = position.before >= 0 && position.before < a.vocabulary;
    if (!known && asks_for_standing(a.options)) return;
    int64_t candidate = proposal<X>(a, row, b, s, f);
    const double t = double(scan.own_temperature(row)), top = double(f.sum.top);
    const auto probability = [&](W z) { return double(W(::exp((double(z) - top) / t) / f.sum.mass)); };
    const auto probability_of = [&](int64_t token) { return probability(scan.scored_logit(row, b, s, token, f)); };
    if (a.options.schedule == RemaskChoice::uniform) {
        const RemaskDraw draw = uniform_draw(a, row.clean, row.last(), probability_of(position.before),
                                             position_noise(a, row, b, s, posterior_draw));
        if (draw == draws_standing) candidate = position.before;
        position.drawn = draw != draws_noise;
    }
    position.confidence = probability_of(candidate);
    position.candidate = candidate;
    position.entropy = double(W(f.sum.entropy()));
    switch (a.options.score) {
        case RemaskChoice::confidence: position.score = position.confidence; break;
        case RemaskChoice::margin:
            position.score = double(W(probability(f.scored.value[0]) - probability(f.scored.value[1])));
            break;
        case RemaskChoice::neg_entropy: position.score = -position.entropy; break;
        case RemaskChoice::random: position.score = position_noise(a, row, b, s, ranking_draw); break;
        case RemaskChoice::top: position.score = probability(f.sum.top); break;
        case RemaskChoice::gap: {
            const W behind = scan.scored_logit(row, b, s, candidate, f) - W(f.sum.top);
            position.score = double(behind / W(t));
            break;
        }
        default: position.score = -double(s);
    }
    if (a.options.schedule == RemaskChoice::coin)
        position.drawn = position_noise(a, row, b, s, ranking_draw) < row.leave;
    if (!posterior) return;
    const bool mask_best = mask > f.best.value || (mask == f.best.value && a.mask_token_id < f.best.token);
    const Posterior<W> q = {mask, mask_best, f.mask_survives, f.survivors.top, f.survivors.mass};
    position.drawn = position_noise(a, row, b, s, posterior_draw) < token_probability(q, row.temperature);
}

void choose(const Remask& a, const RemaskSelection& selection, const RemaskRow& row, int64_t b,
            RemaskCandidate* position, int64_t block, RemaskOrder& room) {
    const RemaskOptions& options = a.options;
    if (a.bounds.position_penalty != 0) {
        int64_t first = 0;
        while (first < block && !position[first].waiting) ++first;
        for (int64_t s = 0; s < block; ++s) {  // the product is float32 in the definition, whatever the score is
            const double penalty = double(float(a.bounds.position_penalty) * float(s - first));
            position[s].score = selection.as_score(position[s].score - penalty);
        }
    }
    if (a.bounds.rank_temperature > 0)
        for (int64_t s = 0; s < block; ++s)
            if (position[s].usable)
                position[s].score = noisy_score(a, position[s].score, position_noise(a, row, b, s, ranking_draw));
    const int64_t size = options.sub_block > 0 ? options.sub_block : larger(block, int64_t(1));
    bool due = true;
    for (int64_t begin = 0; begin < block; begin += size) {
        const int64_t n = smaller(size, block - begin);
        selection.select(position + begin, n, row, due, room);
        if (!options.has_complete_threshold) continue;
        int64_t committed = 0, length = 0;
        for (int64_t s = begin; s < begin + n; ++s) {
            committed += position[s].valid && !position[s].masked;
            length += position[s].valid;
        }
        due = double(committed) >= a.bounds.complete_threshold * double(length);
    }
}

template <class W>
void write_row(const Remask& a, const RemaskRow& row, int64_t b, const RemaskCandidate* position, int64_t block) {
    const RemaskOptions& options = a.options;
    int64_t left = 0;
    for (int64_t s = 0; s < block; ++s) {
        const RemaskCandidate& p = position[s];
        const auto uniform = [&] { return position_noise(a, row, b, s, renoise_draw); };
        const RemaskOutcome o = outcome<W>(a, a.mask_token_id, a.vocabulary, p, p.chosen, uniform);
        left += o.left;
        const int64_t i = b * block + s;
        write_token(a, i, o.token);
        a.transfer_mask[i] = o.written;
        a.candidate[i] = p.looked ? p.candidate : -1;
        static_cast<W*>(a.confidence)[i] = p.looked ? W(p.confidence) : W(0);
        static_cast<W*>(a.entropy)[i] = p.looked ? W(p.entropy) : W(0);
    }
    a.num_masked[b] = left;
    a.done[b] = options.renoise ? row.step >= row.num_steps - 1 : left == 0;
}

template <class X>
void step(const Remask& a) {
    using W = Wide<X>;
    const int64_t batch = a.batch, block = a.block, vocabulary = a.vocabulary;
    const int64_t pieces = (vocabulary + piece_size - 1) / piece_size;
    const bool all = looks_at_committed(a.options);
    const bool editable_alone = a.options.schedule_base == RemaskChoice::of_editable;
    Scratch<RemaskRow> rows(batch);
    Scratch<RemaskCandidate> positions(batch, block);
    Scratch<int64_t> looked(batch, block), slot(batch, block);  // positions by number, and the other way round
    int64_t count = 0;
    bool filters = false;
    for (int64_t b = 0; b < batch; ++b) {
        rows[b] = remask_row(a, b);
        filters |= rows[b].filtered;
        for (int64_t s = 0; s < block; ++s) {
            const int64_t i = b * block + s;
            RemaskCandidate& position = positions[i] = RemaskCandidate();
            position.candidate = -1;
            position.valid = s < rows[b].length;
            position.before = token_at(a, b, s);
            position.masked = a.mask_token_id >= 0 && position.before == a.mask_token_id;
            const bool reached = reaches(a, rows[b], b, s);
            position.looked = reached && (all || position.masked);
            position.counted = editable_alone ? reached : position.valid;
            if (position.looked) slot[i] = count, looked[count++] = i;
        }
    }
    Scratch<Summary<W>> found(count, pieces);
    Scratch<double> reached(count);
    for (int64_t i = 0; i < count; ++i) reached[i] = -infinity<double>;
    parallel_for(count * pieces, 1, [&](int64_t begin, int64_t end) {
        Scan<X> scan(a);
        const int64_t room = filters ? padded(vocabulary) : 0;
        Scratch<W> z(room), x(room), weight(room);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = looked[task / pieces], b = i / block, s = i % block, from = task % pieces * piece_size;
            if (!rows[b].filtered)
                found[task] =
                    scan.piece(rows[b], b, s, from, smaller(from + piece_size, vocabulary), reached + task / pieces);
            else
                found[task] = from == 0 ? scan.filtered(rows[b], b, s, z, x, weight) : Summary<W>();
        }
    });
    parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
        const Scan<X> scan(a);
        const RemaskSelection selection(a, sizeof(W) == sizeof(double));
        RemaskOrder room(block);
        for (int64_t b = begin; b < end; ++b) {
            const RemaskRow& row = rows[b];
            RemaskCandidate* position = positions + b * block;
            for (int64_t s = 0; s < block; ++s) {
                if (position[s].looked) {
                    Summary<W>* f = found + slot[b * block + s] * pieces;
                    for (int64_t p = 1; p < pieces && !row.filtered; ++p)
                        f->merge(f[p], scan.temperature(row), scan.own_temperature(row));
                    evaluate<X>(a, scan, row, b, s, *f, position[s]);
                }
                position[s].sent_back = sent_back<W>(a, position[s]);
                position[s].waiting = waits<W>(a, position[s]);
                position[s].usable = usable<W>(a, a.mask_token_id, position[s]);
            }
            choose(a, selection, row, b, position, block, room);
            write_row<W>(a, row, b, position, block);
        }
    });
}

}  // namespace

void remask(const Remask& a) {
    for_fast(
        DType(a.logits_dtype), [&](auto type) { step<typename decltype(type)::type>(a); },
        [&] { baseline::remask(a); });
}

}  // namespace TT_ISA
}  // namespace tt
