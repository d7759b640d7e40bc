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


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Inside, every op that has a Triton kernel runs it, on CPU tensors."""
    names = [name for name, target in _library.CUDA.items() if target.startswith("triton.")]
    kernels = {name: _library.cuda_kernel(name) for name in names}
    with laid_over(kernels), bfloat16_as_on_a_gpu(), patched_once(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
        yield


@contextmanager
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.6's interpreter keeps bfloat16 as bits, which it cuts off where a GPU rounds to nearest, and multiplies
    as integers in `tl.dot`. Inside, it rounds and multiplies numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
        return TensorHandle(bits.view(torch.bfloat16).float().numpy().reshape(handle.data.shape), tl.float32)

    def cast_to(self: Any, source: Any, target: Any) -> Any:
        source = widened(source)
        if target.scalar != tl.bfloat16:
            return source if target.scalar == source.dtype.scalar else cast(self, source, target)
        numbers = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).bfloat16()
        return TensorHandle(numbers.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    def dot_of(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    with mock.patch.multiple(InterpreterBuilder, cast_impl=cast_to, create_dot=dot_of):
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
