"""Builds `twotower_kernels._C`: every csrc/cpu/*.cpp once per instruction set, then one shared library, by ninja.
What GPU kernels in CUDA C++ are compiled from at their first use, csrc/cuda and csrc/common, goes into the package, and
the recordings of two small models, which `twotower check` compares with.

Needs a C++17 compiler (CXX, else c++: g++ 11 or clang 14, or newer), pybind11, ninja. No torch and no CUDA: the kernels
take pointers. CXXFLAGS and LDFLAGS are appended to the flags below. All metadata but the licence is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "").strip() or "c++"
# The macros with a compiler's version, and the oldest that will do. Clang defines g++'s macros, too, so it comes first.
COMPILERS = {"clang": ("__clang_major__", "__clang_minor__", 14), "g++": ("__GNUC__", "__GNUC_MINOR__", 11)}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd -Wall -Wextra"
# Per set of a family's instructions beyond the baseline: flags, and one that a compiler must know, its assembler too.
# Each set contains those before it.
X86 = {
    "avx2": ("-march=x86-64-v3", "vpaddd %ymm0, %ymm1, %ymm2"),
    "avx512": ("-march=x86-64-v4 -mprefer-vector-width=512", "vpaddd %zmm0, %zmm1, %zmm2"),
    "avx512bf16": (
        "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
        "vdpbf16ps %zmm0, %zmm1, %zmm2",
    ),
    "amx": (
        "-march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -mprefer-vector-width=512 -DTT_AMX",
        "tdpbf16ps %tmm0, %tmm1, %tmm2",
    ),
}
# On Arm g++ reorders instructions before it allots registers, which it does not on x86, and spills a tile's sums: 36
# loads and stores beside the 96 products in the loop of linear_tile.h's widest tile in float, and none with this.
ARM_GCC = "-fno-schedule-insns"
ARM = {"neonbf16": ("-march=armv8.2-a+bf16", "bfdot v0.4s, v1.8h, v2.8h")}
FAMILIES = {"__x86_64__": X86, "__aarch64__": ARM}  # by the compiler's macro
# TT_KERNEL_BF16: the other kernels use nothing of the sets that multiply bfloat16.
BF16_SETS, BF16 = ("avx512bf16", "amx", "neonbf16"), ("attention", "linear", "moe_experts", "quantized")
WITHOUT_AMX = ("quantized",)  # TT_KERNEL_PAIRS
# For tests. TT_BASELINE_ONLY=1 compiles the portable baseline alone, for instance under sanitizers. TT_EMULATE=1 does
# the same, but it takes the paths of AVX512-BF16, and a second set those of AMX, with their instructions emulated.
EMULATE = bool(os.environ.get("TT_EMULATE"))
BASELINE_ONLY = EMULATE or bool(os.environ.get("TT_BASELINE_ONLY"))


def compiler(*arguments: str, source: str) -> subprocess.CompletedProcess[str]:
    """What the compiler makes of a source on its standard input."""
    command = [*shlex.split(CXX), *arguments, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True)


def check_compiler() -> dict[str, str]:
    """The macros that the compiler defines. Ends the build with a line if it is missing, too old, or knows no C++17."""
    program = shlex.split(CXX)[0]
    if shutil.which(program) is None:
        sys.exit(f"twotower_kernels: no C++ compiler: {program} is not on the PATH. Install g++ or clang, or set CXX.")
    needed = " or ".join(f"{name} {oldest}" for name, (_, _, oldest) in COMPILERS.items())
    said = compiler("-std=c++17", "-dM", "-E", source="")
    macros = dict(re.findall(r"^#define (\w+) (.*)$", said.stdout, re.MULTILINE))
    for name, (major, minor, oldest) in COMPILERS.items():
        if major in macros and int(macros[major]) >= oldest:
            return macros
        if major in macros:
            found = f"{CXX} is {name} {macros[major]}.{macros[minor]}"
            sys.exit(f"twotower_kernels: expected {needed}, or newer; {found}. Install one, or set CXX.")
    why = (said.stderr.strip().splitlines() or ["it does not say its version"])[0]
    sys.exit(f"twotower_kernels: expected {needed}, or newer; {CXX} is neither: {why}")


@cache
def instruction_sets() -> dict[str, str]:
    """Flags per set to compile for: the baseline, and of the processor's family every one that the compiler knows."""
    known: dict[str, str] = {}
    if EMULATE:  # -O2 compiles in half the time, which the tests wait for
        return {"baseline": "-O2 -DTT_FLOAT64", "amx": "-O2 -DTT_AMX"}
    macros = check_compiler()
    family = next((sets for macro, sets in FAMILIES.items() if macro in macros), {})
    if not BASELINE_ONLY:
        for name, (flags, instruction) in family.items():
            with tempfile.TemporaryDirectory() as folder:
                output = str(Path(folder) / "tried.o")
                tried = compiler(*flags.split(), "-c", "-o", output, source=f'void f() {{ asm("{instruction}"); }}')
            if tried.returncode:
                left_out = ", ".join(list(family)[len(known) :])
                why = (tried.stderr.strip().splitlines() or ["no reason given"])[0]
                print(f"twotower_kernels: {CXX} does not know {name}: {why}. Left out: {left_out}.", file=sys.stderr)
                break
            known[name] = flags
    # Beside AVX2 the baseline serves processors from before 2013 alone, and compiles twice as fast with -O2.
    sets = {"baseline": "-O2 -DTT_FLOAT64" if "avx2" in known else "-DTT_FLOAT64", **known}
    if family is ARM and "__clang__" not in macros:
        sets = {name: f"{flags} {ARM_GCC}" for name, flags in sets.items()}
    return sets


def objects(build: Path) -> list[tuple[Path, Path, str]]:
    """(object, source, extra flags) of everything that is compiled."""
    found = [(build / f"{source.stem}.o", source, "-O1") for source in sorted((ROOT / "csrc").glob("*.cpp"))]
    direct = sorted((ROOT / "csrc" / "direct").glob("*.cpp"))
    found += [(build / f"direct_{source.stem}.o", source, "-O2") for source in direct]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for isa, flags in instruction_sets().items():
            if (isa in BF16_SETS and source.stem not in BF16) or (isa == "amx" and source.stem in WITHOUT_AMX):
                continue
            found.append((build / f"{source.stem}.{isa}.o", source, f"-DTT_ISA={isa} -fno-rtti {flags}"))
    return found


def ninja_file(build: Path, output: Path) -> str:
    """The build as ninja reads it."""
    import pybind11

    def quoted(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    include = " ".join(f"'-I{p}'" for p in (pybind11.get_include(), sysconfig.get_path("include")))
    link = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-ldl"
    sets = [f"-DTT_HAS_{name.upper()}" for name in instruction_sets() if name != "baseline"]
    defines = " ".join([*sets, *["-DTT_EMULATE"] * EMULATE])
    lines = [
        f"flags = {FLAGS} {include} {defines} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        f"  command = {CXX} $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {CXX} -shared $in -o $out {link} {os.environ.get('LDFLAGS', '')}",
        "  description = link $out",
    ]
    compiled = objects(build)
    for target, source, isa in compiled:
        lines += [f"build {quoted(target)}: compile {quoted(source)}", f"  isa = {isa}"]
    lines.append(f"build {quoted(output)}: link {' '.join(quoted(target) for target, _, _ in compiled)}")
    return "\n".join([*lines, ""])


class BuildKernels(build_ext):
    """`build_ext` that leaves the work to ninja, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            sys.exit("twotower_kernels: Python.h is missing. On Debian and Ubuntu it is the package python3-dev.")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, output), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), "--quiet"], check=True)


# From the root, into the package.
COPIED = {f"csrc/{part}": f"csrc/{part}" for part in ("common", "cuda")}
COPIED |= {f"tests/data/golden/{name}": f"recorded/{name}" for name in ("tiny", "tiny_bf16")}


class CopySources(build_py):
    """`build_py` that adds what GPU kernels are compiled from, and what a model is checked with. A checkout reads its
    own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in COPIED.items():
                copy = Path(self.build_lib) / "twotower_kernels" / target
                shutil.copytree(ROOT / source, copy, dirs_exist_ok=True)


sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
# pyproject.toml would have to spell it in one way before setuptools 77 and in another after.
license_key = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setup(
    **{license_key: "Apache-2.0"},
    ext_modules=[Extension("twotower_kernels._C", sources)],
    cmdclass={"build_ext": BuildKernels, "build_py": CopySources},
)
