"""What kernels read of a row of the batch: how long it is, and which row of stored state or context it goes with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def length_at(lens, place, most):
    """A length from the device, within what there is room for: nothing beyond is ever read."""
    if lens is None:
        return most
    else:
        return tl.minimum(tl.maximum(tl.load(lens + place), 0), most).to(tl.int32)


@triton.jit
def row_at(index, b, stride, rows):
    """The row of contexts or states that batch row b reads."""
    if index is None:
        return b
    else:
        return tl.minimum(tl.maximum(tl.load(index + b * stride).to(tl.int64), 0), rows - 1)
