"""Large tensors on large pages: with 4 KB pages, reading weights once from memory waits for the page tables too.

Measured on two cores of a Zen 4: a matrix of 16 rows times weights in memory takes 10 to 20 % less time.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

SIZE = 2**21  # of a large page, on x86-64 and on arm64 with 4 KB pages


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, for whose memory Linux is asked to use pages of 2 MB, wherever nothing has been written yet.

    That is advice: without such pages, on another system or a GPU, and for less than two of them, nothing changes.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // SIZE) * SIZE, end // SIZE * SIZE  # whole pages of this tensor's alone
    if last - first >= 2 * SIZE:
        _madvise()(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor
