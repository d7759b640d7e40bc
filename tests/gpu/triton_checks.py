"""Triton kernels in Triton's interpreter: laid over the CPU kernels, so that an op's own tests run through them.

tests/conftest.py sets TRITON_INTERPRET before anything can import Triton.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.kernels.kernel_checks import laid_over
from twotower_kernels.ops import _library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOGETHER = 16  # products that a tensor core adds at once; the sides of tiles are powers of 2


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Inside, every op that has a Triton kernel runs it, on CPU tensors."""
    names = [name for name, target in _library.CUDA.items() if target.startswith("triton.")]
    kernels = {name: _library.cuda_kernel(name) for name in names}
    with laid_over(kernels), bfloat16_as_on_a_gpu(), products_in_order(), patched_once(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
        yield


@contextmanager
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.6's interpreter keeps bfloat16 as bits, which it cuts off where a GPU rounds to nearest. Inside, it
    rounds."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_to(self: Any, source: Any, target: Any) -> Any:
        source = widened(source)
        if target.scalar != tl.bfloat16:
            return source if target.scalar == source.dtype.scalar else cast(self, source, target)
        numbers = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).bfloat16()
        return TensorHandle(numbers.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    with mock.patch.object(InterpreterBuilder, "cast_impl", cast_to):
        yield


def widened(handle: Any) -> Any:
    """bfloat16, which the interpreter keeps as bits, as the numbers they stand for, everything else as it is."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy().reshape(handle.data.shape), tl.float32)


@contextmanager
def products_in_order() -> Iterator[None]:
    """Triton 3.6's interpreter leaves `tl.dot` to NumPy's BLAS, which sums in an order of its own for every processor
    and size of tile, and multiplies the bits of bfloat16 as integers.

    Inside, the order is that of a tensor core: the products of 16 consecutive k together, in pairs, then on to the
    accumulator. NumPy rounds each operation on arrays by itself, so that these are the same bits on every processor,
    whatever the tile's rows and columns. (One chain over all k would err twice as much as the CPU's own product, which
    is the yardstick here, and which sums in parts as well.)
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data
        left = np.moveaxis(widened(a).data.astype(total.dtype), -1, 0)[..., None]  # [K, ..., M, 1]
        right = np.moveaxis(widened(b).data.astype(total.dtype), -2, 0)[..., None, :]  # [K, ..., 1, N]
        with np.errstate(all="ignore"):
            for k in range(0, len(left), TOGETHER):
                terms = left[k : k + TOGETHER] * right[k : k + TOGETHER]
                while len(terms) > 1:
                    terms = terms[::2] + terms[1::2]
                total = total + terms[0]
        return TensorHandle(total, d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield


@contextmanager
def patched_once() -> Iterator[None]:
    """Triton 3.6's interpreter puts itself into `triton.language` anew for every call from one kernel function to
    another, which takes longer than most of these functions. Inside, it does so where it has not yet."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def unless_done(function: Any) -> Any:
        used = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        done = used and not any(tl.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if done else patch(function)

    with mock.patch.object(interpreter, "_patch_lang", unless_done):
        yield
