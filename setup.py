"""Builds `twotower_kernels._C`: every csrc/cpu/*.cpp once per instruction set, then one shared library, by ninja.
The sources of CUDA C++ kernels, csrc/cuda, go into the package as they are: they are compiled at first use.

Needs a C++17 compiler (CXX, else c++), pybind11, ninja. No torch and no CUDA: the kernels take pointers. CXXFLAGS and
LDFLAGS are appended to the flags below. All metadata but the licence is in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "c++")
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd -Wall -Wextra"
X86 = {
    "baseline": "-O2 -DTT_FLOAT64",  # it serves processors from before 2013, and compiles twice as fast
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx512bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
}
BF16 = "attention", "linear", "moe_experts"  # TT_KERNEL_BF16: the others use nothing of AVX512-BF16
# For tests. TT_BASELINE_ONLY=1 compiles the portable baseline alone, for instance under sanitizers. TT_EMULATE=1 does
# the same, but the one set that is compiled takes the paths of AVX512-BF16, with its instructions emulated.
EMULATE = bool(os.environ.get("TT_EMULATE"))
BASELINE_ONLY = EMULATE or bool(os.environ.get("TT_BASELINE_ONLY"))
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") and not BASELINE_ONLY else {"baseline": "-DTT_FLOAT64"}


def objects(build: Path) -> list[tuple[Path, Path, str]]:
    """(object, source, extra flags) of everything that is compiled."""
    found = [(build / f"{source.stem}.o", source, "-O1") for source in sorted((ROOT / "csrc").glob("*.cpp"))]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for isa, flags in ISAS.items():
            if isa == "avx512bf16" and source.stem not in BF16:
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
    defines = "-DTT_BASELINE_ONLY " * BASELINE_ONLY + "-DTT_EMULATE " * EMULATE
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
        if shutil.which(CXX) is None:
            sys.exit(f"twotower_kernels: no C++ compiler: {CXX} is not on the PATH. Install g++ or clang, or set CXX.")
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            sys.exit("twotower_kernels: Python.h is missing. On Debian and Ubuntu it is the package python3-dev.")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, output), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), "--quiet"], check=True)


class CopySources(build_py):
    """`build_py` that adds csrc/cuda as twotower_kernels/csrc_cuda. A checkout, installed or not, reads csrc itself."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                ROOT / "csrc" / "cuda", Path(self.build_lib) / "twotower_kernels" / "csrc_cuda", dirs_exist_ok=True
            )


sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
# pyproject.toml would have to spell it in one way before setuptools 77 and in another after.
license_key = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setup(
    **{license_key: "Apache-2.0"},
    ext_modules=[Extension("twotower_kernels._C", sources)],
    cmdclass={"build_ext": BuildKernels, "build_py": CopySources},
)
