// Codes of quantized weights and their scales as operands of products, per instruction set (see isa.h). What codes
// stand for: reference/quantization.py.
#pragma once

#include "packed_weight.h"
#include "rounding.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

// --- codes ----------------------------------------------------------------------------------------------------------

inline FloatVector floats(WordVector integers) {
    return __builtin_convertvector((IntVector)integers, FloatVector);
}

// e2m1's magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, with their signs where there are lanes for them.
inline FloatVector e2m1(WordVector code) {  // of 4 bits
#if !defined(__clang__) && TT_VECTOR_BYTES == 64
    const FloatVector all = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
    return __builtin_shuffle(all, (IntVector)code);
#else
    const WordVector magnitude = code & 7u;
    // An exponent and half a mantissa, but for the smallest two.
    const FloatVector normal = FloatVector((magnitude << 22) + (126u << 23)), small = floats(magnitude) * 0.5f;
    return FloatVector(WordVector(magnitude < 2u ? small : normal) | ((code & 8u) << 28));
#endif
}

inline FloatVector e4m3(WordVector code) {  // of 8 bits; 127 is NaN
    const WordVector magnitude = code & 127u;
    const FloatVector normal = FloatVector((magnitude << 20) + (120u << 23)), small = floats(magnitude) * 0x1p-9f;
    const WordVector value = WordVector(magnitude < 8u ? small : normal);
    return FloatVector((magnitude == 127u ? WordVector{} + 0x7fc00000u : value) | ((code & 128u) << 24));
}

// The codes in one place of every word.
template <PackedWeight::Format format>
inline FloatVector codes(WordVector words, int place) {
    switch (format) {
        case PackedWeight::int8: return floats((WordVector)((IntVector)(words << (24 - 8 * place)) >> 24));
        case PackedWeight::int4: return floats((words >> (4 * place)) & 15u) - 8.0f;
        case PackedWeight::fp8: return e4m3((words >> (8 * place)) & 255u);
        case PackedWeight::e2m1: return e2m1((words >> (4 * place)) & 15u);
    }
    return FloatVector{};
}

#if defined(TT_BF16_DOT)
#if TT_VECTOR_BYTES == 64 && !defined(__clang__) && !defined(TT_EMULATE)
#define TT_LOOK_UP
typedef uint16_t ShortVector __attribute__((vector_size(64), may_alias));
// What codes of 4 bits are in bfloat16, twice: of an index the lowest 5 bits count.
template <PackedWeight::Format format>
inline ShortVector look_up(ShortVector index) {
#define TT_TWICE(...)            \
    ShortVector {                \
        __VA_ARGS__, __VA_ARGS__ \
    }
    const ShortVector int4 = TT_TWICE(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000,
                                      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const ShortVector e2m1 = TT_TWICE(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
                                      0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0);
#undef TT_TWICE
    return __builtin_shuffle(format == PackedWeight::int4 ? int4 : e2m1, index);
}
#endif

#if defined(TT_LOOK_UP)
// e4m3's magnitudes in bfloat16.
struct Magnitudes {
    alignas(64) uint16_t of[128];
    constexpr Magnitudes() : of() {
        for (int code = 1; code < 127; ++code) {
            int exponent = code >> 3, mantissa = code & 7;
            if (exponent == 0)  // subnormal: the highest bit of the mantissa is the leading one
                for (exponent = 1; !(mantissa & 8); --exponent) mantissa <<= 1;
            of[code] = uint16_t((exponent + 120) << 7 | (mantissa & 7) << 4);
        }
        of[127] = 0x7fc0;
    }
};
inline WordVector e4m3_pairs(WordVector words, int pair) {
    static constexpr Magnitudes magnitudes;
    const WordVector low = pair == 0 ? words : words >> 16, high = pair == 0 ? words << 8 : words >> 8;
    const ShortVector code = (ShortVector)((low & 0xffu) | (high & 0xff0000u));
    ShortVector quarters[4];
    for (int q = 0; q < 4; ++q) quarters[q] = unaligned<ShortVector>(magnitudes.of + 32 * q);
    const ShortVector lower = __builtin_shuffle(quarters[0], quarters[1], code);  // by its lowest 6 bits
    const ShortVector upper = __builtin_shuffle(quarters[2], quarters[3], code);
    const ShortVector size = (code & 64) != 0 ? upper : lower;
    return (WordVector)(size | ((code & 128) << 8));
}
#endif

// The codes of columns 2 * pair and 2 * pair + 1 of every word, as bfloat16 in its lower and upper half.
template <PackedWeight::Format format>
inline WordVector code_pairs(WordVector words, int pair) {
#if defined(TT_LOOK_UP)
    if constexpr (format == PackedWeight::fp8) return e4m3_pairs(words, pair);
    if constexpr (format == PackedWeight::int4 || format == PackedWeight::e2m1) {
        const WordVector low = words >> (8 * pair), high = pair == 0 ? words << 12 : pair == 1 ? words << 4 : low << 12;
        return (WordVector)look_up<format>((ShortVector)((low & 0xffffu) | (high & 0xffff0000u)));
    }
#endif
    const WordVector even = WordVector(codes<format>(words, 2 * pair));
    const WordVector odd = WordVector(codes<format>(words, 2 * pair + 1));
    return (even >> 16) | (odd & 0xffff0000u);
}
#endif

template <PackedWeight::Format format, bool pairs>
inline auto operand(WordVector words, int part) {
#if defined(TT_BF16_DOT)
    if constexpr (pairs)
        return code_pairs<format>(words, part);
    else
#endif
        return codes<format>(words, part);
}

// --- scales ---------------------------------------------------------------------------------------------------------

inline WordVector widened_bytes(const uint8_t* from) {
#if TT_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (WordVector)_mm512_maskz_cvtepu8_epi32(0xffff, unaligned<__m128i>(from));
#elif TT_VECTOR_BYTES == 32
    return (WordVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    WordVector words{};
    for (int l = 0; l < lanes_of<float>; ++l) words[l] = from[l];
    return words;
#endif
}

// The scales of one row, `count` of them, as floats; behind them as many zeros as a vector has lanes.
inline void load_scales(const PackedWeight& w, int64_t expert, int64_t row, int64_t count, float* out) {
    const View& s = w.scales;
    const int d = s.ndim - 2;  // of the rows
    const int64_t offset = (d ? expert * s.stride[0] : 0) + row * s.stride[d], lanes = lanes_of<float>;
    if (s.dtype == DType::byte || s.dtype == DType::float8) {
        const bool exponents = s.dtype == DType::byte;
        const uint8_t* from = s.as<uint8_t>() + offset;
        const float whole = w.whole ? w.whole.as<float>()[expert * w.whole.stride[0]] : 1;
        for (int64_t i = 0; i < count; i += lanes) {
            uint8_t some[lanes] = {};
            std::memcpy(some, from + i, size_t(smaller(lanes, count - i)));
            const WordVector words = widened_bytes(some);
            // An exponent of 0 is 2^-127, which is subnormal.
            const FloatVector powers = FloatVector(words == 0u ? WordVector{} + 0x400000u : words << 23);
            const FloatVector scale = exponents ? powers : e4m3(words) * whole;
            std::memcpy(out + i, &scale, sizeof(scale));
        }
    } else if (s.dtype == DType::bfloat16) {
        const bf16* from = s.as<bf16>() + offset;
        for_vectors<float>(count,
                           [=](int64_t i, auto n) { store_some<float>(out + i, load_some<float>(from + i, n), n); });
    } else {
        std::memcpy(out, s.as<float>() + offset, size_t(count) * sizeof(float));
    }
    if (count == 0) out[0] = 0;
    for (int64_t l = 0; l < lanes; ++l) out[count + l] = 0;
}

inline FloatVector spread(FloatVector from, IntVector lane) {
#if defined(__clang__)
    FloatVector to;
    for (int i = 0; i < lanes_of<float>; ++i) to[i] = from[lane[i]];
    return to;
#else
    return __builtin_shuffle(from, lane);
#endif
}

// Which scale each lane of a step takes. Where a row has several, their groups are of a power of 2 columns.
struct LaneScales {
    IntVector lane;
    int shift;
    bool shared;  // by all lanes
    LaneScales(int64_t group, int in_word, int step)
        : lane{}, shift(__builtin_ctzll(uint64_t(group))), shared(group >= step) {
        if (!shared)
            for (int l = 0; l < lanes_of<float>; ++l) lane[l] = int32_t(l * in_word / group);
    }
    FloatVector at(const float* scales, int64_t column) const {
        const float* from = scales + (column >> shift);
        return shared ? *from - FloatVector{} : spread(unaligned<FloatVector>(from), lane);
    }
};

}  // namespace TT_ISA
}  // namespace tt
