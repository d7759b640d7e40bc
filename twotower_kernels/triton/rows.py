"""What kernels read of a batch row: its length, and which row of the stored states or contexts belongs to it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def length_at(lengths, offset, limit):
    """A length from the device, clamped to [0, limit]: nothing beyond is ever read. lengths None: limit."""
    if lengths is None:
        return limit
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + offset), 0), limit).to(tl.int32)


@triton.jit
def row_at(index, b, stride, num_rows):
    """The row of contexts or states that batch row b reads, clamped to [0, num_rows). index None: b."""
    if index is None:
        return b
    else:
        return tl.minimum(tl.maximum(tl.load(index + b * stride).to(tl.int64), 0), num_rows - 1)
