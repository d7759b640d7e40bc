// Counter-based noise: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and the Gumbel noise made from its words, as reference/philox.py defines them. Loops over tokens vectorise.
//
// Most tokens of a large vocabulary are only asked whether their word is small, for small words make large noise. That
// question has its own loop, which keeps nothing: words in the low halves of 64-bit lanes, where a product takes one
// instruction and its high half one shift, and where nobody minds what the high halves hold. Three rounds are shorter,
// as three of the four words of the counter are the same for all tokens: 70 instructions for 16 tokens with AVX2. On a
// Zen 3 at 3 GHz, three counters' instructions in turn take 7.6 ns, one after the other 11.8 ns; four in turn, for
// which there are too few registers, 8.0 ns. Words that are stored in their tokens' order take 37 ns.
#pragma once

#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

// The products of the low halves of lanes.
inline LongVector times(LongVector a, uint32_t b) {
    const LongVector by = LongVector{} + b;
#if defined(__AVX512F__)
    return (LongVector)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)by);
#elif defined(__AVX2__) && TT_VECTOR_BYTES == 32
    return (LongVector)_mm256_mul_epu32((__m256i)a, (__m256i)by);
#elif defined(__SSE2__) && TT_VECTOR_BYTES == 16
    return (LongVector)_mm_mul_epu32((__m128i)a, (__m128i)by);
#else
    return (a & 0xffffffffu) * by;
#endif
}

// Whether a lane of a comparison is true.
template <class V>
inline bool any(V truths) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)truths, (__m512i)truths) != 0;
#elif defined(__AVX2__) && TT_VECTOR_BYTES == 32
    return !_mm256_testz_si256((__m256i)truths, (__m256i)truths);
#elif defined(__SSE2__) && TT_VECTOR_BYTES == 16
    return _mm_movemask_epi8((__m128i)truths) != 0;
#else
    uint64_t found = 0;
    for (int i = 0; i < lanes_of<double>; ++i) found |= ((LongVector)truths)[i];
    return found != 0;
#endif
}

// The search for small words among the tokens of one position.
class SmallWords {
   public:
    explicit SmallWords(const Stream& stream) {
        const auto everywhere = [](uint32_t x) { return LongVector{} + x; };
        uint32_t k0 = stream.key0, k1 = stream.key1;
        for (int round = 0; round < 10; ++round) {
            key0_[round] = everywhere(k0), key1_[round] = everywhere(k1);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        // What the first rounds make of the words that all tokens share.
        const uint64_t step = uint64_t(stream.step) * multiplier1;
        const uint64_t shared = uint64_t(uint32_t(step >> 32) ^ stream.position ^ stream.key0) * multiplier0;
        after_first_ = key1_[0] ^ stream.offset;
        c0_ = key0_[1] ^ uint32_t(step);
        c2_ = key1_[1] ^ uint32_t(shared >> 32);
        after_third_ = key1_[2] ^ uint32_t(shared);
    }

    // f(token, word) for the words below `limit` (at least 1) of the tokens from 4 * first to 4 * (first + quads), in
    // their order; perhaps also for a few tokens behind.
    template <class F>
    void below(uint32_t limit, uint32_t first, int64_t quads, F f) const {
        constexpr int lanes = TT_VECTOR_BYTES / 8, all = chains * lanes;
        const LongVector most = LongVector{} + (limit - 1);  // and 0 in the high halves, so that they hardly ever count
        LongVector count;
        for (int i = 0; i < lanes; ++i) count[i] = uint64_t(i);
        for (int64_t q = 0; q < quads; q += all) {
            LongVector words[4][chains];
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j) words[0][j] = count + uint64_t(first + uint32_t(q + j * lanes));
            compute(words[0], words[1], words[2], words[3]);
            WordVector least[chains];
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j)
                least[j] = smaller_of(smaller_of((WordVector)words[0][j], (WordVector)words[1][j]),
                                      smaller_of((WordVector)words[2][j], (WordVector)words[3][j]));
            WordVector least_of_all = least[0];
#pragma GCC unroll 4
            for (int j = 1; j < chains; ++j) least_of_all = smaller_of(least_of_all, least[j]);
            if (!any(smaller_of(least_of_all, (WordVector)most) == least_of_all)) continue;
            for (int j = 0; j < chains; ++j) {
                if (!any(smaller_of(least[j], (WordVector)most) == least[j])) continue;
                for (int i = 0; i < 4 * lanes; ++i) {
                    const uint32_t word = uint32_t(words[i & 3][j][i / 4]);
                    if (word < limit) f(4 * (int64_t(first) + q + j * lanes) + i, word);
                }
            }
        }
    }

   private:
    static constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
    // Counters at a time, whose instructions alternate: each waits for the one before, and a processor does not look
    // far enough ahead to find the next counter's by itself.
    static constexpr int chains = 3;

    static WordVector smaller_of(WordVector a, WordVector b) { return a < b ? a : b; }

    // From the counters' first words, in low halves, to all four words.
    inline __attribute__((always_inline)) void compute(LongVector* c0, LongVector* c1, LongVector* c2,
                                                       LongVector* c3) const {
        LongVector p[chains], r[chains];
#pragma GCC unroll 4
        for (int j = 0; j < chains; ++j) {
            p[j] = times(c0[j], multiplier0);
            r[j] = times((p[j] >> 32) ^ after_first_, multiplier1);
            c0[j] = (r[j] >> 32) ^ c0_, c1[j] = r[j], c2[j] = p[j] ^ c2_;
        }
#pragma GCC unroll 4
        for (int j = 0; j < chains; ++j) {
            p[j] = times(c0[j], multiplier0), r[j] = times(c2[j], multiplier1);
            c0[j] = (r[j] >> 32) ^ c1[j] ^ key0_[2], c2[j] = (p[j] >> 32) ^ after_third_;
            c1[j] = r[j], c3[j] = p[j];
        }
#pragma GCC unroll 7
        for (int i = 3; i < 10; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j) p[j] = times(c0[j], multiplier0);
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j) r[j] = times(c2[j], multiplier1);
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j) c0[j] = (r[j] >> 32) ^ (c1[j] ^ key0_[i]), c1[j] = r[j];
#pragma GCC unroll 4
            for (int j = 0; j < chains; ++j) c2[j] = (p[j] >> 32) ^ (c3[j] ^ key1_[i]), c3[j] = p[j];
        }
    }

    LongVector key0_[10], key1_[10], after_first_, c0_, c2_, after_third_;  // the same in all lanes
};

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

// No less than the noise of a word, by less than 0.06: -log(-log1p(-w)) <= -log w, and the logarithm of a float to base
// 2 is no less than what its bits say when read as a number.
inline float most_gumbel(uint32_t word) {
    const uint32_t bits = bit_cast<uint32_t>(float(word) + 0.5f);
    return 0.693148f * (32.0001f + 127 - float(bits) * 0x1p-23f);
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
