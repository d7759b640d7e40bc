// Stage B of a remasking step: gate, schedule, combine (reference/remask_select.py), from one score per position to the
// positions that take their candidate.
//
// Everything is double here. Where the definition compares in float32, values and bounds are floats stored in doubles,
// and each operation on them is rounded to float again: exact for sums, products and quotients of two floats.
#pragma once

#include "parallel.h"
#include "remask_row.h"

namespace tt {
namespace TT_ISA {

// What selection knows of a position.
struct RemaskCandidate : RemaskPosition {
    double score, entropy;
    bool valid, counted, sent_back, waiting, usable, drawn, gate, chosen;
};

// Scratch of one thread for rows of n positions: the usable positions in order, and the merge sort's other half.
struct RemaskOrder {
    explicit RemaskOrder(int64_t n) : order(n), other(n), before(n) {}
    Scratch<int64_t> order, other, before;
};

// Sorts n positions by falling score; equal ones keep their order. Merge sort from runs of one.
inline const int64_t* sort_by_score(const RemaskCandidate* position, int64_t* order, int64_t* other, int64_t n) {
    for (int64_t run = 1; run < n; run *= 2) {
        for (int64_t begin = 0; begin < n; begin += 2 * run) {
            const int64_t middle = smaller(begin + run, n), end = smaller(begin + 2 * run, n);
            int64_t left = begin, right = middle;
            for (int64_t i = begin; i < end; ++i) {
                const bool takes_left =
                    right == end || (left < middle && position[order[left]].score >= position[order[right]].score);
                other[i] = takes_left ? order[left++] : order[right++];
            }
        }
        int64_t* swap = order;
        order = other;
        other = swap;
    }
    return order;
}

class RemaskSelection {
   public:
    // exact: confidences and entropies are float64.
    RemaskSelection(const Remask& a, bool exact) : a_(a) {
        const int64_t score = a.options.score;
        exact_score_ = exact || score == RemaskChoice::random || score == RemaskChoice::leftmost;
        exact_value_ = a.options.gate_on == RemaskChoice::on_score ? exact_score_ : exact;
    }

    // To what a score is rounded.
    double as_score(double x) const { return exact_score_ ? x : double(float(x)); }

    // Sets `chosen` of n positions. due: false where a stretch waits for the one before.
    void select(RemaskCandidate* position, int64_t n, const RemaskRow& row, bool due, RemaskOrder& room) const {
        int64_t usable = 0;
        for (int64_t i = 0; i < n; ++i) {
            position[i].gate = position[i].chosen = false;
            if (position[i].usable) room.order[usable++] = i;
        }
        const int64_t* order = sort_by_score(position, room.order, room.other, usable);
        gate(position, n, row, order, usable, room.before);
        const RemaskOptions& options = a_.options;
        if (options.finish && row.step >= row.num_steps - 1) {
            for (int64_t r = 0; r < usable; ++r) position[order[r]].chosen = true;
        } else if (draws(options)) {
            for (int64_t r = 0; r < usable; ++r)
                position[order[r]].chosen = position[order[r]].gate || position[order[r]].drawn;
        } else {
            combine(position, n, row, due, order, usable);
        }
    }

   private:
    // The schedules by which every position is drawn by itself.
    static bool draws(const RemaskOptions& options) {
        return options.schedule == RemaskChoice::coin || options.schedule == RemaskChoice::posterior ||
               options.schedule == RemaskChoice::uniform;
    }
    double value(const RemaskCandidate& position) const {
        return a_.options.gate_on == RemaskChoice::on_score ? position.score : position.confidence;
    }
    double as_value(double x) const { return exact_value_ ? x : double(float(x)); }

    // order: the usable positions, best first.
    void gate(RemaskCandidate* position, int64_t n, const RemaskRow& row, const int64_t* order, int64_t usable,
              int64_t* rank) const {
        const RemaskOptions& options = a_.options;
        const RemaskBounds& bounds = a_.bounds;
        const double bound = as_value(row.gate_bound);
        if (options.gate == RemaskChoice::threshold) {
            double least = bound;
            if (options.has_gate_slack && usable > 0) {
                double best = -__builtin_inf();
                for (int64_t r = 0; r < usable; ++r) best = larger(best, value(position[order[r]]));
                least = smaller(least, as_value(best - as_value(bounds.gate_slack)));
            }
            for (int64_t r = 0; r < usable; ++r) {
                const double v = value(position[order[r]]);
                position[order[r]].gate = options.strict ? v > least : v >= least;
            }
        } else if (options.gate == RemaskChoice::factor) {
            int64_t prefix = 0;
            while (prefix < usable) {
                const double slack = as_value(bound / double(prefix + 2));  // rank j = prefix + 1
                if (prefix > 0 && !(value(position[order[prefix]]) >= as_value(1 - slack))) break;
                ++prefix;
            }
            if (options.factor_last_free && prefix == usable - 1) prefix = usable;
            for (int64_t r = 0; r < prefix; ++r) position[order[r]].gate = true;
        } else if (options.gate == RemaskChoice::prefix) {
            for (int64_t r = 0; r < usable; ++r) {
                const double v = value(position[order[r]]);
                if (!(options.strict ? v > bound : v >= bound)) break;
                position[order[r]].gate = true;
            }
        } else if (options.gate == RemaskChoice::entropy_sum) {
            double sum = 0;
            for (int64_t r = 0; r < usable; ++r) {
                const double with = sum + position[order[r]].entropy;
                const double spent = options.entropy_includes_self ? with : sum;
                if (!(options.strict ? spent < row.gate_bound : spent <= row.gate_bound)) break;
                position[order[r]].gate = true;
                sum = with;
            }
        }
        if (!options.has_run_threshold) return;
        for (int64_t r = 0; r < usable; ++r) rank[order[r]] = r;
        for (int64_t begin = 0; begin < n;) {
            if (!position[begin].usable) {
                ++begin;
                continue;
            }
            int64_t best = begin, end = begin;
            for (; end < n && position[end].usable; ++end)
                if (rank[end] < rank[best]) best = end;
            if (value(position[best]) > as_value(bounds.run_threshold)) position[best].gate = true;
            begin = end;
        }
    }

    // n0: given, or the smallest that leaves what waits after the steps so far, or not known.
    int64_t initial_of(const RemaskRow& row, int64_t waiting, int64_t length) const {
        if (!infers_initial(a_, row)) return row.initial;
        for (int64_t initial = waiting; initial <= length; ++initial)
            if (leaves_enough(a_, row, initial, waiting)) return initial;
        return length;
    }

    void combine(RemaskCandidate* position, int64_t n, const RemaskRow& row, bool due, const int64_t* order,
                 int64_t usable) const {
        const RemaskOptions& options = a_.options;
        int64_t waiting = 0, length = 0, passed = 0, first = n;
        int64_t least = options.min_commits;
        for (int64_t i = 0; i < n; ++i) {
            if (position[i].waiting && first == n) first = i;
            waiting += position[i].waiting;
            length += position[i].counted;
            passed += position[i].gate;
            least += position[i].sent_back;
        }
        const int64_t q = due ? larger(quota(a_, row, initial_of(row, waiting, length), waiting, length), least) : 0;
        if (!due) least = 0;
        for (int64_t r = 0, others = passed; r < usable; ++r) {
            RemaskCandidate& p = position[order[r]];
            const bool scheduled = options.window ? order[r] - first < q : r < q;
            if (options.combine == RemaskChoice::cap)
                p.chosen = (p.gate && scheduled) || r < least;
            else if (options.combine == RemaskChoice::either)
                p.chosen = p.gate || scheduled;
            else if (options.window)
                p.chosen = passed >= q ? p.gate : scheduled;
            else  // those that passed, then the best of the others up to q
                p.chosen = p.gate || others++ < q;
        }
    }

    const Remask& a_;
    bool exact_score_, exact_value_;
};

}  // namespace TT_ISA
}  // namespace tt
