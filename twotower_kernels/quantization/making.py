"""From a weight to its codes and scales. The rules: `reference/quantization.py`."""

import math

import torch
from torch import Tensor

from twotower_kernels.options.arguments import whole
from twotower_kernels.quantization.weights import FORMATS, GROUP, WIDTHS, QuantizedTensor

GROUPS = {"int8": WIDTHS, "int4": WIDTHS, "fp8": (), "nvfp4": (16,), "mxfp4": (32,)}
PIECE = 2**22  # numbers that are worked on at a time, so that a large weight needs little beside itself
E4M3_MAX, E2M1_MAX = 448.0, 6.0
# Halfway between e2m1's magnitudes. The code before is the even one at the first, third, fifth and seventh.
BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize(weight: Tensor, format: str = "int4", *, group_size: int | None = None) -> QuantizedTensor:
    """A weight in eight or four bits.

    A scale per group of columns is chosen so that the group's largest number has the largest code, and every number
    becomes the nearest code, of two equally near ones the even one. Source: symmetric quantization to nearest, as in
    the compressed-tensors library (integers); OCP Microscaling Formats v1.0 (mxfp4, e4m3, e2m1); NVFP4 (NVIDIA, 2025).

    Args:
        weight: `[..., R, K]`; float64, float32, bfloat16 or float16; finite. Leading dimensions are experts, say.
        format: "int8", "int4", "fp8" (e4m3), "nvfp4" or "mxfp4"; 8, 4.5, 8, 4.5 and 4.25 bits per number by default.
        group_size: columns per scale, which must divide K. int8: 16, 32, 64 or 128, None a scale per row. int4: the
            same, None is 32. fp8: None a scale per row, -1 one per matrix. nvfp4: 16, mxfp4: 32, or None.

    Returns:
        A `QuantizedTensor` on the device of `weight`.

    Raises:
        ValueError: an unknown format, a group size that the format does not have or that does not divide K, a weight of
            fewer than two dimensions, or with an infinity or NaN. TypeError: wrong dtype.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.ndim < 2:
        raise ValueError(f"weight: expected [..., R, K], got {list(weight.shape)}")
    *leading, rows, columns = weight.shape
    group = _group(format, group_size, columns)
    matrices = weight.detach().reshape(math.prod(leading), rows, columns)
    wholes = [_whole(format, group, matrix) for matrix in matrices]
    per_piece = max(PIECE // max(columns, 1), 1)
    parts = [
        _rows(format, group, piece, scale)
        for matrix, scale in zip(matrices, wholes, strict=True)
        for piece in matrix.split(per_piece)
    ]
    if not parts:
        parts = [_rows(format, group, weight.new_zeros(0, columns), weight.new_zeros((), dtype=torch.float32))]
    data, scales = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    data = data.reshape(*leading, rows, data.shape[-1])
    one = torch.stack(wholes).reshape(leading) if wholes else torch.zeros(leading, device=weight.device)
    if group == -1:
        return QuantizedTensor(format, data, one[..., None, None])
    scales = scales.reshape(*leading, rows, scales.shape[-1])
    return QuantizedTensor(format, data, scales, one if format == "nvfp4" else None)


def _group(format: str, group_size: int | None, columns: int) -> int:
    """Columns per scale; -1: the matrix."""
    if group_size is None:
        group = GROUP.get(format, max(columns, 1))
    else:
        group = whole("group_size", group_size)
        allowed = (*GROUPS[format], *([-1] if format == "fp8" else []))
        if group not in allowed and not (format in ("int8", "fp8") and group == columns):
            raise ValueError(f"group_size: expected None or one of {allowed} for {format}, got {group_size}")
    if group != -1 and columns % group:
        raise ValueError(f"group_size: expected a divisor of the {columns} columns, got {group}")
    return group


def _whole(format: str, group: int, matrix: Tensor) -> Tensor:
    """The scale of the whole matrix, 0-d float32; 1 where the format has none."""
    low, high = matrix.aminmax() if matrix.numel() else matrix.new_zeros(2)  # which copies nothing
    largest = torch.maximum(-low, high).double()
    if not torch.isfinite(largest):
        raise ValueError("weight: expected finite numbers, got an infinity or NaN")
    if format == "nvfp4":
        return (largest / E2M1_MAX / E4M3_MAX).float()
    return (largest / E4M3_MAX).float() if group == -1 else torch.ones((), device=matrix.device)


def _rows(format: str, group: int, rows: Tensor, whole_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Data and scales of some rows `[R, K]`."""
    w = rows.double() if rows.dtype == torch.float64 else rows.float()
    groups = w.unflatten(-1, (1 if group == -1 else w.shape[-1] // group, w.shape[-1] if group == -1 else group))
    largest = groups.abs().amax(-1) if groups.shape[-1] else w.new_zeros(groups.shape[:-1])
    if format == "int8":
        step = scales = (largest / 127.5).float()
    elif format == "int4":
        scales = (largest / 7.5).bfloat16()
        step = scales.to(w.dtype)
    elif format == "fp8":
        step = scales = whole_scale.expand(largest.shape) if group == -1 else (largest / E4M3_MAX).float()
    elif format == "nvfp4":
        scales = _divided(largest / E2M1_MAX, whole_scale).to(torch.float8_e4m3fn)
        step = scales.to(w.dtype) * whole_scale
    else:
        exponent = (torch.frexp(largest).exponent - 3).clamp(-127, 127)
        scales = torch.where(largest > 0, exponent + 127, 0).to(torch.uint8)
        step = torch.ldexp(torch.ones_like(largest), exponent)
    return _packed(format, _divided(groups, step[..., None]).flatten(-2)), scales


def _divided(x: Tensor, step: Tensor) -> Tensor:
    """x / step, and 0 where the step is 0, which no other number than 0 has."""
    return torch.where(step == 0, 0, x / step)


def _packed(format: str, codes: Tensor) -> Tensor:
    if format == "int8":
        return codes.round_().clamp_(-128, 127).to(torch.int8)
    if format == "fp8":
        return codes.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if format == "int4":
        nibbles = codes.round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    else:
        size, edges = codes.abs(), torch.tensor(BETWEEN, dtype=codes.dtype, device=codes.device)
        below = torch.bucketize(size, edges)  # halfway belongs to the code before ...
        nibbles = below + ((size == edges[below.clamp(max=6)]) & (below % 2 == 1))  # ... unless that is odd
        nibbles = (nibbles + 8 * codes.signbit()).to(torch.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4
