"""What bench/gpu.sh calls, rehearsed without a GPU: `python -m tests.gpu.rehearsal -m bench.gpu_smoke`, and the like.

The CPU answers for "cuda" (`gpu_stand_in`), but every kernel that a launcher asks for is compiled as on a GPU of
compute capability 9.0, by Triton and by NVRTC, once, and kept on the disk: on a bare machine, that is most of what a
part takes. So the clock says how long compiling takes, and the results that the program around it has no mistake; of a
GPU's speed and of its kernels' results they say nothing. What would take gigabytes is made smaller.

    PYTHON=tests/gpu/rehearsal.sh bench/gpu.sh all FOLDER

rehearses the whole script. REHEARSE_TIMES names a file to which each process adds what it took and compiled.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.gpu.gpu_stand_in import gpu_stand_in
from tests.gpu.launch_kernels import NoDriver
from tests.kernels.kernel_checks import laid_over
from twotower_kernels.bench import gpu_model
from twotower_kernels.bench.checks import operations, processes
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.cuda import build as cuda
from twotower_kernels.model import capture
from twotower_kernels.ops import _library
from twotower_kernels.reference import attention, moe, remask

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
ARCHITECTURE = "sm_90a"

spent: Counter[str] = Counter()  # a processor's seconds of compiling, ptxas and NVRTC included, and how often


def processor_seconds() -> float:
    """Of this process and of those that it waited for: what a clock would say if nothing else ran."""
    return sum(os.times()[:4])


@contextmanager
def clocked(what: str) -> Iterator[None]:
    start = processor_seconds()
    try:
        yield
    finally:
        spent[what] += processor_seconds() - start  # type: ignore[assignment]
        spent[f"{what}, calls"] += 1


def compiles(launcher: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An op's kernel that first asks for what the GPU's launcher would launch, then lets the CPU's answer."""
    answer = torch.library.get_kernel(f"twotower::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def kernel(*arguments: Any) -> Any:
        launcher(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
        return answer.call_boxed(keys, *arguments)

    return kernel


@contextmanager
def compiled_only() -> Iterator[None]:
    """Launches compile, and launch nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(NoDriver())
    run = JITFunction.run

    def triton_compiles(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with clocked("Triton"):
            return run(self, *arguments, grid=grid, warmup=True, **options)

    def nvrtc_compiles(kernel: cuda.Kernel, *launched: Any, after_last: bool = False) -> None:
        with clocked("NVRTC"):
            cuda.cubin(kernel.source, kernel.defines, ARCHITECTURE)

    kernels = {name: compiles(_library.cuda_kernel(name), name) for name in _library.CUDA}
    with (
        mock.patch.object(JITFunction, "run", triton_compiles),
        mock.patch.object(cuda, "launch", nvrtc_compiles),
        laid_over(kernels),
    ):
        yield


def small_enough() -> None:
    """Cases of the released sizes that would take gigabytes or minutes of a CPU, made smaller where no kernel is
    another one for it: fewer experts, blocks and tokens. A model of the released widths, with three layers."""
    attention.CASES["block_attention"]["released_prefill"]["block"] = 512
    attention.CASES["block_attention"]["released_4k_batch_64"]["batch"] = 2
    attention.CASES["block_attention"]["released_128k"]["context"] = 8192
    moe.CASES["moe_experts"]["released"]["e"] = 16
    remask.CASES["remask"]["released_b64"]["batch"] = 2
    whole = gpu_model.config
    gpu_model.config = lambda pattern="": replace(whole("ME*"), vocab_size=1024, n_routed_experts=16)
    limits = ceilings.Ceilings(read=50, copy=60, fp64=80, fp32=200, fp16=3, bf16=400, launch=1e-5, device="cuda")
    ceilings.measure = lambda device="cpu": limits


def main(arguments: Sequence[str]) -> None:
    """As `python` would run them: `-m MODULE ARGUMENTS...`, or a file and its arguments."""
    if arguments[0] != "-m":  # setup.py: as it is
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.executable = str(Path(__file__).with_suffix(".sh"))  # for the processes that it starts
    name, sys.argv = arguments[1].removeprefix("twotower_kernels."), list(arguments[1:])
    if name in ("bench", "bench.gpu_switches"):
        sys.argv += ["--shapes", "small", "--seconds", "0"]
    begun = time.perf_counter()
    small_enough()
    program = importlib.import_module(f"{name}.command" if name in ("bench", "bench.checks") else name)
    try:
        with ExitStack() as stack:
            record = stack.enter_context(gpu_stand_in(memory=2**40))
            stack.enter_context(mock.patch.object(operations, "cuda_graph", record))
            stack.enter_context(mock.patch.object(capture, "CudaGraphs", lambda: record))
            stack.enter_context(mock.patch.object(processes, "HANGS", 600.0))  # on cores that others share
            stack.enter_context(compiled_only())
            code = program.main()
    finally:
        said = ", ".join(f"{name} {value:.1f}" for name, value in sorted(spent.items()))
        clock = f"{time.perf_counter() - begun:.0f} s, {processor_seconds():.0f} of a processor"
        line = f"rehearsed {' '.join(sys.argv)}: {clock}; compiling: {said or 'nothing'}"
        if path := os.environ.get("REHEARSE_TIMES"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
