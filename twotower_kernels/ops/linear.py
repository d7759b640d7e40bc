"""The model's linear layers on a CPU. Kernel: `csrc/cpu/linear.cpp`. Not public: `F.linear` is what users have."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels import cpu
from twotower_kernels.ops._library import check_alike, define
from twotower_kernels.ops._transforms import lowered

# Up to how many rows the kernel is used; libraries that block all three dimensions win beyond (bench/bench_linear.py).
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
# The same for 16-bit numbers on processors that do not multiply them: there PyTorch is slower at any number of rows,
# and beyond this one the weight is widened for its float32 product, a piece at a time.
MOST_ROWS_WIDENED, PIECE = 256, 4096


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x·weightᵀ + bias`, summed in float32 or wider and rounded once, by whichever program is fastest.

    `F.linear` computes it on other devices, and wherever a gradient is wanted or dtypes differ.

    Args:
        x: `[..., K]`. weight: `[N, K]`. bias: `[N]` or None.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if (
        x.device.type == "cpu"
        and x.dtype in MOST_ROWS
        and (x.dtype != torch.float32 or torch.compiler.is_compiling() or _few(x))
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
    ):
        if torch.compiler.is_compiling() and x.dtype == torch.float32:
            return torch.ops.twotower.linear.traced(x, weight, bias)
        return torch.ops.twotower.linear.default(x, weight, bias)
    return F.linear(x, weight, bias)


def _few(x: Tensor) -> bool:
    return x.shape[:-1].numel() <= MOST_ROWS[x.dtype]


# --- registration ---------------------------------------------------------------------------------------------------


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this dtype, of 16 bits, without widening them first."""
    return dtype == torch.bfloat16 and "avx512bf16" in cpu.kernels().isas()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        expected = "K" if x.ndim == 0 else x.shape[-1]
        raise ValueError(f"weight: expected [N, {expected}] for x {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    check_alike("x", x, weight=weight, bias=bias)


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    narrow, count = x.dtype.itemsize == 2, x.shape[:-1].numel()
    multiplies = not narrow or _multiplies(x.dtype)
    if narrow and multiplies and count > MOST_ROWS[x.dtype]:
        return F.linear(x, weight, bias)
    out = _empty(x, weight, bias)
    rows, flat = x.reshape(count, x.shape[-1]), out.view(count, weight.shape[0])
    if multiplies or count <= MOST_ROWS_WIDENED:
        cpu.call("linear", rows, weight, bias, flat)
    else:
        wide = rows.float()
        for begin in range(0, len(weight), PIECE):
            part = slice(begin, begin + PIECE)
            flat[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out


def _traced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias) if _few(x) else F.linear(x, weight, bias)


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", check=_check, cpu=_linear, fake=_empty, autocast=lowered
)
# For traces in float32, which leave open how many rows there are: the choice that `linear` makes before the call.
define(
    "linear.traced(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=_check,
    cpu=_traced,
    fake=_empty,
    autocast=lowered,
)
