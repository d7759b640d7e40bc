// Top-k and top-p without sorting the vocabulary: a radix descent to the least value that is kept.
//
// Values become unsigned keys of the same order. A histogram of the key's highest bits, with the weight that falls into
// each bin, tells in which bin the last kept value lies; only the values of that bin go to the next level. Two passes
// over a bin that is a few per cent of the vocabulary are all that follows the first.
#pragma once

#include "numeric.h"

namespace tt {
namespace TT_ISA {

inline uint32_t order_key(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline uint64_t order_key(double x) {
    const uint64_t bits = bit_cast<uint64_t>(x);
    return bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63);
}
inline float key_value(uint32_t key) {
    return bit_cast<float>(key >> 31 ? key ^ 0x80000000u : ~key);
}
inline double key_value(uint64_t key) {
    return bit_cast<double>(key >> 63 ? key ^ (uint64_t(1) << 63) : ~key);
}

// Of n values (none NaN) with weights (null: 1 each), largest first: the least value for which the weight of the larger
// ones (with `itself`: and its own) is at most `budget`; at least the largest. Both arrays are overwritten.
template <class W>
W least_survivor(W* values, W* weights, int64_t n, double budget, bool itself) {
    using Key = decltype(order_key(W()));
    constexpr int width = 11, bins = 1 << width;
    double weight[bins];
    Key largest[bins];  // 0: the bin is empty (the key of a NaN)
    W own[bins];        // weight of a value of the bin's largest
    double before = 0;
    for (int shift = 8 * int(sizeof(Key)); shift > 0;) {
        const int next = shift > width ? shift - width : 0;
        const Key low_bits = (Key(1) << (shift - next)) - 1;
        for (int i = 0; i < bins; ++i) weight[i] = 0, largest[i] = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Key key = order_key(values[i]);
            const int bin = int((key >> next) & low_bits);
            const W w = weights ? weights[i] : W(1);
            weight[bin] += w;
            if (key > largest[bin]) largest[bin] = key, own[bin] = w;
        }
        int chosen = -1;
        double above = before;
        for (int bin = bins - 1; bin >= 0; --bin) {
            if (largest[bin] == 0) continue;
            if (chosen >= 0 && !(above + (itself ? double(own[bin]) : 0.0) <= budget)) break;
            chosen = bin;
            before = above;
            above += weight[bin];
        }
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (int((order_key(values[i]) >> next) & low_bits) != chosen) continue;
            values[count] = values[i];
            if (weights) weights[count] = weights[i];
            ++count;
        }
        n = count;
        shift = next;
    }
    return values[0];
}

}  // namespace TT_ISA
}  // namespace tt
