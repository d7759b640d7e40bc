#include "cpu/isa.h"

namespace tt {

namespace {
Isa detect() {
    Isa best = Isa::baseline;
#if defined(TT_HAS_AVX2)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return best;
    best = Isa::avx2;
#endif
#if defined(TT_HAS_AVX512)
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return best;
    best = Isa::avx512;
#endif
#if defined(TT_HAS_AVX512BF16)
    if (__builtin_cpu_supports("avx512bf16")) best = Isa::avx512bf16;
#endif
    return best;
}
Isa chosen = detect();
}  // namespace

Isa best_isa() {
    return detect();
}
Isa isa() {
    return chosen;
}
void set_isa(Isa isa) {
    chosen = isa;
}

const char* isa_name(Isa isa) {
#if defined(TT_EMULATE)
    if (isa == Isa::baseline) return "avx512bf16, emulated";
#endif
#define TT_NAME(name) #name,
    static const char* names[] = {TT_EACH_ISA(TT_NAME)};
#undef TT_NAME
    return names[static_cast<int>(isa)];
}

}  // namespace tt
