"""Gated residual, RMSNorm and adaLN modulation in one pass over a row. Formulas: `reference/adaln.py`.

One program per row, the whole row in registers: each tensor is read and written once, and a block of 16 rows of 2688
takes one launch, whose latency bounds it (16 rows of bfloat16 are 86 KB). Rounding after every operation of modulation
and residual is part of the definition; the norm itself is computed in float32 and rounded once.
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
    weight,  # [H], None: no norm is wanted
    shift,  # [B, H] or None
    scale,  # [B, H] or None
    h,  # [B, S, H] contiguous, or None
    normed,  # [B, S, H] contiguous, or None
    length,
    size,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    shift_batch,
    scale_batch,
    eps,
    NORM_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    row = tl.program_id(0).to(tl.int64)
    b, s = row // length, row % length
    column = tl.arange(0, BLOCK)
    inside = column < size
    X = x.dtype.element_ty
    if normed is not None:
        w = tl.load(weight + column, mask=inside, other=0, volatile=IN_ORDER)
        if scale is not None:
            factor = tl.load(scale + b * scale_batch + column, mask=inside, other=0, volatile=IN_ORDER)
            term = tl.load(shift + b * shift_batch + column, mask=inside, other=0, volatile=IN_ORDER)
    value = tl.load(x + b * x_batch + s * x_token + column, mask=inside, other=0, volatile=IN_ORDER)
    if y is not None:
        added = tl.load(y + b * y_batch + s * y_token + column, mask=inside, other=0, volatile=IN_ORDER)
        if gate is not None:
            by = tl.load(gate + b * gate_batch + column, mask=inside, other=0, volatile=IN_ORDER)
    value = value.to(tl.float32)
    if y is not None:
        Y = y.dtype.element_ty
        added = added.to(tl.float32)
        if gate is not None:
            added = (by.to(Y).to(tl.float32) * added).to(Y).to(tl.float32)
        value = (value + added).to(X).to(tl.float32)
    if h is not None:
        tl.store(h + row * size + column, value.to(X), mask=inside)
    if normed is not None:
        if scale is not None:
            factor = (1 + factor.to(X).to(tl.float32)).to(X).to(tl.float32)
            term = term.to(X).to(tl.float32)
        if scale is not None and not NORM_FIRST:
            value = ((value * factor).to(X).to(tl.float32) + term).to(X).to(tl.float32)
        inverse = 1 / tl.sqrt_rn(tl.sum(value * value) / size + eps)
        value = value * inverse * w.to(tl.float32)
        if scale is not None and NORM_FIRST:
            value = (value.to(X).to(tl.float32) * factor).to(X).to(tl.float32) + term
        tl.store(normed + row * size + column, value.to(X), mask=inside)


def _tuning(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): about 16 numbers per thread, so that a row's loads are in flight together."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 512, 1), 16)


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
) -> None:
    check_dtype(op, x=x, y=y, gate=gate, weight=weight, shift=shift, scale=scale)
    x, y, gate, weight, shift, scale = map(rows_contiguous, (x, y, gate, weight, shift, scale))  # type: ignore[assignment]
    batch, length, size = x.shape
    if x.numel() == 0:
        return
    block, warps = _tuning(size)
    strides = [0 if t is None else t.stride(0) for t in (gate, shift, scale)]
    with on_device_of(x):
        adaln_norm_kernel[(batch * length,)](
            *(x, y, gate, weight, shift, scale, h, normed),
            *(length, size, *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), *strides),
            eps,
            NORM_FIRST=norm_first,
            BLOCK=block,
            num_warps=warps,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = x.new_empty(x.shape)
    if x.numel():
        size = x.shape[-1]
        rows = x.reshape(1, -1, size)
        _launch("rms_norm", rows, None, None, weight, None, None, None, normed.view(1, -1, size), eps, False)
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
    integers = "length size x_batch x_token y_batch y_token gate_batch shift_batch scale_batch"
    for dtype in DTYPES.values():
        for size in (1024, 2688):
            block, warps = _tuning(size)
            for norm_first, modulated, added in ((True, True, True), (False, True, True), (False, False, False)):
                given = {"x": 1, "y": added, "gate": added, "weight": 1, "shift": modulated, "scale": modulated}
                given |= {"h": added, "normed": 1}
                types = {name: f"*{dtype}" for name, there in given.items() if there}
                types |= {name: "i32" for name in integers.split()} | {"eps": "fp32"}
                constants: dict[str, object] = {name: None for name, there in given.items() if not there}
                constants |= {"NORM_FIRST": norm_first, "BLOCK": block}
                yield Build(adaln_norm_kernel, types, constants, num_warps=warps)
