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


def rows_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if its last dimension is not contiguous: what every kernel may rely on."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return tensor if not strides or strides[-1] == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def call(name: str, *arguments: Any) -> Any:
    """Calls a kernel, which is told of each tensor its pointer, dtype, sizes and strides, and returns its answer, if it
    has one. Tensors whose last dimension is strided are copied first, so never pass an output of that kind."""
    copies, told = [], []
    for a in arguments:
        if isinstance(a, Tensor):
            shape, strides = a.shape, a.stride()
            if strides and strides[-1] != 1 and shape[-1] > 1:
                a = a.contiguous()
                strides = a.stride()
                copies.append(a)  # it must outlive the call
            a = a.data_ptr(), _CODES[a.dtype], shape, strides
        told.append(a)
    return getattr(kernels(), name)(*told)
