// What a row of a remasking step is told: its numbers, its schedule, the positions it reaches.
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
    bool sampled, filtered;
};

inline RemaskRow remask_row(const Remask& a, int64_t b) {
    const auto whole = [b](const View& rows, int64_t number) { return rows ? index_at(rows, b) : number; };
    const auto real = [b](const View& rows, double number) {
        return rows ? rows.as<double>()[b * rows.stride[0]] : number;
    };
    RemaskRow row;
    row.step = whole(a.step, a.whole.step);
    row.num_steps = whole(a.num_steps, a.whole.num_steps);
    row.top_k = whole(a.top_k, a.whole.top_k);
    row.seed = whole(a.seed, a.whole.seed);
    row.offset = whole(a.offset, a.whole.offset);
    row.initial = whole(a.initial, a.whole.initial);
    row.length = a.valid_lens ? index_at(a.valid_lens, b) : a.logits.size[1];
    row.temperature = real(a.temperature, a.real.temperature);
    row.top_p = real(a.top_p, a.real.top_p);
    row.gate_bound = real(a.gate_bound, a.real.gate_bound);
    row.leave = leave_probability(a, row.step, row.num_steps);
    derive(a, a.logits.size[2], row);
    return row;
}

inline int64_t token_at(const Remask& a, int64_t b, int64_t s) {
    const int64_t at = b * a.tokens.stride[0] + s * a.tokens.stride[1];
    return a.tokens.dtype == DType::int64 ? a.tokens.as<int64_t>()[at] : int64_t(a.tokens.as<int32_t>()[at]);
}

// Whether the step may write there. Positions outside neither wait nor count.
inline bool reaches(const Remask& a, const RemaskRow& row, int64_t b, int64_t s) {
    if (s >= row.length) return false;
    return !a.editable || a.editable.as<bool>()[b * a.editable.stride[0] + s * a.editable.stride[1]];
}

// The caller's number of a position, or the op's own.
inline double position_noise(const Remask& a, const RemaskRow& row, int64_t b, int64_t s, uint32_t draw) {
    if (a.rank_noise) return a.rank_noise.as<double>()[b * a.rank_noise.stride[0] + s * a.rank_noise.stride[1]];
    return uniform(philox_word(Stream(row.seed, row.offset, row.step, s), draw));
}

// Sorted token numbers.
struct Ids {
    explicit Ids(const View& view) : id(view.as<int64_t>()), n(view ? view.size[0] : 0) {}
    int64_t first_from(int64_t token) const {  // the place of the first one >= token
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
        const int64_t place = first_from(begin);
        return place < n && id[place] < end;
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
