"""Compiles every GPU kernel for every GPU, on any machine: `python -m tests.gpu.build_kernels build/kernels.json`.

Needs neither GPU nor driver: Triton, its wheel's ptxas and cuobjdump, and NVRTC for CUDA C++ are enough. The file
lists, per build, kernel, configuration, architecture, registers per thread, bytes of shared memory, bytes spilled to
local memory, and what it asked for and misses: instructions, or tensor memory.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import twotower_kernels.triton
from twotower_kernels.triton.launch import Build

ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_MEMORY = 512  # columns of sm_100's: PTX ISA, tcgen05.alloc


@dataclass(frozen=True)
class Built:
    kernel: str
    config: str
    arch: str
    registers: int
    shared: int
    spills: int
    missing: tuple[str, ...]


def modules() -> list[str]:
    """The files of twotower_kernels/triton that hold kernels."""
    folder = Path(twotower_kernels.triton.__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py"))
    return [name for name in names if "builds(arch" in (folder / f"{name}.py").read_text(encoding="utf-8")]


def described(build: Build) -> str:
    constants = " ".join(f"{name}={value}" for name, value in build.constants.items() if value is not None)
    types = " ".join(f"{name}:{type}" for name, type in build.types.items() if type.startswith("*"))
    return f"{types} {constants} warps={build.num_warps} stages={build.num_stages}"


def compiled(build: Build, arch: int) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    # A pointer that is not there is a constant in Triton's eyes.
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    signature = {name: build.types.get(name, "constexpr") for name in names}
    divisible = [n for n, t in build.types.items() if t not in ("fp32", "i1") and n not in build.odd]
    attributes: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = resources(done.asm["cubin"])
    missing = tuple(name for name in build.needs if arch == 90 and name not in done.asm["ptx"])
    if done.metadata.tmem_size > TENSOR_MEMORY:  # it compiles to nothing then, and fails when it is launched
        missing += (f"{done.metadata.tmem_size} columns of tensor memory",)
    name = build.kernel.fn.__name__
    return Built(name, described(build), f"sm_{arch}", registers, done.metadata.shared, spills, missing)


def cuda_modules() -> list[str]:
    """The launchers of CUDA C++ kernels: twotower_kernels/cuda_*.py."""
    folder = Path(twotower_kernels.triton.__file__).parents[1]
    return sorted(path.stem for path in folder.glob("cuda_*.py"))


def cuda_builds_of(module: str, arch: int) -> list[Built]:
    """As `builds_of`, for CUDA C++. Shared memory is asked for at launch, so the table shows none."""
    from twotower_kernels import cuda

    found = []
    for source, defines in importlib.import_module(f"twotower_kernels.{module}").builds():
        cubin = cuda.compile(source, defines, f"sm_{arch}{'a' if arch >= 90 else ''}")
        config = " ".join(f"{name}={value}" for name, value in defines)
        text = (cuda.folder() / f"{source}.cu").read_text(encoding="utf-8")
        for kernel in re.findall(r"\b(\w+_kernel)\(", text):
            registers, spills = resources(cubin, kernel)
            found.append(Built(kernel, config, f"sm_{arch}", registers, 0, spills, ()))
    return found


def resources(cubin: bytes, kernel: str = "") -> tuple[int, int]:
    """Registers per thread and bytes of local memory of this kernel, or of the one that is in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    if kernel:
        text = text[text.index(f"Function {kernel}:") :].split("Function ")[1]
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def builds_of(module: str, arch: int) -> list[Built]:
    kernels = importlib.import_module(f"twotower_kernels.triton.{module}")
    return [compiled(build, arch) for build in kernels.builds(arch)]


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [(name, arch) for name in modules() for arch in ARCHITECTURES]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = [built for part in pool.map(builds_of, *zip(*jobs, strict=True)) for built in part]
        jobs = [(name, arch) for name in cuda_modules() for arch in ARCHITECTURES]
        found += [built for part in pool.map(cuda_builds_of, *zip(*jobs, strict=True)) for built in part]
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(built) for built in found], indent=1), encoding="utf-8")
    print(f"{path}: {len(found)} builds")


if __name__ == "__main__":
    main()
