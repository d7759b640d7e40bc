// One source per operation, compiled once per instruction set, chosen at run time.
//
// Every csrc/cpu/<op>.cpp is compiled with TT_ISA set to each name below and with that set's compiler flags (setup.py),
// and puts all it defines into namespace tt::TT_ISA. TT_KERNEL in a header declares the function in all of them and a
// function of the same name in tt that calls the best one this processor runs. Only kernels that use bf16_dot.h or
// amx.h are compiled for AVX512-BF16, AMX and Arm's BF16 as well: TT_KERNEL_BF16, and without AMX: TT_KERNEL_PAIRS.
//
// A template or inline function of the standard library that is instantiated in such a file, but not inlined, would be
// merged by the linker with the baseline's copy and could bring AVX-512 to a processor without it. So kernels use plain
// arrays and the helpers of numeric.h and parallel.h, which live in tt::TT_ISA too; tests/house/test_build.py looks for
// leaks.
#pragma once

// Which sets beyond the baseline there are depends on the processor family and on the compiler: setup.py asks it. Each
// set of a family comes with those before it.
#if defined(TT_HAS_AVX2)
#define TT_IF_AVX2(...) __VA_ARGS__
#else
#define TT_IF_AVX2(...)
#endif
#if defined(TT_HAS_AVX512)
#define TT_IF_AVX512(...) __VA_ARGS__
#else
#define TT_IF_AVX512(...)
#endif
#if defined(TT_HAS_AVX512BF16)
#define TT_IF_AVX512BF16(...) __VA_ARGS__
#else
#define TT_IF_AVX512BF16(...)
#endif
#if defined(TT_HAS_AMX)
#define TT_IF_AMX(...) __VA_ARGS__
#else
#define TT_IF_AMX(...)
#endif
#if defined(TT_HAS_NEONBF16)
#define TT_IF_NEONBF16(...) __VA_ARGS__
#else
#define TT_IF_NEONBF16(...)
#endif
// clang-format off
#define TT_EACH_X86_ISA(X) TT_IF_AVX2(X(avx2)) TT_IF_AVX512(X(avx512)) TT_IF_AVX512BF16(X(avx512bf16)) TT_IF_AMX(X(amx))
// clang-format on
#define TT_EACH_ARM_ISA(X) TT_IF_NEONBF16(X(neonbf16))
#define TT_EACH_ISA(X) X(baseline) TT_EACH_X86_ISA(X) TT_EACH_ARM_ISA(X)
// The best set of x86's for kernels that use nothing newer. Where AMX is emulated, only the baseline is there beside
// it.
#if defined(TT_EMULATE)
#define TT_NEWEST_PLAIN baseline
#define TT_NEWEST_PAIRS baseline
#else
#define TT_NEWEST_PLAIN avx512
#define TT_NEWEST_PAIRS avx512bf16
#endif

namespace tt {

#define TT_NAME(name) name,
enum class Isa : int { TT_EACH_ISA(TT_NAME) };
#undef TT_NAME

Isa best_isa();         // the best set that this processor has
Isa isa();              // the set in use: the best one unless set_isa said otherwise
void set_isa(Isa isa);  // for tests; the caller checks that the processor has it
const char* isa_name(Isa isa);
bool processor_has_amx();  // csrc/amx.cpp

}  // namespace tt

#define TT_DECLARED(isa, name, Arguments) \
    namespace isa {                       \
    void name(const Arguments&);          \
    }
#define TT_CASE(isa, from, name) \
    case Isa::isa: return from::name(arguments);
#define TT_DISPATCHED(name, Arguments, newest, with_amx, arm)   \
    TT_DECLARED(baseline, name, Arguments)                      \
    TT_IF_AVX2(TT_DECLARED(avx2, name, Arguments))              \
    TT_IF_AVX512(TT_DECLARED(avx512, name, Arguments))          \
    TT_IF_AVX512BF16(TT_DECLARED(newest, name, Arguments))      \
    TT_IF_AMX(TT_DECLARED(with_amx, name, Arguments))           \
    TT_IF_NEONBF16(TT_DECLARED(arm, name, Arguments))           \
    inline void name(const Arguments& arguments) {              \
        switch (isa()) {                                        \
            TT_IF_NEONBF16(TT_CASE(neonbf16, arm, name))        \
            TT_IF_AMX(TT_CASE(amx, with_amx, name))             \
            TT_IF_AVX512BF16(TT_CASE(avx512bf16, newest, name)) \
            TT_IF_AVX512(TT_CASE(avx512, avx512, name))         \
            TT_IF_AVX2(TT_CASE(avx2, avx2, name))               \
            TT_CASE(baseline, baseline, name)                   \
        }                                                       \
    }
#define TT_KERNEL(name, Arguments) TT_DISPATCHED(name, Arguments, TT_NEWEST_PLAIN, TT_NEWEST_PLAIN, baseline)
#define TT_KERNEL_BF16(name, Arguments) TT_DISPATCHED(name, Arguments, avx512bf16, amx, neonbf16)
#define TT_KERNEL_PAIRS(name, Arguments) TT_DISPATCHED(name, Arguments, avx512bf16, TT_NEWEST_PAIRS, neonbf16)
