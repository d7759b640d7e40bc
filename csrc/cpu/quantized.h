// Products of quantized matrices with a few rows of activations, per instruction set (see isa.h).
//
//     out[m][r] = sum over groups g of scale[r][g] * (sum over i of g of code[r][i] * x[m][i])
//
// As skinny.h, this is the reading of weights; they are read as they are stored, and codes become operands in
// registers. A code is exact in bfloat16, so with bfloat16 activations the pairs of AVX512-BF16 and Arm multiply codes,
// and a group's sum is scaled in float; elsewhere codes are floats. Nothing is rounded but sums.
//
// A step is a vector of 32-bit words from a row: 8 columns in each lane of 4-bit codes, 4 of 8-bit ones. An operand
// takes the same column (or pair of columns) of every lane, so x is kept in that order, and a lane belongs to one
// group, for groups are of 16 columns or more: the sums of a step times one vector of scales.
//
// The order of a sum depends on the step alone, not on the rows of x or their number: a row's bits are its own.
#pragma once

#include <type_traits>

#include "moe_schedule.h"
#include "packed_weight.h"
#include "parallel.h"
#include "rounding.h"
#include "skinny.h"

namespace tt {
namespace TT_ISA {

// Tags in the place of a weight's type: codes of four or eight bits, multiplied as pairs of bfloat16 or as floats.
template <int bits, bool pairs>
struct Codes {};

#if defined(TT_BF16_DOT)
template <int bits, class T>
using CodesFor = Codes<bits, std::is_same<T, bf16>::value>;
#else
template <int bits, class T>
using CodesFor = Codes<bits, false>;
#endif

template <bool pairs>
struct CodeOperand {
    using type = FloatVector;
};
template <>
struct CodeOperand<true> {
    using type = WordVector;
};

template <int bits, bool pairs>
struct Factors<float, Codes<bits, pairs>> {
    static constexpr int in_word = 32 / bits;                    // columns
    static constexpr int step = lanes_of<float> * in_word;       // columns
    static constexpr int parts = pairs ? in_word / 2 : in_word;  // operands
    static constexpr int bytes = TT_VECTOR_BYTES;                // of a row's codes
    using Kept = typename std::conditional<pairs, bf16, float>::type;
    using Operand = typename CodeOperand<pairs>::type;
    static int place(int i) {
        const int lane = i / in_word, column = i % in_word;
        return pairs ? column / 2 * (2 * lanes_of<float>)+2 * lane + column % 2 : column * lanes_of<float> + lane;
    }
    static Kept kept(float x) {
        if constexpr (pairs)
            return {uint16_t(bit_cast<uint32_t>(x) >> 16)};
        else
            return x;
    }
    static void add(FloatVector& sum, Operand w, Operand x) {
#if defined(TT_BF16_DOT)
        if constexpr (pairs)
            sum = bf16_dot(sum, w, x);
        else
#endif
            sum += w * x;
    }
};

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
    if (s.dtype == DType::byte) {
        const uint8_t* from = s.as<uint8_t>() + offset;
        const float whole = w.whole ? w.whole.as<float>()[expert * w.whole.stride[0]] : 0;
        for (int64_t i = 0; i < count; i += lanes) {
            uint8_t some[lanes] = {};
            std::memcpy(some, from + i, size_t(smaller(lanes, count - i)));
            const WordVector words = widened_bytes(some);
            // An exponent of 0 is 2^-127, which is subnormal.
            const FloatVector powers = FloatVector(words == 0u ? WordVector{} + 0x400000u : words << 23);
            const FloatVector scale = w.whole ? e4m3(words) * whole : powers;
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

// --- products -------------------------------------------------------------------------------------------------------

// R rows of codes, and their scales.
template <int R>
struct CodeRows {
    const char* words[R];
    const float* scales[R];  // null: one for the whole row, by which sums are multiplied in the end
};

// A step's words of a row with n columns; behind them codes of 0.
template <PackedWeight::Format format, class F>
inline WordVector words_of(const char* row, int64_t step, int64_t n) {
    const char* from = row + step * F::bytes;
    if ((step + 1) * F::step <= n) return unaligned<WordVector>(from);
    char rest[F::bytes];
    std::memset(rest, format == PackedWeight::int4 ? 0x88 : 0, sizeof(rest));
    std::memcpy(rest, from, size_t((n - step * F::step) * F::bytes / F::step));
    return unaligned<WordVector>(rest);
}

// total[r][m] += the products of a step's codes with the panel's M rows from `first` on.
template <PackedWeight::Format format, int R, int M, class Q>
[[gnu::always_inline]] inline void add_step(const WordVector (&words)[R], const typename Factors<float, Q>::Kept* x,
                                            FloatVector (&sums)[R][M]) {
    using F = Factors<float, Q>;
    constexpr bool pairs = !std::is_same<typename F::Kept, float>::value;
#pragma GCC unroll 8
    for (int part = 0; part < F::parts; ++part) {
        typename F::Operand row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = operand<format, pairs>(words[r], part);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            auto column = unaligned<typename F::Operand>(x + m * F::step + part * (F::step / F::parts));
            if (R > 1) in_register(column);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) F::add(sums[r][m], row[r], column);
        }
    }
}

template <PackedWeight::Format format, int R, int M, class Q>
[[gnu::noinline]] void add_code_rows(const CodeRows<R>& w, const LaneScales& lanes, const Panel<float, Q>& x, int first,
                                     int64_t n, Prefetch& ahead, FloatVector* total) {
    using F = Factors<float, Q>;
    FloatVector all[R][M] = {};
    const typename F::Kept* from = x.at(first, 0);
    const int64_t x_step = x.count * F::step;
    const auto add = [&](const WordVector(&words)[R], int64_t i) {
        if (w.scales[0] == nullptr) return add_step<format, R, M, Q>(words, from, all);
        FloatVector sums[R][M] = {};
        add_step<format, R, M, Q>(words, from, sums);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const FloatVector scale = lanes.at(w.scales[r], i);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) all[r][m] += scale * sums[r][m];
        }
    };
#pragma GCC unroll 1
    for (int64_t step = 0; step * F::step < n; ++step, from += x_step) {
        ahead.fetch();
        WordVector words[R];
        for (int r = 0; r < R; ++r) words[r] = words_of<format, F>(w.words[r], step, n);
        add(words, step * F::step);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r * x.count + m] = all[r][m];
}

// With more rows of x than a tile has, codes become operands once for all tiles: those of a stretch of steps,
// [step][part][row]. All rows of w go over a stretch before the next, so that x's stays in the first-level cache.
constexpr int widest_tile = vector_registers == 32 ? 6 : 2;  // rows of x
constexpr int decoded_rows = 2, decoded_steps = 4;

template <PackedWeight::Format format, class Q>
[[gnu::noinline]] void decode(const CodeRows<decoded_rows>& w, int64_t begin, int64_t end, int64_t n,
                              typename Factors<float, Q>::Operand* to) {
    using F = Factors<float, Q>;
    constexpr bool pairs = !std::is_same<typename F::Kept, float>::value;
    for (int64_t step = begin; step < end; ++step)
        for (int r = 0; r < decoded_rows; ++r) {
            const WordVector words = words_of<format, F>(w.words[r], step, n);
#pragma GCC unroll 8
            for (int part = 0; part < F::parts; ++part)
                to[((step - begin) * F::parts + part) * decoded_rows + r] = operand<format, pairs>(words, part);
        }
}

// As add_code_rows, for the steps [begin, end), on from what total holds.
template <int M, class Q>
[[gnu::noinline]] void add_decoded_rows(const typename Factors<float, Q>::Operand* w,
                                        const float* const (&scales)[decoded_rows], const LaneScales& lanes,
                                        const Panel<float, Q>& x, int first, int64_t begin, int64_t end,
                                        FloatVector* total) {
    using F = Factors<float, Q>;
    constexpr int R = decoded_rows;
    FloatVector all[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) all[r][m] = total[r * x.count + m];
    const auto add = [&](const typename F::Kept* from, FloatVector(&to)[R][M]) {
#pragma GCC unroll 8
        for (int part = 0; part < F::parts; ++part, w += R)
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                auto column = unaligned<typename F::Operand>(from + m * F::step + part * (F::step / F::parts));
                in_register(column);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) F::add(to[r][m], w[r], column);
            }
    };
    for (int64_t step = begin; step < end; ++step) {
        const typename F::Kept* from = x.at(first, step * F::step);
        if (scales[0] == nullptr) {
            add(from, all);
            continue;
        }
        FloatVector sums[R][M] = {};
        add(from, sums);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            const FloatVector scale = lanes.at(scales[r], step * F::step);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) all[r][m] += scale * sums[r][m];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r * x.count + m] = all[r][m];
}

// For the steps [begin, end) of two rows, which are a stretch.
template <PackedWeight::Format format, class Q>
void add_decoded(const CodeRows<decoded_rows>& w, const LaneScales& lanes, const Panel<float, Q>& x, int64_t n,
                 int64_t begin, int64_t end, FloatVector* total) {
    using F = Factors<float, Q>;
    const int count = int(x.count), tiles = (count + widest_tile - 1) / widest_tile;
    typename F::Operand codes[decoded_steps * F::parts * decoded_rows];
    decode<format, Q>(w, begin, end, n, codes);
    for (int t = 0; t < tiles; ++t) {
        const int first = count * t / tiles;
        FloatVector* to = total + first;
        switch (count * (t + 1) / tiles - first) {
            case 1: add_decoded_rows<1>(codes, w.scales, lanes, x, first, begin, end, to); break;
            case 2: add_decoded_rows<2>(codes, w.scales, lanes, x, first, begin, end, to); break;
            case 3:
                if constexpr (widest_tile > 2) add_decoded_rows<3>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            case 4:
                if constexpr (widest_tile > 2) add_decoded_rows<4>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            case 5:
                if constexpr (widest_tile > 2) add_decoded_rows<5>(codes, w.scales, lanes, x, first, begin, end, to);
                break;
            default:
                if constexpr (widest_tile > 2) add_decoded_rows<6>(codes, w.scales, lanes, x, first, begin, end, to);
        }
    }
}

template <PackedWeight::Format format, int R, class Q>
void add_tiles(const CodeRows<R>& w, const LaneScales& lanes, const Panel<float, Q>& x, int64_t n, Prefetch& ahead,
               FloatVector* total) {
    constexpr int tile = vector_registers == 32 ? R == 4 ? 2 : 6 : R == 1 ? 4 : 2;
    const int count = int(x.count), tiles = (count + tile - 1) / tile;
    for (int t = 0; t < tiles; ++t) {
        const int first = count * t / tiles;
        FloatVector* to = total + first;
        switch (count * (t + 1) / tiles - first) {
            case 1: add_code_rows<format, R, 1>(w, lanes, x, first, n, ahead, to); break;
            case 2: add_code_rows<format, R, 2>(w, lanes, x, first, n, ahead, to); break;
            case 3:
                if constexpr (tile > 2) add_code_rows<format, R, 3>(w, lanes, x, first, n, ahead, to);
                break;
            case 4:
                if constexpr (tile > 2) add_code_rows<format, R, 4>(w, lanes, x, first, n, ahead, to);
                break;
            case 5:
                if constexpr (tile > 4) add_code_rows<format, R, 5>(w, lanes, x, first, n, ahead, to);
                break;
            default:
                if constexpr (tile > 4) add_code_rows<format, R, 6>(w, lanes, x, first, n, ahead, to);
        }
    }
}

// A quantized matrix per expert, or one.
template <int bits, bool pairs>
struct Stored<Codes<bits, pairs>> {
    struct Rows {
        const PackedWeight* of;
        int64_t expert, first;
        const char* words(int64_t r) const {
            const View& d = of->data;
            const int rows = d.ndim - 2;
            return d.as<char>() + (rows ? expert * d.stride[0] : 0) + (first + r) * d.stride[rows];
        }
    };
    const PackedWeight& w;
    int64_t experts() const { return w.data.size[0]; }
    int64_t rows() const { return w.data.size[w.data.ndim - 2]; }
    int64_t columns() const { return w.columns; }
    Rows from(int64_t expert, int64_t row) const { return {&w, expert, row}; }
};

template <PackedWeight::Format format, class Q>
void multiply_codes(const typename Stored<Q>::Rows& w, int rows, const Panel<float, Q>& x, int64_t n,
                    const typename Stored<Q>::Rows& next, float* out) {
    using F = Factors<float, Q>;
    constexpr int64_t most = 336, few = skinny_rows * (most + lanes_of<float>);  // scales that the stack has room for
    const int64_t groups = (n + w.of->group - 1) / w.of->group, row = groups + lanes_of<float>;
    FloatVector total[skinny_rows * skinny_panel];
    const LaneScales lanes(w.of->group, F::in_word, F::step);
    const bool wanted = next.first != w.first || next.expert != w.expert || next.of != w.of;
    const char* first_line = next.words(0);
    Prefetch ahead = {first_line, wanted ? next.words(rows) : first_line, 1};
    float few_scales[few];
    Scratch<float> many_scales(groups > most ? skinny_rows : 0, row);
    float* scales = groups > most ? static_cast<float*>(many_scales) : few_scales;
    for (int r = 0; r < rows; ++r) load_scales(*w.of, w.expert, w.first + r, groups, scales + r * row);
    const auto rows_from = [&](int r, auto count) {
        constexpr int R = decltype(count)::value;
        CodeRows<R> some;
        for (int i = 0; i < R; ++i) {
            const int from = smaller(r + i, rows - 1);
            some.words[i] = w.words(from);
            some.scales[i] = groups > 1 ? scales + from * row : nullptr;
        }
        return some;
    };
    if (x.count > widest_tile) {
        const int64_t steps = (n + F::step - 1) / F::step;
        for (int i = 0; i < (rows + 1) / 2 * 2 * x.count; ++i) total[i] = FloatVector{};
        for (int64_t begin = 0; begin < steps; begin += decoded_steps)
            for (int r = 0; r < rows; r += decoded_rows)  // of an odd number the last one twice
                add_decoded<format, Q>(rows_from(r, std::integral_constant<int, decoded_rows>()), lanes, x, n, begin,
                                       smaller<int64_t>(steps, begin + decoded_steps), total + r * x.count);
    } else {
        const auto add = [&](int r, auto count) {
            constexpr int R = decltype(count)::value;
            ahead.lines = R;
            add_tiles<format, R>(rows_from(r, count), lanes, x, n, ahead, total + r * x.count);
        };
        int r = 0;
        if (vector_registers == 32 && x.count <= 2)
            for (; r + 4 <= rows; r += 4) add(r, std::integral_constant<int, 4>());
        for (; r + 2 <= rows; r += 2) add(r, std::integral_constant<int, 2>());
        for (; r < rows; ++r) add(r, std::integral_constant<int, 1>());
    }
    add_lanes<float>(total, rows, int(x.count), out);
    if (groups > 1) return;
    for (int64_t m = 0; m < x.count; ++m)
        for (int i = 0; i < rows; ++i) out[m * skinny_rows + i] *= scales[i * row];
}

template <int bits, bool pairs>
inline void multiply_rows(const typename Stored<Codes<bits, pairs>>::Rows& w, int rows,
                          const Panel<float, Codes<bits, pairs>>& x, int64_t n,
                          const typename Stored<Codes<bits, pairs>>::Rows& next, float* out) {
    if constexpr (bits == 4)
        w.of->format == PackedWeight::int4 ? multiply_codes<PackedWeight::int4>(w, rows, x, n, next, out)
                                           : multiply_codes<PackedWeight::e2m1>(w, rows, x, n, next, out);
    else
        w.of->format == PackedWeight::int8 ? multiply_codes<PackedWeight::int8>(w, rows, x, n, next, out)
                                           : multiply_codes<PackedWeight::fp8>(w, rows, x, n, next, out);
}

}  // namespace TT_ISA
}  // namespace tt
