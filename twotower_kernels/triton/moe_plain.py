"""Parts of the mixture of experts on GPUs that are plain PyTorch: stand-ins for kernels to come, no kernels themselves.

Formulas: `reference/moe.py`. Each is a few small launches. None waits for the device, so a graph captures them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    return torch.mm(x.double(), gate_weight.double().t())


def plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, offsets and pairs of a call that brings no plan. An expert's pairs lie between two bounds of the sorted
    numbers; numbers outside [0, E), which the kernel of `moe_plan` stops at, lie between none."""
    ordered, pairs = experts.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(ordered, bounds)
    return offsets.diff(), offsets, pairs
