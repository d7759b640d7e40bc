// AMX, Intel's matrix unit: eight tiles of 16 rows by 64 bytes, and products of them. Kernels that use it stand under
// `#if defined(TT_AMX)`, which the instruction set `amx` alone defines (setup.py).
//
//     sums[m][n] += sum over k < 16 of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]
//
// sums: 16 x 16 floats. a: 16 rows of 32 bfloat16 numbers, as a matrix lies in memory. b: a row holds a pair of numbers
// for each of 16 columns, the even one first.
//
// The order of summation, which the emulation keeps (Intel's Software Developer's Manual, TDPBF16PS): for each of the
// 256 sums, the even products are added up in ascending k, and apart from them the odd ones, each by one fused
// multiply-add that starts from 0; then the odd sum is added to the even one, and that to what stood in `sums`. All is
// rounded to the nearest, ties to even; subnormal numbers are zeros, those that come in and those that come out.
// Columns do not meet, nor do rows: what is in one that is not used does not matter.
//
// Timing (Intel's Optimization Reference Manual, chapter on AMX): a product starts every 16 cycles, 1024 multiply-adds
// a cycle; a tile loads in 8 cycles from the first-level cache, its 16 rows by two ports; a store takes 16.
//
// A thread has one configuration of its tiles, and the threads are PyTorch's, where oneDNN keeps another. So each piece
// of a thread's work that uses tiles begins with a `Tiles`, which at its end puts back the configuration it found; the
// tiles' contents are not kept, which nobody expects of another's code. Where there was none, the tiles are released:
// a thread with tiles in use costs more at each switch of threads, and keeps its core from deep sleep.
#pragma once

#include <cstdint>

#if defined(TT_AMX)
#if defined(TT_EMULATE)
#include "flushed_fma.h"
#endif

namespace tt {
namespace TT_ISA {

constexpr int tile_height = 16, tile_bytes = 64;  // rows, and bytes of a row

struct TileConfiguration {  // as ldtilecfg reads it
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    static TileConfiguration whole() {  // eight tiles of the full size
        TileConfiguration whole;
        whole.palette = 1;
        for (int t = 0; t < 8; ++t) whole.row_bytes[t] = tile_bytes, whole.rows[t] = tile_height;
        return whole;
    }
};
static_assert(sizeof(TileConfiguration) == 64, "ldtilecfg reads 64 bytes");

// Tiles are numbered at compile time. Memory is [16 rows] of 64 bytes, `stride` bytes from one to the next.
#if !defined(TT_EMULATE)

// Own assembly: the intrinsics of GCC 12 do not tell the compiler that they read memory.
inline void load_configuration(const TileConfiguration& from) {
    asm volatile("ldtilecfg %0" ::"m"(from));
}
inline void store_configuration(TileConfiguration& to) {
    asm volatile("sttilecfg %0" : "=m"(to));
}
inline void release_tiles() {
    asm volatile("tilerelease");
}
template <int tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sums, int a, int b>
inline void tile_dot() {
    static_assert(sums != a && sums != b && a != b, "three different tiles");
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

#else

static_assert(TT_VECTOR_BYTES == 64, "a vector is a tile's row");

struct EmulatedTiles {
    TileConfiguration configuration;
    WordVector rows[8][tile_height];
    // As the processor, which ends a program that uses tiles without a configuration.
    WordVector* at(int tile) {
        if (configuration.palette != 1) __builtin_trap();
        return rows[tile];
    }
};
inline EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}
inline void load_configuration(const TileConfiguration& from) {
    emulated_tiles() = {from, {}};
}
inline void store_configuration(TileConfiguration& to) {
    to = emulated_tiles().configuration;
}
inline void release_tiles() {
    emulated_tiles() = {};
}
template <int tile>
inline void tile_zero() {
    WordVector* rows = emulated_tiles().at(tile);
    for (int m = 0; m < tile_height; ++m) rows[m] = WordVector{};
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    WordVector* rows = emulated_tiles().at(tile);
    for (int m = 0; m < tile_height; ++m) rows[m] = unaligned<WordVector>(static_cast<const char*>(from) + m * stride);
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    const WordVector* rows = emulated_tiles().at(tile);
    for (int m = 0; m < tile_height; ++m) std::memcpy(static_cast<char*>(to) + m * stride, &rows[m], tile_bytes);
}
[[gnu::noinline]] inline void emulated_dot(WordVector* sums, const WordVector* a, const WordVector* b) {
    for (int m = 0; m < tile_height; ++m) {
        FloatVector even{}, odd{};
        for (int k = 0; k < 16; ++k) {
            const WordVector pair = a[m][k] - WordVector{};
            even = flushed_fma(pair << 16, b[k] << 16, even);
            odd = flushed_fma(pair & 0xffff0000u, b[k] & 0xffff0000u, odd);
        }
        sums[m] = (WordVector)flushed(flushed((FloatVector)sums[m]) + flushed(even + odd));
    }
}
template <int sums, int a, int b>
inline void tile_dot() {
    static_assert(sums != a && sums != b && a != b, "three different tiles");
    EmulatedTiles& tiles = emulated_tiles();
    emulated_dot(tiles.at(sums), tiles.at(a), tiles.at(b));
}

#endif

// This thread's tiles in the full size, for the time of a scope.
class Tiles {
   public:
    Tiles() {
        store_configuration(before_);
        load_configuration(TileConfiguration::whole());
    }
    ~Tiles() {
        if (before_.palette == 0)
            release_tiles();
        else
            load_configuration(before_);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    TileConfiguration before_;
};

}  // namespace TT_ISA
}  // namespace tt
#endif
