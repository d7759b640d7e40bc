"""Mamba-2's gated norm: RMSNorm of y SiLU(z) within groups of channels. Formula: `reference/mamba2.py`.

One program per row and group, the group in registers: every tensor is read and written once. 16 rows of 4096 in 8
groups are 128 programs of one warp, and 0.4 MB of bfloat16: a launch, whose latency bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, on_device_of, rows_contiguous

IN_ORDER = tl.constexpr(True)  # the loads, see adaln.py: without it weight's came behind the first exponentials


@triton.jit
def gated_rms_norm_kernel(
    y,  # [B, L, D]
    z,  # [B, L, D]
    weight,  # [D]
    out,  # [B, L, D] contiguous
    length,
    groups,
    stride_yb,
    stride_yt,
    stride_zb,
    stride_zt,
    eps,
    GROUP_SIZE: tl.constexpr,  # of a group
    BLOCK_SIZE: tl.constexpr,  # a power of two, at least GROUP_SIZE
):
    token_row = (tl.program_id(0) // groups).to(tl.int64)
    b, t = token_row // length, token_row % length
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < GROUP_SIZE
    channel = tl.program_id(0) % groups * GROUP_SIZE + offs
    weight_value = tl.load(weight + channel, mask=mask, other=0, volatile=IN_ORDER)
    value = tl.load(y + b * stride_yb + t * stride_yt + channel, mask=mask, other=0, volatile=IN_ORDER).to(tl.float32)
    gate = tl.load(z + b * stride_zb + t * stride_zt + channel, mask=mask, other=0, volatile=IN_ORDER).to(tl.float32)
    value *= gate / (1 + tl.exp(-gate))
    rstd = 1 / tl.sqrt_rn(tl.sum(value * value) / GROUP_SIZE + eps)
    value = value * rstd * weight_value.to(tl.float32)
    tl.store(out + token_row * groups * GROUP_SIZE + channel, value.to(out.dtype.element_ty), mask=mask)


def _tuning(group_size: int) -> tuple[int, int]:
    """(BLOCK_SIZE, num_warps): about 16 numbers per thread, so that a group's loads are in flight together."""
    block_size = triton.next_power_of_2(group_size)
    return block_size, min(max(block_size // 512, 1), 16)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    check_dtype("gated_rms_norm", y=y)
    y, z, weight = map(rows_contiguous, (y, z, weight))  # type: ignore[assignment]
    out = y.new_empty(y.shape)
    if out.numel() == 0:
        return out
    batch, length, width = y.shape
    group_size = width // n_groups
    block_size, num_warps = _tuning(group_size)
    with on_device_of(y):
        gated_rms_norm_kernel[(batch * length * n_groups,)](
            *(y, z, weight, out, length, n_groups, *y.stride()[:2], *z.stride()[:2], eps),
            GROUP_SIZE=group_size,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )
    return out


def builds(arch: int) -> Iterator[Build]:
    """Every dtype, in groups of the released model and larger ones. The same on every architecture."""
    integers = ("length", "groups", "stride_yb", "stride_yt", "stride_zb", "stride_zt")
    for dtype in DTYPES.values():
        for group_size in (512, 4096):
            block_size, num_warps = _tuning(group_size)
            types = {name: f"*{dtype}" for name in ("y", "z", "weight", "out")}
            types |= {name: "i32" for name in integers} | {"eps": "fp32"}
            odd = frozenset(("length", "groups"))
            yield Build(
                gated_rms_norm_kernel, types, {"GROUP_SIZE": group_size, "BLOCK_SIZE": block_size}, num_warps, odd=odd
            )
