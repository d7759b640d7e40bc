#include "cpu/isa.h"

#if defined(TT_HAS_AMX) && !defined(TT_EMULATE)
#include <cpuid.h>

namespace tt {

// That the processor has AMX's tiles with bfloat16, and that the system keeps them when threads change.
bool processor_has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    unsigned kept, high;
    asm volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    constexpr unsigned configuration_and_tiles = 3u << 17, bf16_and_tile = 1u << 22 | 1u << 24;
    if ((kept & configuration_and_tiles) != configuration_and_tiles) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tile) != bf16_and_tile) return false;
    // Palette 1: eight tiles of 16 rows of 64 bytes, so far on every processor.
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    return (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;
}

}  // namespace tt
#endif
