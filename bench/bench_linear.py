"""The model's linear layers on a few rows: weights are read once from memory, which bounds them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from bench.timing import ORIGINAL, OURS, Case, close
from twotower_kernels.ops.linear import linear


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator, device=device) * inputs**-0.5).to(dtype)
    programs = {
        OURS: lambda: linear(x, weight),
        ORIGINAL: lambda: F.linear(x, weight),
        "PyTorch: widened": lambda: F.linear(x.float(), weight.float()).to(dtype),
    }
    moved = weight.numel() * weight.element_size()
    flops = 2 * rows * weight.numel()
    return Case("linear", f"{rows} × {inputs} → {outputs}", dtype, programs, close(5e-3), bytes=moved, flops=flops)


def cases(device: str = "cpu") -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield case(16, 2688, 10304, dtype, device)
        yield case(16, 4096, 2688, dtype, device)
        yield case(64, 2688, 10304, dtype, device)
    yield case(16, 2688, 131072, torch.bfloat16, device)
