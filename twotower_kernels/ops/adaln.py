"""RMSNorm, adaLN modulation and the gated residual. Formulas: `reference/adaln.py`; kernel: `csrc/cpu/adaln.cpp`."""

from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import check_floats, define
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import autocasts, cast_to
from twotower_kernels.options.arguments import real

ORDERS = ("modulate_norm", "norm_modulate")


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, round_first: bool = False) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467, eq. 4), the weight multiplied before rounding.

    Args:
        x: `[..., H]`; float64, float32, bfloat16 or float16; any strides.
        weight: `[H]`, any of these dtypes, or None for 1.
        eps: added to the mean square.
        round_first: what is normalised is rounded to the dtype of `x` before the weight multiplies it, and the product
            again: the norm of Llama, Qwen and LLaDA. In bfloat16 about a quarter of the numbers differ.

    Returns:
        `[..., H]` in the dtype of `x`, under autocast too. Not differentiable.

    Raises:
        ValueError: wrong shape or device. TypeError: wrong dtype.
    """
    return call("rms_norm", x, weight, real("eps", eps), round_first)


def adaln_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> Tensor:
    """RMSNorm with adaLN modulation before or after it; without `shift` and `scale`, plain RMSNorm.

    Source: adaLN-single of PixArt-α (arXiv 2310.00426), after DiT (arXiv 2212.09748).

    Args:
        x: `[B, S, H]`; float64, float32, bfloat16 or float16; any strides.
        weight: `[H]`, any of these dtypes.
        shift, scale: `[B, H]`, or both None; rounded to the dtype of `x`.
        eps: of the norm.
        order: "modulate_norm" (`rms(x·(1+scale) + shift)`: Mamba-2 and attention layers) or "norm_modulate"
            (`rms(x)·(1+scale) + shift`: MoE and dense MLP layers).

    Returns:
        `[B, S, H]` in the dtype of `x`, under autocast too. Not differentiable.

    Raises:
        ValueError: unknown order, wrong shape or device, only one of shift and scale. TypeError: wrong dtype.
    """
    _check_order(order)
    return call("adaln_norm", x, weight, shift, scale, real("eps", eps), order == "norm_modulate")


def gated_residual(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """`residual + gate · y`, or `residual + y` without a gate.

    Args:
        residual: `[B, S, H]`; its dtype is the result's. It may be wider than that of `y` (`residual_in_fp32`); under
            autocast it is widened where `y` is wider.
        y: `[B, S, H]`.
        gate: `[B, H]` or None; rounded to the dtype of `y`, as is its product with `y`.

    Returns:
        `[B, S, H]` in the dtype of `residual`. Not differentiable.

    Raises:
        ValueError: wrong shape or device. TypeError: wrong dtype.
    """
    residual, y = _widened(residual, y)
    return torch.ops.twotower.gated_residual.default(residual, y, gate)


def gated_residual_adaln_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> tuple[Tensor, Tensor]:
    """One layer's gated residual and the next layer's modulated norm in one pass.

    Arguments and errors as in `gated_residual` and `adaln_norm`. Returns `(h, normed)`, both `[B, S, H]` in the dtype
    of `residual`; the norm reads `h` as rounded to it, so the result is bit for bit that of the two in a row.
    """
    _check_order(order)
    residual, y = _widened(residual, y)
    return call(
        "gated_residual_adaln_norm", residual, y, gate, weight, shift, scale, real("eps", eps), order == "norm_modulate"
    )


def _widened(residual: Tensor, y: Tensor, *others: Any) -> tuple[Any, ...]:
    """Under autocast, the residual in the dtype of `residual + y`."""
    if autocasts(residual):
        (residual,) = cast_to(torch.promote_types(residual.dtype, y.dtype), residual)
    return residual, y, *others


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")


# --- registration ---------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *_: object,
) -> None:
    if (shift is None) != (scale is None):
        raise ValueError("shift and scale: expected both or neither, got one")
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"{'x' if y is None else 'residual'}: expected [B, S, H], got {list(shape)}")
    if y is not None and y.shape != shape:
        raise ValueError(f"y: expected the residual's shape {list(shape)}, got {list(y.shape)}")
    if weight is not None and weight.shape != shape[2:]:
        raise ValueError(f"weight: expected shape {list(shape[2:])}, got {list(weight.shape)}")
    of_rows = (shape[0], shape[2])
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        if vector is not None and vector.shape != of_rows:
            raise ValueError(f"{name}: expected shape {list(of_rows)}, got {list(vector.shape)}")
    given = "x" if y is None else "residual"
    check_floats(x, **{given: x}, y=y, gate=gate, weight=weight, shift=shift, scale=scale)
    if y is not None and y.dtype != x.dtype and torch.promote_types(x.dtype, y.dtype) != x.dtype:
        raise TypeError(f"y: expected {x.dtype} as residual, or a narrower dtype, got {y.dtype}")


def _check_rms_norm(x: Tensor, weight: Tensor | None, *_: object) -> None:
    shape = x.shape
    if not shape:
        raise ValueError("x: expected [..., H], got a tensor without dimensions")
    if weight is not None and weight.shape != shape[-1:]:
        raise ValueError(f"weight: expected [H] for x [..., H], got {list(weight.shape)} for {list(shape)}")
    check_floats(x, x=x, weight=weight)


def _to(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return vector if vector is None or vector.dtype == like.dtype else vector.to(like.dtype)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
    normed = _empty(x)
    cpu.call("rms_norm", x, weight, normed, eps, round_first)
    return normed


def _adaln_norm(
    x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, norm_first: bool
) -> Tensor:
    normed = _empty(x)
    cpu.call(
        "gated_residual_adaln_norm", x, None, None, weight, _to(shift, x), _to(scale, x), None, normed, eps, norm_first
    )
    return normed


def _gated_residual(residual: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    h = _empty(residual)
    cpu.call("gated_residual_adaln_norm", residual, y, _to(gate, y), None, None, None, h, None, 0.0, False)
    return h


def _gated_residual_adaln_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm_first: bool,
) -> tuple[Tensor, Tensor]:
    h, normed = _empty(residual), _empty(residual)
    vectors = _to(gate, y), weight, _to(shift, residual), _to(scale, residual)
    cpu.call("gated_residual_adaln_norm", residual, y, *vectors, h, normed, eps, norm_first)
    return h, normed


define(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool round_first) -> Tensor",
    check=_check_rms_norm,
    cpu=_rms_norm,
    cuda="triton.adaln:rms_norm",
    fake=lambda x, *_: _empty(x),
)
define(
    "adaln_norm(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, float eps, bool norm_first) -> Tensor",
    check=lambda x, *vectors: _check(x, None, None, *vectors),
    cpu=_adaln_norm,
    cuda="triton.adaln:adaln_norm",
    fake=lambda x, *_: _empty(x),
)
define(
    "gated_residual(Tensor residual, Tensor y, Tensor? gate) -> Tensor",
    check=lambda residual, y, gate: _check(residual, y, gate, None, None, None),
    cpu=_gated_residual,
    cuda="triton.adaln:gated_residual",
    fake=lambda residual, *_: _empty(residual),
    autocast=_widened,
)
define(
    "gated_residual_adaln_norm(Tensor residual, Tensor y, Tensor? gate, Tensor weight, Tensor? shift, Tensor? scale, "
    "float eps, bool norm_first) -> (Tensor, Tensor)",
    check=_check,
    cpu=_gated_residual_adaln_norm,
    cuda="triton.adaln:gated_residual_adaln_norm",
    fake=lambda residual, *_: (_empty(residual), _empty(residual)),
    autocast=_widened,
)
