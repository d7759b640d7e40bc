"""Router, choice and plan on GPUs in plain PyTorch: stand-ins until the CUDA C++ kernels come, no kernels themselves.

Formulas: `reference/moe.py`. Each is some ten small launches. None waits for the device, so a graph captures them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    return torch.mm(x.double(), gate_weight.double().t())


def moe_route(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    softmax: bool,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """A stable descending sort takes the lowest place among equals and NaN first; `torch.topk` promises neither."""
    score = logits.softmax(1) if softmax else logits.sigmoid()
    choice = score if correction_bias is None else score + correction_bias.to(score.dtype)
    if n_group > 1:
        groups = choice.view(len(choice), n_group, choice.shape[1] // n_group)
        two = groups.sort(dim=2, descending=True).values[..., :2].sum(2)
        order = two.sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_group, device=order.device).expand_as(order))
        choice = torch.where((rank < topk_group)[..., None], groups, 0).flatten(1)
    experts = choice.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return (weights * scaling).float(), experts.int()


def moe_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """An expert's pairs lie between two bounds of the sorted numbers; numbers outside [0, E) lie between none."""
    ordered, pairs = experts.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(ordered, bounds)
    return offsets.diff(), offsets, pairs
