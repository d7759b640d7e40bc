"""CUDA C++ kernels on a host: compiled by g++ with cuda_on_host.h, run by executor.cpp. Needs no PyTorch.

Four builds of the same source: "plain"; "approximate", whose exponentials and logarithms err by two units in the last
place; "race", which reports unordered accesses to shared memory; and "address", with AddressSanitizer, which a process
can load only if it started with that library (see `sanitized_environment`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"  # beside it lies csrc/common
BUILT = HERE.parents[1] / "build" / "simt"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas"]
BUILDS = {
    "plain": [],
    "approximate": ["-DSIMT_APPROXIMATE"],
    "race": ["-fsanitize=thread"],
    "address": ["-fsanitize=address"],
}
GUARD = 256  # bytes on either side of every array
POISON = 0xFF


class SimtError(Exception):
    """The kernel did what CUDA forbids."""


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def _make(name: str, identity: str, build: Any) -> Path:
    """The file `name` with this identity in build/simt, made by `build(path)` if it is not there. Renamed into its
    place, so that two processes may make the same one."""
    path = BUILT / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}-{name}"
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            made = Path(folder) / name
            build(made)
            made.rename(path)
    return path


def _read(*paths: Path) -> str:
    return "\0".join(path.read_text(encoding="utf-8") for path in paths)


@cache
def _executor() -> Path:
    source = HERE / "executor.cpp"
    return _make("executor.o", CXX + _read(source), lambda to: _run(CXX, *FLAGS, "-O2", "-c", source, "-o", to))


def library(text: str, defines: Mapping[str, str], build: str) -> Path:
    """The shared library of a kernel's source."""
    kernels = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
    whole = "\n".join(['#line 1 "kernel.cu"', text, *(f"SIMT_EXPORT({kernel})" for kernel in kernels), ""])
    shared = [*SOURCES.glob("*.h"), *(SOURCES.parent / "common").glob("*.h")]
    headers = [HERE / "cuda_on_host.h", HERE / "executor.cpp", *sorted(shared)]
    macros = [f"-D{name}={value}" for name, value in defines.items()]

    def make(to: Path) -> None:
        source, made = to.with_suffix(".cpp"), to.with_suffix(".o")
        source.write_text(whole, encoding="utf-8")
        include = ["-include", HERE / "cuda_on_host.h", "-I", SOURCES]
        _run(CXX, *FLAGS, *BUILDS[build], *macros, *include, "-c", source, "-o", made)
        link = ["-fsanitize=address"] if build == "address" else []
        _run(CXX, "-shared", *link, made, _executor(), "-o", to)

    return _make("kernel.so", "\0".join([CXX, build, *macros, whole, _read(*headers)]), make)


@cache
def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.simt_launch.restype = ctypes.c_char_p
    loaded.simt_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 2, *[ctypes.c_int64] * 2]
    loaded.simt_launch.argtypes += [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    return loaded


class _Guarded:
    """A copy of an array between two guards. Under AddressSanitizer the guards are its own, and reads are seen too."""

    def __init__(self, address: int, size: int, build: str) -> None:
        self.address, self.size, self.guard = address, size, 0 if build == "address" else GUARD
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype = ctypes.c_void_p
        self.start = self.libc.malloc(ctypes.c_size_t(size + 2 * self.guard))
        ctypes.memset(self.start, POISON, size + 2 * self.guard)
        ctypes.memmove(self.start + self.guard, address, size)

    @property
    def pointer(self) -> int:
        return self.start + self.guard

    def finish(self) -> bool:
        """Copies the array back; whether the guards are as they were."""
        ctypes.memmove(self.address, self.pointer, self.size)
        before = ctypes.string_at(self.start, self.guard)
        after = ctypes.string_at(self.pointer + self.size, self.guard)
        self.libc.free(ctypes.c_void_p(self.start))
        return before + after == bytes([POISON]) * 2 * self.guard


def span(array: Any) -> tuple[int, int]:
    """Address and bytes from the first to the last element of a NumPy array or PyTorch tensor."""
    if hasattr(array, "data_ptr"):
        size, strides = array.element_size(), [stride * array.element_size() for stride in array.stride()]
        address = array.data_ptr()
    else:
        size, strides, address = array.itemsize, array.strides, array.ctypes.data
    if 0 in array.shape:
        return address, 0
    return address, size + sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))


@dataclass
class Struct:
    """An argument that is a struct: its bytes, and by their offsets the arrays that pointers in it lead to."""

    content: bytes
    arrays: dict[int, Any]

    @classmethod
    def of(cls, struct: Any) -> Struct:
        """From one whose `tensors` are named as its fields are."""
        offsets = {name: getattr(type(struct), name).offset for name in struct.tensors}
        return cls(bytes(struct), {offsets[name]: tensor for name, tensor in struct.tensors.items()})


def launch(
    text: str,
    kernel: str,
    defines: Mapping[str, str],
    grid: int,
    block: int,
    shared: int,
    arguments: Sequence[Any],
    *,
    build: str = "plain",
    seed: int = 0,
) -> None:
    """Runs a kernel of the source `text`. Arguments as for `launch` in twotower_kernels/cuda: arrays, integers, floats,
    None, structs.

    Raises:
        SimtError: it did what CUDA forbids, and what that was.
    """
    loaded = _load(library(text, defines, build))
    entry = getattr(loaded, f"simt_call_{kernel}")
    wanted = getattr(loaded, f"simt_count_{kernel}")()
    if wanted != len(arguments):
        raise SimtError(f"{kernel} takes {wanted} arguments, got {len(arguments)}")
    guarded: list[_Guarded] = []

    def inside(array: Any) -> int:
        guarded.append(_Guarded(*span(array), build))
        return guarded[-1].pointer

    def values() -> Iterator[Any]:
        for argument in arguments:
            if hasattr(argument, "shape"):
                yield ctypes.c_void_p(inside(argument))
            elif isinstance(argument, ctypes.Structure | Struct):  # by value
                struct = argument if isinstance(argument, Struct) else Struct.of(argument)
                copy = ctypes.create_string_buffer(struct.content, len(struct.content))
                for offset, array in struct.arrays.items():
                    ctypes.c_void_p.from_buffer(copy, offset).value = inside(array)
                yield copy
            else:
                yield ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(int(argument or 0))

    held = list(values())
    pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(value) for value in held])
    arrays = (ctypes.c_int64 * (2 * len(guarded)))(*[x for array in guarded for x in (array.pointer, array.size)])
    failure = loaded.simt_launch(
        *(ctypes.cast(entry, ctypes.c_void_p), pointers, grid, block, shared, seed),
        *(int(build == "race"), arrays, len(guarded)),
    )
    intact = [array.finish() for array in guarded]
    if failure is not None:
        raise SimtError(failure.decode())
    if not all(intact):
        raise SimtError(f"{kernel} wrote outside array {intact.index(False)}")


def sanitized_environment() -> dict[str, str]:
    """For a process that loads "address" builds."""
    asan = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": asan.strip(), "ASAN_OPTIONS": options}
