"""Weights in eight and four bits: what a packed weight means, and how one is made.

A weight `[..., R, K]` is cut along K into groups of G columns, and every group has a scale:

    w[r, k] = code[r, k] · scale[r, k // G] · global      (global is 1 in all formats but nvfp4)

| format | codes               | G                | scales                       | global                     |
|--------|---------------------|------------------|------------------------------|----------------------------|
| int8   | integers -128 … 127 | K, or 16, 32, …  | float32, max |w| / 127.5     |                            |
| int4   | integers -8 … 7     | 32, or 16, 64, … | bfloat16, max |w| / 7.5      |                            |
| fp8    | e4m3, to ±448       | K, or the matrix | float32, max |w| / 448       |                            |
| nvfp4  | e2m1, to ±6         | 16               | e4m3, max |w| / 6 / global   | float32, max |w| / 6 / 448 |
| mxfp4  | e2m1, to ±6         | 32               | e8m0, 2^(⌊log₂ max |w|⌋ - 2) |                            |

(max |w| is the group's, for the global scale the matrix's.) A code is the nearest one to w / (scale · global), of two
equally near ones the even one, and the last one beyond the end.
e4m3 and e8m0: OCP Open Compute, OFP8 and Microscaling Formats (MX) v1.0; nvfp4: NVIDIA, Introducing NVFP4 (2025). The
divisors 127.5 and 7.5 spread 2^b codes over the range, as the compressed-tensors library does: the largest number loses
half a step, and all steps are smaller than with 127 and 7.

Packed, a byte holds the codes of two columns, the even one in its lower half: int4 as code + 8, e2m1 as its sign, two
bits of exponent and one of mantissa.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "fp8", "nvfp4", "mxfp4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
E4M3_MAX, E2M1_MAX = 448.0, 6.0


class Packed(NamedTuple):
    """A quantized weight, in the bytes that are stored."""

    format: str
    group_size: int  # columns per scale; -1: a scale for the whole matrix
    data: Tensor  # [..., R, K] int8 or float8_e4m3fn, [..., R, K/2] uint8
    scales: Tensor  # [..., R, K/G]; of a whole matrix [..., 1, 1]. mxfp4: uint8, the exponents plus 127
    global_scale: Tensor | None  # nvfp4: [...] float32


def quantize(weight: Tensor, format: str, group_size: int) -> Packed:
    """The packed weight, by the rules above, in float64. `weight`: `[..., R, K]`, all finite; G must divide K."""
    w = weight.double()
    groups = grouped(w, group_size)  # [..., R, K/G, G]
    largest = groups.abs().amax(-1) if group_size != -1 else w.abs().amax((-1, -2), keepdim=True)
    whole = None
    if format in ("int8", "int4"):
        scales = (largest / 127.5).float() if format == "int8" else (largest / 7.5).bfloat16()
    elif format == "fp8":
        scales = (largest / E4M3_MAX).float()
    elif format == "nvfp4":
        whole = (w.abs().amax((-1, -2)) / E2M1_MAX / E4M3_MAX).float()
        scales = divided(largest / E2M1_MAX, whole.double()[..., None, None]).to(torch.float8_e4m3fn)
    else:
        exponent = torch.where(largest > 0, largest, 1).log2().floor() - 2
        scales = torch.where(largest > 0, exponent.clamp(-127, 127) + 127, 0).to(torch.uint8)
    step = steps(format, scales, whole)  # [..., R or 1, K/G or 1]
    codes = divided(groups, step[..., None]).flatten(-2)
    return Packed(format, group_size, packed(format, codes), scales, whole)


def dequantize(weight: Packed) -> Tensor:
    """`[..., R, K]` in float64."""
    step = steps(weight.format, weight.scales, weight.global_scale)
    return (grouped(unpacked(weight.format, weight.data), weight.group_size) * step[..., None]).flatten(-2)


def grouped(w: Tensor, group_size: int) -> Tensor:
    """`[..., R, K]` as `[..., R, K/G, G]`."""
    return w.unflatten(-1, (1, w.shape[-1]) if group_size == -1 else (w.shape[-1] // group_size, group_size))


def steps(format: str, scales: Tensor, whole: Tensor | None) -> Tensor:
    """What a code of 1 stands for, in float64."""
    if format == "mxfp4":
        return torch.exp2(scales.double() - 127)
    return scales.double() if whole is None else scales.double() * whole.double()[..., None, None]


def divided(x: Tensor, step: Tensor) -> Tensor:
    """x / step, and 0 where the step is 0."""
    return torch.where(step == 0, 0, x / torch.where(step == 0, 1, step))


def packed(format: str, codes: Tensor) -> Tensor:
    """Codes before rounding, `[..., R, K]`, as bytes."""
    if format == "int8":
        return codes.round().clamp(-128, 127).to(torch.int8)
    if format == "fp8":  # PyTorch rounds to nearest even, and what lies beyond 448 to NaN
        return codes.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if format == "int4":
        nibbles = codes.round().clamp(-8, 7) + 8
    else:
        distance = (codes.abs()[..., None] - E2M1).abs()  # [..., R, K, 8]
        distance[..., 1::2] += 1e-12  # of two equally near ones the even one, whose mantissa bit is 0
        nibbles = distance.argmin(-1) + 8 * codes.signbit()
    pairs = nibbles.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpacked(format: str, data: Tensor) -> Tensor:
    """The codes, `[..., R, K]` in float64."""
    if format in ("int8", "fp8"):
        return data.double()
    nibbles = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    if format == "int4":
        return nibbles.double() - 8
    return E2M1[(nibbles & 7).long()] * torch.where(nibbles < 8, 1.0, -1.0)
