#include "cpu/isa.h"

namespace tt {

namespace {
Isa detect() {
#if defined(__x86_64__) && !defined(TT_BASELINE_ONLY)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
    if (v4 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
    if (v4) return Isa::avx512;
    if (v3) return Isa::avx2;
#endif
    return Isa::baseline;
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
