// One source per operation, compiled once per instruction set, chosen at run time.
//
// Every csrc/cpu/<op>.cpp is compiled with TT_ISA set to each name below and with that set's compiler flags (setup.py),
// and puts all it defines into namespace tt::TT_ISA. TT_KERNEL in a header declares the function in all of them and a
// function of the same name in tt that calls the best one this processor runs. Only kernels that use bf16_dot.h are
// compiled for AVX512-BF16 as well: TT_KERNEL_BF16.
//
// A template or inline function of the standard library that is instantiated in such a file, but not inlined, would be
// merged by the linker with the baseline's copy and could bring AVX-512 to a processor without it. So kernels use plain
// arrays and the helpers of numeric.h and parallel.h, which live in tt::TT_ISA too; tests/house/test_build.py looks for
// leaks.
#pragma once

#if defined(__x86_64__) && !defined(TT_BASELINE_ONLY)
#define TT_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512bf16)
#else
#define TT_EACH_ISA(X) X(baseline)
#endif

namespace tt {

#define TT_NAME(name) name,
enum class Isa : int { TT_EACH_ISA(TT_NAME) };
#undef TT_NAME

Isa best_isa();         // the best set that this processor has
Isa isa();              // the set in use: the best one unless set_isa said otherwise
void set_isa(Isa isa);  // for tests; the caller checks that the processor has it
const char* isa_name(Isa isa);

}  // namespace tt

#define TT_DECLARED(isa, name, Arguments) \
    namespace isa {                       \
    void name(const Arguments&);          \
    }
#if defined(__x86_64__) && !defined(TT_BASELINE_ONLY)
#define TT_DISPATCHED(name, Arguments, newest)                    \
    TT_DECLARED(baseline, name, Arguments)                        \
    TT_DECLARED(avx2, name, Arguments)                            \
    TT_DECLARED(avx512, name, Arguments)                          \
    TT_DECLARED(newest, name, Arguments)                          \
    inline void name(const Arguments& arguments) {                \
        switch (isa()) {                                          \
            case Isa::avx512bf16: return newest::name(arguments); \
            case Isa::avx512: return avx512::name(arguments);     \
            case Isa::avx2: return avx2::name(arguments);         \
            case Isa::baseline: return baseline::name(arguments); \
        }                                                         \
    }
#else
#define TT_DISPATCHED(name, Arguments, newest)     \
    TT_DECLARED(baseline, name, Arguments)         \
    inline void name(const Arguments& arguments) { \
        baseline::name(arguments);                 \
    }
#endif
#define TT_KERNEL(name, Arguments) TT_DISPATCHED(name, Arguments, avx512)
#define TT_KERNEL_BF16(name, Arguments) TT_DISPATCHED(name, Arguments, avx512bf16)
