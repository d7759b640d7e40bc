"""Triton kernels in Triton's interpreter: laid over the CPU kernels, so that an op's own tests run through them.

tests/conftest.py sets TRITON_INTERPRET before anything can import Triton.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from twotower_kernels.ops import _library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Inside, every op that has a Triton kernel runs it, on CPU tensors."""
    overlay = torch.library.Library("twotower", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that a kernel is laid over another: so it should be
            for name, target in _library.CUDA.items():
                if target.startswith("triton."):
                    overlay.impl(name, _library.cuda_kernel(name), "CPU", allow_override=True)
        yield
    finally:
        overlay._destroy()
