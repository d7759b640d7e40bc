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
    y_batch,
    y_token,
    z_batch,
    z_token,
    eps,
    SIZE: tl.constexpr,  # of a group
    BLOCK: tl.constexpr,  # a power of two, at least SIZE
):
    row = (tl.program_id(0) // groups).to(tl.int64)
    b, t = row // length, row % length
    n = tl.arange(0, BLOCK)
    inside = n < SIZE
    column = tl.program_id(0) % groups * SIZE + n
    by = tl.load(weight + column, mask=inside, other=0, volatile=IN_ORDER)
    value = tl.load(y + b * y_batch + t * y_token + column, mask=inside, other=0, volatile=IN_ORDER).to(tl.float32)
    gate = tl.load(z + b * z_batch + t * z_token + column, mask=inside, other=0, volatile=IN_ORDER).to(tl.float32)
    value *= gate / (1 + tl.exp(-gate))
    inverse = 1 / tl.sqrt_rn(tl.sum(value * value) / SIZE + eps)
    value = value * inverse * by.to(tl.float32)
    tl.store(out + row * groups * SIZE + column, value.to(out.dtype.element_ty), mask=inside)


def _tuning(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): about 16 numbers per thread, so that a group's loads are in flight together."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 512, 1), 16)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    check_dtype("gated_rms_norm", y=y)
    y, z, weight = map(rows_contiguous, (y, z, weight))  # type: ignore[assignment]
    out = y.new_empty(y.shape)
    if out.numel() == 0:
        return out
    batch, length, width = y.shape
    size = width // n_groups
    block, warps = _tuning(size)
    with on_device_of(y):
        gated_rms_norm_kernel[(batch * length * n_groups,)](
            *(y, z, weight, out, length, n_groups, *y.stride()[:2], *z.stride()[:2], eps),
            SIZE=size,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def builds(arch: int) -> Iterator[Build]:
    """Every dtype, in groups of the released model and larger ones. The same on every architecture."""
    integers = ("length", "groups", "y_batch", "y_token", "z_batch", "z_token")
    for dtype in DTYPES.values():
        for size in (512, 4096):
            block, warps = _tuning(size)
            types = {name: f"*{dtype}" for name in ("y", "z", "weight", "out")}
            types |= {name: "i32" for name in integers} | {"eps": "fp32"}
            odd = frozenset(("length", "groups"))
            yield Build(gated_rms_norm_kernel, types, {"SIZE": size, "BLOCK": block}, warps, odd=odd)
