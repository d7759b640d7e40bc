"""The compiled CPU kernels: how a tensor is handed to them, and which instruction set they use."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# The order of DType in csrc/cpu/view.h.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@cache
def kernels() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or not for this interpreter.
    """
    try:
        return importlib.import_module("twotower_kernels._C")
    except ImportError as error:
        raise ImportError(
            "twotower_kernels._C, the compiled CPU kernels, cannot be imported "
            f"({error}); build it with `python setup.py build_ext --inplace`, or reinstall twotower-kernels"
        ) from error


def view(tensor: Tensor | None) -> View | None:
    """What a kernel is told of a tensor: pointer, dtype, sizes, strides. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    return tensor.data_ptr(), _CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def rows_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if its last dimension is not contiguous: what every kernel may rely on."""
    if tensor is None or tensor.ndim == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def call(name: str, *arguments: Any) -> None:
    """Calls a kernel, tensors as views; those whose last dimension is strided are copied first, so never pass an
    output of that kind."""
    kept = [rows_contiguous(a) if isinstance(a, Tensor) else a for a in arguments]
    getattr(kernels(), name)(*(view(a) if isinstance(a, Tensor) else a for a in kept))
