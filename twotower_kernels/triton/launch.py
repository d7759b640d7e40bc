"""What launching and building have in common for all Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.cpu import rows_contiguous

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PDL = False  # programmatic dependent launch: written, compiled, not yet measured (docs/gpu_kernels.md)


@dataclass(frozen=True)
class Build:
    """One compilation of an entry kernel that a launcher may ask for: the tests make all of them for every GPU.

    Attributes:
        kernel: the `@triton.jit` function.
        types: type per argument that is not a constant, in Triton's spelling ("*bf16", "i64", "fp32"). Pointers and
            integers are taken to be divisible by 16, as the released shapes are, unless they are in `odd`.
        constants: value per `tl.constexpr` argument, and None for a pointer that is not there.
        num_warps, num_stages: as for the launch.
        odd: arguments of which no divisibility is known.
        needs: on sm_90, instructions that PTX must hold, such as "wgmma".
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    odd: frozenset[str] = frozenset()
    needs: tuple[str, ...] = field(default=())


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device: this makes it the tensor's. (CPU tensors: Triton's interpreter.)"""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_dtype(op: str, **tensors: Tensor | None) -> None:
    """NotImplementedError for float64, which is for CPUs alone."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise NotImplementedError(f"{op} on {tensor.device.type}: {name} is float64, for which there is no kernel")


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 90, and number of processors; an H200's in the interpreter."""
    if device.type != "cuda":
        return 90, 132
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


__all__ = ["DTYPES", "Build", "check_dtype", "machine", "on_device_of", "rows_contiguous"]
