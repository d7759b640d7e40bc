"""Named ranges for profilers: a tower's pass and each of its mixers, by the checkpoint's names.

The operations appear in a profile by themselves, as `twotower::<op>`. Who profiles with `torch.profiler` sees beside
them which layer they are of; with `torch.autograd.profiler.emit_nvtx`, so does Nsight Systems. Where nobody profiles, a
pass asks once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def profiled() -> bool:
    """Whether a profiler runs. A trace has no ranges."""
    return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()


def in_range(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """The function, each call of which is a range of that name."""

    def call(*arguments: P.args, **options: P.kwargs) -> R:
        with torch.profiler.record_function(name):
            return function(*arguments, **options)

    return call
