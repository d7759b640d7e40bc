"""Compiles every GPU kernel for every GPU, on any machine: `python -m tests.gpu.build_kernels build/kernels.json`.

Needs neither GPU nor driver: Triton, its wheel's ptxas and cuobjdump, and NVRTC for CUDA C++ are enough. The file
lists, per build, kernel, configuration, architecture, registers per thread, bytes of shared memory, bytes spilled to
local memory, and what it asked for and misses: instructions, or tensor memory. Ends with 1, and says why, where one of
these is more than a GPU has.

`make kernels` compiles every configuration that is shipped, about a thousand builds. `--hardest`, which the test suite
runs, compiles one per kernel (two where some need an instruction), and leaves a file that has more as it is while the
sources are no newer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import twotower_kernels.triton
from tests.paths import ROOT
from twotower_kernels.triton.launch import Build

ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 255  # that one thread may have, on all of them
TENSOR_MEMORY = 512  # columns of sm_100's: PTX ISA, tcgen05.alloc
SOURCES = ("twotower_kernels/triton/*.py", "twotower_kernels/cuda/*.py", "csrc/cuda/*", "csrc/common/*")


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
    """The launchers of CUDA C++ kernels, which are those of a family of ops: "cuda.moe" and the like."""
    folder = Path(twotower_kernels.triton.__file__).parents[1] / "cuda"
    return sorted(f"cuda.{path.stem}" for path in folder.glob("*.py") if "__" not in path.stem and path.stem != "build")


def hardest_cuda(builds: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Of each source and setting of its flags, on which the threads of a block may depend and with them its registers,
    the build with the widest types. The first of equals."""
    found: dict[tuple[str, ...], tuple[int, tuple[str, Any]]] = {}
    for source, defines in builds:
        values = [value for _, value in defines]
        setting = source, *(value for value in values if value in ("0", "1"))
        wide = 2 * values.count("double") + values.count("float") + values.count("type_float32")
        if setting not in found or wide > found[setting][0]:
            found[setting] = wide, (source, defines)
    return [build for _, build in found.values()]


def cuda_builds_of(module: str, arch: int, only_hardest: bool = False) -> list[Built]:
    """As `builds_of`, for CUDA C++. Shared memory is asked for at launch, so the table shows none."""
    from twotower_kernels.cuda import build as cuda

    builds = importlib.import_module(f"twotower_kernels.{module}").builds()
    found = []
    for source, defines in hardest_cuda(builds) if only_hardest else builds:
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


def tile_bytes(build: Build) -> int:
    """What the constants and types say about a build's size: the product of its tile's sides, times the bytes of the
    widest number that it loads."""
    sides = [x for x in build.constants.values() if type(x) is int and x > 1]
    widths = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
    return math.prod(sides) * max(widths.get(type, 1) for type in build.types.values())


def hardest(builds: Iterable[Build]) -> list[Build]:
    """Of each kernel the build with the largest tile, which asks for the most shared memory; among those that need an
    instruction, and among the others. The first of equals."""
    found: dict[tuple[str, bool], Build] = {}
    for build in builds:
        key = build.kernel.fn.__name__, bool(build.needs)
        if key not in found or tile_bytes(build) > tile_bytes(found[key]):
            found[key] = build
    return list(found.values())


def builds_of(module: str, arch: int, only_hardest: bool = False) -> list[Built]:
    kernels = importlib.import_module(f"twotower_kernels.triton.{module}")
    builds = kernels.builds(arch)
    return [compiled(build, arch) for build in (hardest(builds) if only_hardest else builds)]


def faults(table: Iterable[dict[str, Any]]) -> list[str]:
    """What no GPU can run, or not at the speed it was written for."""
    found = []
    for row in table:
        limits = {"spills": 0, "registers": REGISTERS, "shared": SHARED_LIMIT[int(row["arch"].removeprefix("sm_"))]}
        found += [
            f"{name} {row[name]}, expected at most {most}: {row}" for name, most in limits.items() if row[name] > most
        ]
        found += [f"without {', '.join(row['missing'])}: {row}"] if row["missing"] else []
    return found


def is_fuller(path: Path, table: list[dict[str, Any]]) -> bool:
    """Whether the file holds more builds than this table, all of its among them, and is newer than every source."""
    sources = [source for pattern in SOURCES for source in ROOT.glob(pattern)]
    if not path.is_file() or path.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    return len(kept) > len(table) and all(row in kept for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.build_kernels")
    parser.add_argument("path", type=Path)
    parser.add_argument("--hardest", action="store_true", help="one build per kernel and GPU")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = []
        for names, build in ((modules(), builds_of), (cuda_modules(), cuda_builds_of)):
            jobs = [(name, arch) for name in names for arch in ARCHITECTURES]
            of_job = partial(build, only_hardest=options.hardest)
            found += [built for part in pool.map(of_job, *zip(*jobs, strict=True)) for built in part]
    table = json.loads(json.dumps([asdict(built) for built in found]))
    if not (options.hardest and is_fuller(options.path, table)):
        options.path.parent.mkdir(parents=True, exist_ok=True)
        options.path.write_text(json.dumps(table, indent=1), encoding="utf-8")
    print(f"{options.path}: {len(found)} builds")
    if wrong := faults(table):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
