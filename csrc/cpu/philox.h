// Counter-based noise: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and the Gumbel noise made from its words, as reference/philox.py defines them. Loops over tokens vectorise.
#pragma once

#include "numeric.h"

namespace tt {
namespace TT_ISA {

// Token numbers reserved for draws that belong to a position.
constexpr uint32_t ranking_draw = 0xffffffff, posterior_draw = 0xfffffffe, renoise_draw = 0xfffffffd;

// The draws of one position in one step; the rest of the counter is the token.
struct Stream {
    Stream(int64_t seed, int64_t offset, int64_t step, int64_t position)
        : key0(uint32_t(uint64_t(seed))),
          key1(uint32_t(uint64_t(seed) >> 32)),
          position(uint32_t(position)),
          step(uint32_t(step)),
          offset(uint32_t(offset)) {}
    uint32_t key0, key1, position, step, offset;
};

// The words of the 4 * quads tokens from 4 * first on.
inline void philox_words(const Stream& stream, uint32_t first, int64_t quads, uint32_t* words) {
    const uint32_t key0 = stream.key0, key1 = stream.key1, position = stream.position, step = stream.step,
                   offset = stream.offset;
#pragma omp simd
    for (int64_t q = 0; q < quads; ++q) {
        uint32_t c0 = first + uint32_t(q), c1 = position, c2 = step, c3 = offset, k0 = key0, k1 = key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
            c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
            c1 = uint32_t(product1);
            c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
            c3 = uint32_t(product0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[4 * q] = c0;
        words[4 * q + 1] = c1;
        words[4 * q + 2] = c2;
        words[4 * q + 3] = c3;
    }
}

inline uint32_t philox_word(const Stream& stream, uint32_t token) {
    uint32_t words[4];
    philox_words(stream, token >> 2, 1, words);
    return words[token & 3];
}

// Strictly between 0 and 1.
inline double uniform(uint32_t word) {
    return (double(word) + 0.5) * 0x1p-32;
}

// The natural logarithm of a normal positive number to about one unit in the last place: Cephes' polynomial on
// [sqrt(1/2), sqrt(2)).
inline float log_of(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
    const float f = bit_cast<float>(bits - (uint32_t(exponent) << 23)) - 1, e = float(exponent), square = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return (f + (p * f * square - 2.12194440e-4f * e - 0.5f * square)) + 0.693359375f * e;
}

// -log(-log1p(-w)) in float; -infinity for the largest words, whose w rounds to 1.
inline float gumbel(uint32_t word) {
    const float w = (float(word) + 0.5f) * 0x1p-32f;
    const float rest = 1 - w;  // rounded; what it lost comes back to first order
    const float log1p = log_of(rest) + ((1 - rest) - w) / rest;
    const float noise = -log_of(-log1p);
    return w < 1 ? noise : -__builtin_inff();
}

// The same in double, for candidates that float cannot tell apart.
inline double exact_gumbel(uint32_t word) {
    return -::log(-::log1p(-uniform(word)));
}

}  // namespace TT_ISA
}  // namespace tt
