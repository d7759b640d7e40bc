"""CUDA C++ kernels (`csrc/cuda/*.cu`): compiled at first use, kept on disk, launched on PyTorch's current stream.

NVRTC compiles them through cuda-python, so that nobody needs nvcc and nothing is compiled for a GPU that is not there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)  # as in warp.h
SHARED_LIMIT = 48 * 1024  # bytes of shared memory that a block may have on every GPU without asking

# Whether a kernel that asks for it is set up while the one before it runs (programmatic dependent launch): written,
# compiled, not yet measured (docs/gpu_kernels.md).
PDL = False

Argument = Tensor | None | int | float | ctypes.Structure


@dataclass(frozen=True)
class Kernel:
    """An entry kernel: file `source`.cu, function `name`, macros that specialise it."""

    source: str
    name: str
    defines: tuple[tuple[str, str], ...] = ()


# --- compiling --------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the sources are: csrc/cuda, in an installed package inside it, where setup.py puts a copy."""
    package = Path(__file__).parents[1]
    installed = package / "csrc" / "cuda"
    return installed if installed.is_dir() else package.parent / "csrc" / "cuda"


@cache
def _core() -> ModuleType:
    """cuda.core, which was cuda.core.experimental before its version 1.

    Raises:
        ImportError: it is not installed.
    """
    for name in ("cuda.core", "cuda.core.experimental"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing = error
        else:
            if hasattr(module, "Program"):
                return module
            missing = ImportError(f"{name} has no Program")
    raise ImportError(_advice(missing)) from missing


@cache
def _nvrtc_version() -> str:
    try:
        status, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the library itself is not found
        raise ImportError(_advice(error)) from error
    if int(status) != 0:
        raise ImportError(_advice(status))
    return f"{major}.{minor}"


def _advice(error: object) -> str:
    return f"kernels in CUDA C++ need cuda-python with NVRTC, and a driver to run: {installation()} ({error})"


def installation() -> str:
    """The command that installs what GPU kernels need, for PyTorch's version of CUDA."""
    version = (torch.version.cuda or "13").split(".")[0]
    return f"pip install 'twotower-kernels[cuda{version}]'"


def compiler() -> str:
    """What compiles, for a reader.

    Raises:
        ImportError: it is not installed.
    """
    _core()
    return f"{_nvrtc_version()}, by cuda-core {importlib.metadata.version('cuda-core')}"


def architecture(device: int) -> str:
    """Of a GPU, "sm_90a" and the like."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def compile(source: str, defines: Sequence[tuple[str, str]], arch: str) -> bytes:
    """The cubin of `source`.cu for "sm_90a" and the like. Needs NVRTC, but neither GPU nor driver.

    Raises:
        ImportError: NVRTC is not installed.
        RuntimeError: the compiler refuses; its log is in the message.
    """
    core = _core()
    _nvrtc_version()
    macros = list(defines) or None  # an empty list is refused
    options = core.ProgramOptions(arch=arch, std="c++17", define_macro=macros, include_path=[str(folder())])
    text = (folder() / f"{source}.cu").read_text(encoding="utf-8")
    try:
        return bytes(core.Program(text, "c++", options).compile("cubin").code)
    except Exception as error:
        raise RuntimeError(f"{source}.cu for {arch} with {dict(defines)} does not compile: {error}") from error


# --- the cache on disk ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/twotower_kernels, by default ~/.cache/twotower_kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower_kernels"


def _trusted_folder() -> Path | None:
    """`cache_folder()`, made if need be. None, with a warning, unless it is ours alone: whoever can write there can
    run code here."""
    path = cache_folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.stat()
    except OSError as error:
        warnings.warn(f"{path}: compiled kernels cannot be kept ({error})", stacklevel=2)
        return None
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        warnings.warn(f"{path}: others can write here, so compiled kernels are not kept; chmod 700 it", stacklevel=2)
        return None
    return path


def _key(source: str, defines: Sequence[tuple[str, str]], arch: str) -> str:
    """Of everything that the cubin depends on."""
    parts = [_nvrtc_version(), arch, repr(tuple(defines)), source]
    headers = sorted([*folder().glob("*.h"), *(folder().parent / "common").glob("*.h")])
    for path in (folder() / f"{source}.cu", *headers):
        parts.append(path.read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cubin(source: str, defines: Sequence[tuple[str, str]], arch: str) -> bytes:
    """As `compile`, but from the disk where it was compiled before.

    A file that is corrupt, or was made for another key, is compiled anew.
    """
    key, where = _key(source, defines, arch), _trusted_folder()
    if where is None:
        return compile(source, defines, arch)
    path = where / f"{key}.cubin"
    content = _read(path, key)
    if content:
        return content
    content = compile(source, defines, arch)
    temporary = None
    try:
        # Written aside and renamed, so that another process sees the whole file or none.
        with tempfile.NamedTemporaryFile(dir=where, delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(key.encode() + content).digest() + content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"{path}: a compiled kernel cannot be kept ({error})", stacklevel=2)
    return content


def is_kept(source: str, defines: Sequence[tuple[str, str]], arch: str) -> bool:
    """Whether `cubin` will find it on the disk."""
    key, where = _key(source, defines, arch), _trusted_folder()
    return where is not None and bool(_read(where / f"{key}.cubin", key))


def _read(path: Path, key: str) -> bytes:
    """A kept cubin; nothing, if there is none that begins with the digest of its key and content."""
    try:
        kept = path.read_bytes()
    except OSError:
        return b""
    digest, content = kept[:32], kept[32:]
    return content if digest == hashlib.sha256(key.encode() + content).digest() else b""


# --- launching --------------------------------------------------------------------------------------------------------


@cache
def _driver() -> ModuleType:
    """The driver's interface in cuda-python. cuda.core's own launcher takes no struct, and before its version 0.5 no
    attribute of a launch."""
    return importlib.import_module("cuda.bindings.driver")


def _called(function: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside its status.

    Raises:
        RuntimeError: the driver refuses.
    """
    driver = _driver()
    status, *results = getattr(driver, function)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function}: {status.name}")
    return results[0] if results else None


@cache
def _loaded(kernel: Kernel, device: int) -> int:
    """The handle of the kernel on a device, ready to launch; its library stays loaded."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{kernel.name} is not loaded yet, which cannot be captured; call it once before capturing")
    content = cubin(kernel.source, kernel.defines, architecture(device))
    library = _called("cuLibraryLoadData", content, [], [], 0, [], [], 0)
    return int(_called("cuLibraryGetKernel", library, kernel.name.encode()))


class _Thread(threading.local):
    """The devices whose context a thread has made current. PyTorch makes a context current at a thread's first call of
    its own, and the first call of all may be ours."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()


def _make_current(device: int) -> None:
    if device not in _thread.devices:
        _core().Device(device).set_current()
        _thread.devices.add(device)


@lru_cache(maxsize=1024)
def _config(grid: int, block: int, shared: int, stream: int, early: bool) -> Any:
    """How to launch, as the driver takes it; made once, since that takes longer than the rest of a launch."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return config


def launch(
    kernel: Kernel, grid: int, block: int, shared: int, arguments: Sequence[Argument], *, after_last: bool = False
) -> None:
    """Runs `grid` blocks of `block` threads with `shared` bytes each, on the current stream of the tensors' device.

    Tensors become pointers (None: a null pointer), integers and booleans 64-bit integers, floats doubles, structs are
    passed by value: no kernel takes anything else. A struct's attribute `tensors` holds what its pointers point into.

    after_last: with `PDL`, on GPUs that can, the kernel may start before the one launched last on this stream is done,
    and waits for it by itself.
    """
    device = next(tensor.device for tensor in _tensors(arguments))
    with torch.cuda.device(device):
        _make_current(device.index)
        function = _loaded(kernel, device.index)
        early = PDL and after_last and torch.cuda.get_device_capability(device.index) >= (9, 0)
        config = _config(grid, block, shared, torch.cuda.current_stream(device).cuda_stream, early)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        _called("cuLaunchKernelEx", config, function, ctypes.addressof(pointers), 0)


def _tensors(arguments: Sequence[Argument]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, ctypes.Structure):
            yield from argument.tensors.values()


def _value(argument: Argument) -> Any:
    """In memory, as the driver takes it from there."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return argument
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(int(argument or 0))
