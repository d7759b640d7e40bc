"""Makes every launch of the ops' small cases for a GPU that is not there: `python -m tests.gpu.launch_kernels`.

Triton's own launcher looks at the arguments, as on a GPU: a number that is 1 becomes a constant, one that 16 divides
promises alignment, whatever the kernel's `builds` say. It compiles what it is asked for, and nothing is run. Prints the
kernels' names. With `--typed` it stops where all of that has been seen, before the GPU's own code is made: the test
suite does so, which makes that code of every kernel in tests/gpu/build_kernels.py; `make kernels` does all of it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from typing import Any
from unittest import mock

import torch

import twotower_kernels as tt
from tests.gpu.triton_checks import triton_kernels
from twotower_kernels.reference import adaln, attention, mamba2, moe

ARCHITECTURE = 90  # what launchers take CPU tensors to be on


class NoDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


def typed(backend: Any, stages: dict[str, Any], *_: Any) -> None:
    """Triton's hook for its list of stages: the first remains, in which every type and constant is known."""
    first = stages["ttir"]
    stages.clear()
    stages.update(ttir=first, cubin=no_code)


def no_code(module: Any, metadata: dict[str, Any]) -> bytes:
    metadata.update(name="", shared=0)
    return b""


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(NoDriver())
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["--typed"]:
            knobs.runtime.add_stages_inspection_hook = typed
            knobs.cache.dir = folder  # not for others, who would find no code in it
        print(*sorted(launches()))


def launches() -> set[str]:
    """Makes them. The names of the kernels that were launched."""
    from triton.runtime.jit import JITFunction

    from twotower_kernels.triton import moe as moe_kernels

    run, launched = JITFunction.run, set()

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.add(self.fn.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    with mock.patch.object(JITFunction, "run", compiled), triton_kernels(), torch.no_grad():
        for family in (adaln, attention, mamba2, moe):
            for op, cases in family.CASES.items():
                for case in cases:
                    if not case.startswith("released"):
                        with suppress(NotImplementedError):  # said before anything is launched
                            inputs = family.make_inputs(op, case, dtype=torch.bfloat16)
                            getattr(tt, op)(**inputs)
                            if op == "mamba2_scan":
                                tt.mamba2_scan(**inputs, return_states=True)
        with mock.patch.object(moe_kernels, "overlaps", lambda *_: True):
            sizes = dict(n=16, e=4, top_k=2, h=64, i=64, shared=64)
            tt.moe_experts(**moe.make_inputs("moe_experts", sizes, dtype=torch.bfloat16))
    return launched


if __name__ == "__main__":
    main()
