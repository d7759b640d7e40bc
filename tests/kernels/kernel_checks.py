"""What the tests of every kernel share: instruction sets, awkward strides, the comparison with the specification."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.paths import ROOT
from twotower_kernels import cpu
from twotower_kernels.ops import _direct
from twotower_kernels.ops._library import CPU
from twotower_kernels.testing.budget import as_tuple, widened
from twotower_kernels.testing.cases.op import Judge
from twotower_kernels.testing.layouts import awkward

MACHINE_ISAS: list[str] = cpu.kernels().isas()  # those of this machine, the plainest first
EVERY_ISA = ("baseline", "avx2", "avx512", "avx512bf16", "amx")  # of all machines, to draw from: the same everywhere
STANDING_IN = {"avx512bf16": "neonbf16", "amx": "neonbf16"}  # Arm's set with the same kind of instruction
# AMX's tiles are emulated where the machine has none, unless the library under test is a special one.
ISAS = MACHINE_ISAS if "amx" in MACHINE_ISAS or os.environ.get("KERNEL_LIBRARY") else [*MACHINE_ISAS, "amx"]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Kernels use this instruction set inside, or what stands in for it, or the best below it that this machine has or
    emulates."""
    if STANDING_IN.get(name) in ISAS:
        name = STANDING_IN[name]
    if name in EVERY_ISA and name not in ISAS:
        below = EVERY_ISA[: EVERY_ISA.index(name) + 1]
        emulated = [f"{isa}, emulated" for isa in below]
        name = next((isa for isa in reversed([*below, *emulated]) if isa in ISAS), ISAS[0])
    if name in MACHINE_ISAS or name not in ISAS:
        with cpu.use(name):
            yield
    else:
        with patch.object(cpu, "kernels", emulated_kernels), cpu.use(f"{name}, emulated"):
            _direct.entries.cache_clear()
            try:
                yield
            finally:
                _direct.entries.cache_clear()


@cache
def emulated_kernels() -> ModuleType:
    """The kernels of AMX with emulated tiles, as `make emulate` builds them, beside those under test."""
    folder = ROOT / "build" / "emulate"
    folder.mkdir(parents=True, exist_ok=True)
    build = ["build_ext", f"--build-lib={folder / 'lib'}", f"--build-temp={folder / 'temp'}"]
    flags = {"TT_EMULATE": "1", "CXXFLAGS": "-march=native -Wno-psabi"}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes start together
        subprocess.run([sys.executable, "setup.py", "-q", *build], env={**os.environ, **flags}, cwd=ROOT, check=True)
    (library,) = (folder / "lib" / "twotower_kernels").glob(f"_C*{sysconfig.get_config_var('SOABI')}*.so")
    spec = importlib.util.spec_from_file_location("emulated._C", library)  # the other name is taken
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cpu.introduced(module)


@contextmanager
def laid_over(kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these stand for the CPU kernels of the ops of these names."""
    library = torch.library.Library("twotower", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that a kernel is laid over another: so it should be
            for name, kernel in kernels.items():
                library.impl(name, kernel, "CPU", allow_override=True)
        with _direct.off(), patch.dict(CPU, kernels):  # what the autograd kernels call themselves
            yield
    finally:
        library._destroy()


def assert_op_within_budget(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    layout: int = 0,
    judge: Callable[..., Judge] = Judge,
) -> None:
    """`op` on `inputs` against `reference`, see `twotower_kernels/testing/budget.py`.

    layout: how the tensors are laid out for `op`, see `awkward`. judge: of its results. The inputs must be unchanged
    afterwards.
    """
    given = {k: awkward(v, layout) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    judge(reference, inputs)(as_tuple(op(**given)))
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), given[key].nan_to_num()), f"{key} was changed"


def relative_errors(
    op: Callable[..., Any], reference: Callable[..., Any], make: Callable[[int], dict[str, Any]], draws: int
) -> list[float]:
    """For each result the root mean square of the error of `op`, over that of `reference` in the same dtype, over the
    inputs that `make` gives for so many seeds together. 0 where both are exact."""
    sums: list[tuple[float, float]] = []
    for seed in range(draws):
        inputs = make(seed)
        each = (as_tuple(op(**inputs)), as_tuple(reference(**inputs)), as_tuple(reference(**widened(inputs))))
        errors = [
            (float((got.double() - truth).square().sum()), float((plain.double() - truth).square().sum()))
            for got, plain, truth in zip(*each, strict=True)
        ]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums or [(0.0, 0.0)] * len(errors), errors, strict=True)]
    return [(a / b) ** 0.5 if b else float(a > 0) for a, b in sums]
