"""Versions of NVRTC that others have: does every CUDA C++ kernel compile with them? `python -m tests.gpu.nvrtc`

The newest that the extras allow is pinned and compiles all that is tested. Machines have what their PyTorch brought;
what one version takes, an older one may refuse. `make` puts the wheels of `requirements-nvrtc.txt` side by side into
build/nvrtc, as no two fit into one environment; they are called by their C interface (NVRTC documentation, chapter 3).
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from tests.gpu.build_kernels import ARCHITECTURES, cuda_modules, hardest_cuda
from tests.paths import ROOT
from twotower_kernels.cuda import build as cuda

FOLDER = ROOT / "build" / "nvrtc"
Build = tuple[str, tuple[tuple[str, str], ...]]  # source and macros


class Nvrtc:
    """One library, for instance nvidia/cu13/lib/libnvrtc.so.13 of NVIDIA's wheel."""

    def __init__(self, library: Path) -> None:
        for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by name alone
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, f"nvrtc{name}")(*arguments):
            raise RuntimeError(f"nvrtc{name}: error {status}")

    def compile(self, build: Build, arch: str) -> int:
        """Bytes of the cubin of a source of csrc/cuda for "sm_90a" and the like.

        Raises:
            RuntimeError: the compiler refuses; its log is in the message.
        """
        source, defines = build
        path = cuda.folder() / f"{source}.cu"
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("CreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
        options = [f"-arch={arch}", "-std=c++17", f"-I{cuda.folder()}", *(f"-D{k}={v}" for k, v in defines)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self._call("CompileProgram", program, len(options), encoded)
            self._call("GetCUBINSize", program, ctypes.byref(size))
        except RuntimeError as error:
            self._call("GetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("GetProgramLog", program, log)
            said = f"{path.name} {dict(defines)} for {arch} with NVRTC {self.version}: {log.value.decode()}"
            raise RuntimeError(said) from error
        finally:
            self._call("DestroyProgram", ctypes.byref(program))
        return size.value


def wanted() -> list[str]:
    """The pinned wheels."""
    lines = (ROOT / "requirements-nvrtc.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def installed() -> Iterator[Nvrtc]:
    """Those of the pinned wheels.

    Raises:
        FileNotFoundError: one is not there.
    """
    for wheel in wanted():
        found = sorted((FOLDER / wheel).rglob("libnvrtc.so.1?"))
        if not found:
            raise FileNotFoundError(
                f"{FOLDER / wheel}: no libnvrtc is there; `make kernels` and `make test` install it"
            )
        yield Nvrtc(found[0])


def builds(only_hardest: bool = False) -> list[Build]:
    """Everything that the launchers ask for; or of every source what asks most of a compiler."""
    every = (importlib.import_module(f"twotower_kernels.{name}").builds() for name in cuda_modules())
    return [build for part in every for build in (hardest_cuda(part) if only_hardest else part)]


def refused(nvrtc: Nvrtc, wanted: Iterable[Build], architectures: Sequence[int] = ARCHITECTURES) -> list[str]:
    """What the compiler says against builds."""

    def said(job: tuple[Build, int]) -> str | None:
        build, arch = job
        try:
            nvrtc.compile(build, f"sm_{arch}{'a' if arch >= 90 else ''}")
        except RuntimeError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # the compiler runs without Python's lock
        return [error for error in pool.map(said, product(wanted, architectures)) if error]


def main() -> None:
    faults = []
    for nvrtc in installed():
        faults += refused(nvrtc, everything := builds())
        print(f"NVRTC {nvrtc.version}: {len(everything)} builds for {len(ARCHITECTURES)} GPUs")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
