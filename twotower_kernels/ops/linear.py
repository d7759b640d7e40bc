"""The model's linear layers on few rows. Kernel: `csrc/cpu/linear.cpp`. Not public: `F.linear` is what users have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels import cpu
from twotower_kernels.ops._library import define

# Up to how many rows the kernel is used on a CPU; PyTorch's library is at least as fast beyond (bench/bench_linear.py).
MOST_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x·weightᵀ + bias`, summed in float32 or wider and rounded once, by whichever program is faster.

    `F.linear` computes it wherever a gradient is wanted, dtypes differ, there is no kernel, or rows are many.

    Args:
        x: `[..., K]`. weight: `[N, K]`. bias: `[N]` or None.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if (
        x.device.type == "cpu"
        and x.shape[:-1].numel() <= MOST_ROWS.get(x.dtype, -1)
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
    ):
        return torch.ops.twotower.linear(x, weight, bias)
    return F.linear(x, weight, bias)


# --- registration ---------------------------------------------------------------------------------------------------


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: expected [N, {x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _empty(x, weight, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    cpu.call("linear", rows, weight, bias, out.view(rows.shape[0], weight.shape[0]))
    return out


define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", cpu=_linear, fake=_empty)
