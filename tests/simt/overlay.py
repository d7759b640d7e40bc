"""The CUDA C++ launchers on CPU tensors, their kernels run by the executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from tests.kernels.kernel_checks import laid_over
from tests.simt import executor
from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda import moe as cuda_moe
from twotower_kernels.cuda import remask as cuda_remask


@contextmanager
def simulated(*, build: str = "plain", seed: int = 0) -> Iterator[None]:
    """Inside, `twotower_kernels.cuda.build.launch` runs the same sources on the host."""

    def launch(
        kernel: cuda.Kernel,
        grid: int,
        block: int,
        shared: int,
        arguments: Sequence[cuda.Argument],
        after_last: bool = False,
    ) -> None:
        text = (executor.SOURCES / f"{kernel.source}.cu").read_text(encoding="utf-8")
        executor.launch(text, kernel.name, dict(kernel.defines), grid, block, shared, arguments, build=build, seed=seed)

    with patch.object(cuda, "launch", launch):
        yield


@contextmanager
def cuda_kernels(*, build: str = "plain") -> Iterator[None]:
    """Inside, `tt.moe_gate`, `tt.moe_route`, `tt.moe_plan` and `tt.remask` run their CUDA C++ kernels on CPU
    tensors; every choice of experts is also made by the kernel that plans with it."""

    def route(*arguments: Any) -> tuple[Tensor, Tensor]:
        weights, experts = cuda_moe.moe_route(*arguments)
        both = cuda_moe.moe_route_plan(*arguments)
        plan = cuda_moe.moe_plan(experts, arguments[0].shape[1])
        for one, other in zip(both, (weights, experts, *plan), strict=True):
            assert one.numpy().tobytes() == other.numpy().tobytes()  # NaN too
        return weights, experts

    kernels = {"moe_gate": cuda_moe.moe_gate, "moe_route": route, "moe_plan": cuda_moe.moe_plan}
    kernels |= {"moe_router": cuda_moe.moe_router, "remask": cuda_remask.remask}
    with laid_over(kernels), simulated(build=build):
        yield
