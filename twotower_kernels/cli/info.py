"""What is installed, what it runs on, and what a checkpoint needs: the contents of `twotower info`."""

from __future__ import annotations

import importlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import twotower_kernels
from twotower_kernels import cpu
from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda import moe as cuda_moe
from twotower_kernels.cuda import remask as cuda_remask
from twotower_kernels.model import checkpoint, loading
from twotower_kernels.model.layout import tower_of
from twotower_kernels.model.loading import BACKBONE, MORE_TOKENS
from twotower_kernels.model.memory import kv_per_token, state_per_row
from twotower_kernels.ops._library import DIFFERENTIABLE
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.units import duration, size

LONG_CONTEXT = 128 * 1024  # tokens
NONE = "none: "
PATIENCE = 0.5  # seconds, after which no further kernel is compiled just to know how long it takes
SMALL = ("moe_plan", (), "sm_90a")  # a kernel that any machine with NVRTC compiles quickly


def machine() -> dict[str, str]:
    """Versions, instruction sets, threads, devices."""
    try:
        kernels = cpu.kernels()
        instructions = f"{kernels.isa()} in use; this processor has {', '.join(kernels.isas())}"
    except ImportError as error:
        instructions = f"none: {error}"
    devices = [f"cpu ({platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({device.name}, {size(device.total_memory)})")
    return {
        "twotower-kernels": twotower_kernels.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "instruction set": instructions,
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
    }


def gpu_kernels() -> dict[str, str]:
    """The compilers of kernels for GPUs, and what a kernel's first call costs. What is wrong is said, never raised."""
    facts = {"Triton": _said(_triton), "NVRTC": _said(cuda.compiler)}
    if not facts["NVRTC"].startswith(NONE):
        facts["CUDA C++ kernels"] = _said(_first_calls if torch.cuda.is_available() else _first_call_of_one)
    return facts


def _said(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # of whatever kind: a report of what is there does not fail for what is not
        return NONE + (str(error) or repr(error)).splitlines()[0]


def _triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        raise ImportError(f"most kernels for GPUs need Triton: {cuda.installation()} ({error})") from error


def builds() -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of every kernel in CUDA C++."""
    return [*cuda_moe.builds(), *cuda_remask.builds()]


def _first_calls() -> str:
    """Of every kernel in CUDA C++, on the first GPU. What is compiled for that is kept."""
    arch, left = cuda.architecture(0), 0
    read: list[float] = []
    compiled: list[float] = []
    for source, defines in builds():
        kept = cuda.is_kept(source, defines, arch)
        if not kept and sum(compiled) > PATIENCE:
            left += 1
        else:
            (read if kept else compiled).append(_seconds(cuda.cubin, source, defines, arch))
    told = [f"{len(read)} read from the cache in {duration(sum(read))}"] if read else []
    if compiled:
        told.append(f"{len(compiled)} compiled in {duration(sum(compiled))}")
    if left:
        told.append(f"{left} still to compile at their first call")
    return f"for {arch}, {', '.join(told)}"


def _first_call_of_one() -> str:
    """Without a GPU: one small kernel for another machine's."""
    compiled = _seconds(cuda.compile, *SMALL)
    cuda.cubin(*SMALL)
    told = f"{SMALL[0]} for {SMALL[2]} compiled in {duration(compiled)}"
    if not cuda.is_kept(*SMALL):
        return f"{told}, not kept"
    return f"{told}, read from the cache in {duration(_seconds(cuda.cubin, *SMALL))}"


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Op:
    """What there is of a registered op: a kernel per device, as PyTorch's dispatcher knows it, and a gradient."""

    cpu: bool
    gpu: bool
    differentiable: bool

    @property
    def facts(self) -> list[str]:
        """In words, as a table has them. No kernel for GPUs has been run on one yet."""
        return [
            "yes" if self.cpu else "-",
            "built, not run" if self.gpu else "-",
            "differentiable" if self.differentiable else "-",
        ]


def ops() -> dict[str, Op]:
    """Every registered op."""
    registered = torch._C._dispatch_get_all_op_names()  # with overloads, "op.traced", which are not ops of their own
    names = sorted(name for name in registered if name.startswith("twotower::") and "." not in name)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    short = {name: name.removeprefix("twotower::") for name in names}
    return {short[name]: Op(has(name, "CPU"), has(name, "CUDA"), short[name] in DIFFERENTIABLE) for name in names}


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint holds and needs, in bytes unless said otherwise."""

    parameters: dict[str, int]  # numbers per tower ("backbone": a single tower, which seeds both)
    weights: dict[str, int]  # per tower, in the dtypes of the files
    kv_per_token: int  # keys and values of one token of one row, in the config's dtype
    state_per_row: int  # Mamba-2 states of one row, whatever its length

    @property
    def long_context(self) -> int:
        """Weights, and one row of 128 K tokens."""
        return sum(self.weights.values()) + self._long_row

    @property
    def long_context_apart(self) -> dict[str, int]:
        """The same per tower, each on a device of its own, where both keep the row."""
        return {tower: weights + self._long_row for tower, weights in self.weights.items()}

    @property
    def _long_row(self) -> int:
        return LONG_CONTEXT * self.kv_per_token + self.state_per_row


def sizes(folder: Path) -> Sizes:
    """The sizes of a checkpoint folder, from its config and its files' headers alone.

    Raises:
        FileNotFoundError, ValueError: as the config and the files do, naming what is wrong.
    """
    config = TwoTowerConfig.from_file(folder / "config.json")
    listed = checkpoint.entries(folder)
    single = any(entry.key.startswith(BACKBONE) for entry in listed)
    there = {tower_of(entry.key) for entry in listed if not entry.key.startswith(MORE_TOKENS)}
    plan = loading.plan(folder, listed, config, there.pop() if len(there) == 1 and not single else "both")
    parameters: dict[str, int] = {}
    weights: dict[str, int] = {}
    for entry in plan.sources:
        tower = "backbone" if single else tower_of(entry.key)
        parameters[tower] = parameters.get(tower, 0) + math.prod(entry.shape)
        weights[tower] = weights.get(tower, 0) + entry.nbytes
    width = plan.dtype.itemsize
    return Sizes(parameters, weights, kv_per_token(config, width), state_per_row(config, width))
