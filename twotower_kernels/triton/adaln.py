"""Gated residual, RMSNorm and adaLN modulation in one pass over a row. Formulas: `reference/adaln.py`.

One program per row, the whole row in registers: each tensor is read and written once, and a block of 16 rows of 2688
takes one launch, whose latency bounds it (16 rows of bfloat16 are 86 KB). Rounding after every operation of modulation
and residual is part of the definition; the norm itself is computed in float32 and rounded once, or once more before
the weight multiplies it.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, on_device_of, rows_contiguous

# Volatile loads keep their order, so all of them are under way before the first shuffle waits for x. Of plain ones the
# compiler moved those of weight, shift and scale, which are used last, behind it, and a row waited twice.
IN_ORDER = tl.constexpr(True)


@triton.jit
def adaln_norm_kernel(
    x,  # [B, S, H], the residual
    y,  # [B, S, H] or None
    gate,  # [B, H] or None
    weight,  # [H], None: 1
    shift,  # [B, H] or None
    scale,  # [B, H] or None
    h,  # [B, S, H] contiguous, or None
    normed,  # [B, S, H] contiguous, or None
    length,
    hidden_size,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    NORM_FIRST: tl.constexpr,
    ROUND_FIRST: tl.constexpr,  # what is normalised is rounded before the weight multiplies it
    BLOCK_H: tl.constexpr,  # a power of two, at least H
):
    token_row = tl.program_id(0).to(tl.int64)
    b, s = token_row // length, token_row % length
    offs_h = tl.arange(0, BLOCK_H)
    mask = offs_h < hidden_size
    X = x.dtype.element_ty
    if normed is not None:
        if weight is not None:
            weight_value = tl.load(weight + offs_h, mask=mask, other=0, volatile=IN_ORDER)
        if scale is not None:
            scale_value = tl.load(scale + b * stride_scale + offs_h, mask=mask, other=0, volatile=IN_ORDER)
            shift_value = tl.load(shift + b * stride_shift + offs_h, mask=mask, other=0, volatile=IN_ORDER)
    value = tl.load(x + b * stride_xb + s * stride_xt + offs_h, mask=mask, other=0, volatile=IN_ORDER)
    if y is not None:
        y_value = tl.load(y + b * stride_yb + s * stride_yt + offs_h, mask=mask, other=0, volatile=IN_ORDER)
        if gate is not None:
            gate_value = tl.load(gate + b * stride_gate + offs_h, mask=mask, other=0, volatile=IN_ORDER)
    value = value.to(tl.float32)
    if y is not None:
        Y = y.dtype.element_ty
        y_value = y_value.to(tl.float32)
        if gate is not None:
            y_value = (gate_value.to(Y).to(tl.float32) * y_value).to(Y).to(tl.float32)
        value = (value + y_value).to(X).to(tl.float32)
    if h is not None:
        tl.store(h + token_row * hidden_size + offs_h, value.to(X), mask=mask)
    if normed is not None:
        if scale is not None:
            scale_value = (1 + scale_value.to(X).to(tl.float32)).to(X).to(tl.float32)
            shift_value = shift_value.to(X).to(tl.float32)
        if scale is not None and not NORM_FIRST:
            value = ((value * scale_value).to(X).to(tl.float32) + shift_value).to(X).to(tl.float32)
        rstd = 1 / tl.sqrt_rn(tl.sum(value * value) / hidden_size + eps)
        value = value * rstd
        if ROUND_FIRST:
            value = value.to(X).to(tl.float32)
        if weight is not None:
            value = value * weight_value.to(tl.float32)
        if scale is not None and NORM_FIRST:
            value = (value.to(X).to(tl.float32) * scale_value).to(X).to(tl.float32) + shift_value
        tl.store(normed + token_row * hidden_size + offs_h, value.to(X), mask=mask)


def _tuning(hidden_size: int) -> tuple[int, int]:
    """(BLOCK_H, num_warps): about 16 numbers per thread, so that a row's loads are in flight together."""
    block_h = triton.next_power_of_2(hidden_size)
    return block_h, min(max(block_h // 512, 1), 16)


def _launch(
    op: str,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    h: Tensor | None,
    normed: Tensor | None,
    eps: float,
    norm_first: bool,
    round_first: bool = False,
) -> None:
    check_dtype(op, x=x, y=y, gate=gate, weight=weight, shift=shift, scale=scale)
    x, y, gate, weight, shift, scale = map(rows_contiguous, (x, y, gate, weight, shift, scale))  # type: ignore[assignment]
    batch, length, hidden_size = x.shape
    if x.numel() == 0:
        return
    block_h, num_warps = _tuning(hidden_size)
    strides = [0 if t is None else t.stride(0) for t in (gate, shift, scale)]
    with on_device_of(x):
        adaln_norm_kernel[(batch * length,)](
            *(x, y, gate, weight, shift, scale, h, normed),
            *(length, hidden_size, *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), *strides),
            eps,
            NORM_FIRST=norm_first,
            ROUND_FIRST=round_first,
            BLOCK_H=block_h,
            num_warps=num_warps,
        )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
    normed = x.new_empty(x.shape)
    if x.numel():
        rows = (1, -1, x.shape[-1])
        _launch(
            "rms_norm",
            x.reshape(rows),
            None,
            None,
            weight,
            None,
            None,
            None,
            normed.view(rows),
            eps,
            False,
            round_first,
        )
    return normed


def adaln_norm(
    x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, norm_first: bool
) -> Tensor:
    normed = x.new_empty(x.shape)
    _launch("adaln_norm", x, None, None, weight, shift, scale, None, normed, eps, norm_first)
    return normed


def gated_residual(residual: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    h = residual.new_empty(residual.shape)
    _launch("gated_residual", residual, y, gate, None, None, None, h, None, 0.0, False)
    return h


def gated_residual_adaln_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm_first: bool,
) -> tuple[Tensor, Tensor]:
    h, normed = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    _launch("gated_residual_adaln_norm", residual, y, gate, weight, shift, scale, h, normed, eps, norm_first)
    return h, normed


def builds(arch: int) -> Iterator[Build]:
    """What the launchers ask for: every dtype, with and without what is optional, in the sizes of the released model
    and of small ones. The same on every architecture."""
    integers = "length hidden_size stride_xb stride_xt stride_yb stride_yt stride_gate stride_shift stride_scale"
    for dtype in DTYPES.values():
        for hidden_size in (1024, 2688):
            block_h, num_warps = _tuning(hidden_size)
            for norm_first, modulated, with_y in ((True, True, True), (False, True, True), (False, False, False)):
                presence = {"x": 1, "y": with_y, "gate": with_y, "weight": 1, "shift": modulated, "scale": modulated}
                presence |= {"h": with_y, "normed": 1}
                types = {name: f"*{dtype}" for name, present in presence.items() if present}
                types |= {name: "i32" for name in integers.split()} | {"eps": "fp32"}
                constants: dict[str, object] = {name: None for name, present in presence.items() if not present}
                constants |= {"NORM_FIRST": norm_first, "ROUND_FIRST": False, "BLOCK_H": block_h}
                yield Build(adaln_norm_kernel, types, constants, num_warps=num_warps)
            # The last, plain one with what rms_norm has beside it.
            yield Build(adaln_norm_kernel, types, constants | {"ROUND_FIRST": True}, num_warps=num_warps)
            unweighted = {name: type for name, type in types.items() if name != "weight"}
            yield Build(adaln_norm_kernel, unweighted, constants | {"weight": None}, num_warps=num_warps)
