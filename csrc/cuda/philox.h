// Counter-based noise, as reference/philox.py defines it: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), and the Gumbel noise made from its words.
#pragma once

#include "warp.h"

// Token numbers reserved for draws that belong to a position.
constexpr unsigned ranking_draw = 0xffffffffu, posterior_draw = 0xfffffffeu, renoise_draw = 0xfffffffdu;

// The draws of one position in one step; the rest of the counter is the token.
struct Stream {
    unsigned key0, key1, position, step, offset;
};

__device__ inline Stream stream_of(int64 seed, int64 offset, int64 step, int64 position) {
    return {unsigned(uint64(seed)), unsigned(uint64(seed) >> 32), unsigned(position), unsigned(step), unsigned(offset)};
}

// The words of four tokens, from 4 * quad on.
__device__ inline uint4 philox(const Stream& stream, unsigned quad) {
    unsigned c0 = quad, c1 = stream.position, c2 = stream.step, c3 = stream.offset;
    unsigned k0 = stream.key0, k1 = stream.key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64 product0 = uint64(c0) * 0xD2511F53u, product1 = uint64(c2) * 0xCD9E8D57u;
        c0 = unsigned(product1 >> 32) ^ c1 ^ k0;
        c1 = unsigned(product1);
        c2 = unsigned(product0 >> 32) ^ c3 ^ k1;
        c3 = unsigned(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

__device__ inline unsigned philox_word(const Stream& stream, unsigned token) {
    const uint4 words = philox(stream, token >> 2);
    const unsigned lane = token & 3;
    return lane == 0 ? words.x : lane == 1 ? words.y : lane == 2 ? words.z : words.w;
}

// Strictly between 0 and 1.
__device__ inline double uniform(unsigned word) {
    return (double(word) + 0.5) * 0x1p-32;
}

// -log(-log1p(-w)); -infinity for the largest words, whose w rounds to 1.
__device__ inline float gumbel(unsigned word) {
    return -logf(-log1pf(-(float(word) + 0.5f) * 0x1p-32f));
}

// No less than the noise of a word, and for small ones larger by less than 0.06: -log(-log1p(-w)) <= -log w, and the
// logarithm of a float to base 2 is no less than what its bits say when read as a number.
__device__ inline float most_gumbel(unsigned word) {
    const float bits = float(__float_as_uint(float(word) + 0.5f));
    return 0.693148f * (32.0001f + 127 - bits * 0x1p-23f);
}

// The same as `gumbel` in double, for candidates that float cannot tell apart.
__device__ inline double exact_gumbel(unsigned word) {
    return -log(-log1p(-uniform(word)));
}
