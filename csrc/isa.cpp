#include "cpu/isa.h"

#if defined(TT_HAS_NEONBF16) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(TT_HAS_NEONBF16) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(TT_HAS_AMX) && !defined(TT_EMULATE)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tt {

namespace {
#if defined(TT_HAS_NEONBF16)
// Whether there are bfdot and bfmmla, which no unprivileged instruction says: the system is asked.
bool has_neonbf16() {
#if defined(__linux__)
    constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16 of the kernel's uapi/asm/hwcap.h, which may be older
    return (getauxval(AT_HWCAP2) & bf16) != 0;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof(has);
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
    return false;
#endif
}
#endif
#if defined(TT_HAS_AMX) && !defined(TT_EMULATE)
// Linux gives a process the tiles' state, 8 KB a thread, when it asks for it: once, for all its threads. An old kernel
// or a sandbox refuses.
bool tiles_permitted() {
#if defined(SYS_arch_prctl)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return permitted;
#else
    return false;
#endif
}
#endif

Isa detect() {
#if defined(TT_EMULATE)
    return Isa::amx;
#else
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
    if (!__builtin_cpu_supports("avx512bf16")) return best;
    best = Isa::avx512bf16;
#endif
#if defined(TT_HAS_AMX)
    if (processor_has_amx() && tiles_permitted()) best = Isa::amx;
#endif
#if defined(TT_HAS_NEONBF16)
    if (has_neonbf16()) best = Isa::neonbf16;
#endif
    return best;
#endif
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
    static const char* names[] = {"avx512bf16, emulated", "amx, emulated"};
#else
#define TT_NAME(name) #name,
    static const char* names[] = {TT_EACH_ISA(TT_NAME)};
#undef TT_NAME
#endif
    return names[static_cast<int>(isa)];
}

}  // namespace tt
