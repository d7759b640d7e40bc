"""The linear layer. Formula: `reference/linear.py`; kernel: `csrc/cpu/linear.cpp`, which states the order of summation.

On a GPU it is `F.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from twotower_kernels import cpu
from twotower_kernels.ops import quantized
from twotower_kernels.ops._direct import entries
from twotower_kernels.ops._library import check_alike, define
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import autocasts, lowered
from twotower_kernels.quantization import QuantizedTensor


def linear(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`x·weightᵀ + bias`, summed in float32 (float64 for float64) and rounded once.

    On a CPU every number of the result is summed in one order: a row's bits depend on that row, the weight and the
    bias, and on the instruction set; not on the number of rows, their place, their strides, or the threads.

    Args:
        x: `[..., K]`; float64, float32, bfloat16 or float16; any strides.
        weight: `[R, K]`, dtype of `x`. Rows that are contiguous are read in place. Or quantized (`tt.quantize`): what
            is multiplied is what its `dequantize` gives, exactly, and nothing is differentiable.
        bias: `[R]`, dtype of `x`, or None.

    Returns:
        `[..., R]` in the dtype of `x`; under autocast as `F.linear`. Differentiable in all arguments.

    Raises:
        ValueError: wrong shape or device. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling() and (out := entries().linear(x, weight, bias)) is not None:
        return out
    if isinstance(weight, QuantizedTensor):
        return quantized.linear(x, weight, bias)
    if x.device.type in ("cpu", "meta"):
        return call("linear", x, weight, bias)
    if autocasts(x):
        _check_shapes(x, weight, bias)
    else:
        _check(x, weight, bias)
    return F.linear(x, weight, bias)


# --- registration ---------------------------------------------------------------------------------------------------


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        expected = "K" if x.ndim == 0 else x.shape[-1]
        raise ValueError(f"weight: expected [R, {expected}] for x {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_shapes(x, weight, bias)
    check_alike("x", x, weight=weight, bias=bias)


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _empty(x, weight, bias)
    cpu.call("linear", x, weight, bias, out)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    count = grad.shape[:-1].numel()
    rows = grad.reshape(count, grad.shape[-1])  # [M, R]
    with torch.autocast(grad.device.type, enabled=False):  # in the dtype of the forward pass
        return (
            torch.matmul(grad, weight) if of_x else None,
            rows.T @ x.reshape(count, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=_check,
    cpu=_linear,
    fake=_empty,
    backward=_backward,
    setup_context=_save,
    autocast=lowered,
)
