// What a row of a remasking step is given: its numbers, its schedule, the positions it reaches.
#pragma once

#include "numeric.h"
#include "philox.h"
#include "remask.h"
#include "remask_schedule.h"

namespace tt {
namespace TT_ISA {

struct RemaskRow {
    int64_t step, num_steps, top_k, seed, offset, initial, length;
    double temperature;  // of this step; 0: none
    double top_p, gate_bound, leave;
    RemaskClean clean;
    bool sampled, filtered, by_sequence;
    bool last() const { return step >= num_steps - 1; }
    // What the tokens of a position draw with; numbers of positions have a stream of their own (position_noise).
    Stream token_stream(int64_t s) const {
        return by_sequence ? Stream(seed, offset + s, 0, 0) : Stream(seed, offset, step, s);
    }
};

inline RemaskRow remask_row(const Remask& a, int64_t b) {
    RemaskRow row;
    row.step = a.step[b];
    row.num_steps = a.num_steps[b];
    row.top_k = a.top_k[b];
    row.seed = a.seed[b];
    row.offset = a.offset[b];
    row.by_sequence = a.by_sequence;
    row.initial = a.initial_num_masked[b];
    row.length = a.valid_lens[b];
    row.temperature = a.temperature[b];
    row.top_p = a.top_p[b];
    row.gate_bound = a.gate_bound[b];
    row.leave = leave_probability(a, row.step, row.num_steps);
    row.clean = clean_fractions(a, row.step, row.num_steps);
    derive(a, a.vocabulary, row);
    return row;
}

// The logits of a position, of which X is the type.
template <class X>
inline const X* logits_at(const Remask& a, int64_t b, int64_t s) {
    const RemaskLogits z = logits_of(a, b, s);
    return static_cast<const X*>(z.data) + z.first;
}

// Whether tokens are int64; else int32.
inline bool holds_int64(const Remask& a) {
    return a.tokens_dtype == int64_t(DType::int64);
}

inline int64_t token_at(const Remask& a, int64_t b, int64_t s) {
    const int64_t i = b * a.tokens.stride_b + s * a.tokens.stride_s;
    return holds_int64(a) ? static_cast<const int64_t*>(a.tokens.data)[i]
                          : int64_t(static_cast<const int32_t*>(a.tokens.data)[i]);
}

// Whether the step may write there. Positions outside neither wait nor count.
inline bool reaches(const Remask& a, const RemaskRow& row, int64_t b, int64_t s) {
    if (s >= row.length) return false;
    return !a.editable || a.editable.at(b, s);
}

// The caller's number of a position, or the op's own.
inline double position_noise(const Remask& a, const RemaskRow& row, int64_t b, int64_t s, uint32_t draw) {
    const bool own = draw == renoise_draw && renoises_by_itself(a.options);
    if (a.rank_noise && !own) return a.rank_noise.at(b, s);
    return uniform(philox_word(Stream(row.seed, row.offset, row.step, s), draw));
}

// Sorted token numbers.
struct Ids {
    explicit Ids(const RemaskIds& given) : id(given.ids), n(given.count) {}
    int64_t first_from(int64_t token) const {  // the index of the first one >= token
        int64_t low = 0, high = n;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (id[middle] < token)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    bool any(int64_t begin, int64_t end) const {
        const int64_t i = first_from(begin);
        return i < n && id[i] < end;
    }
    bool has(int64_t token) const { return any(token, token + 1); }
    template <class W>
    void exclude(W* values, int64_t base, int64_t size) const {  // values of the tokens from base on
        for (int64_t i = first_from(base); i < n && id[i] < base + size; ++i)
            values[id[i] - base] = -W(__builtin_inff());
    }
    const int64_t* id;
    int64_t n;
};

}  // namespace TT_ISA
}  // namespace tt
