"""The compiled CPU kernels: how a tensor is handed to them, and which instruction set they use."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The order of DType in csrc/cpu/view.h.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
)

# What may lie between a public function and its kernel: each says something true where it does.
BETWEEN: tuple[Callable[[], Any], ...] = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
    torch._C._is_any_autocast_enabled,
)


@cache
def kernels() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or not for this interpreter.
    """
    try:
        module = importlib.import_module("twotower_kernels._C")
    except ImportError as error:
        raise ImportError(
            "twotower_kernels._C, the compiled CPU kernels, cannot be imported "
            f"({error}); build it with `python setup.py build_ext --inplace`, or reinstall twotower-kernels"
        ) from error
    return introduced(module)


def introduced(module: ModuleType) -> ModuleType:
    """A compiled module, told of PyTorch: it looks for nothing by itself."""
    module.set_torch(
        Tensor,
        torch.nn.Parameter,
        DTYPES,
        getattr(Tensor, "__dlpack_c_exchange_api__", None),  # from PyTorch 2.10 on
        BETWEEN,
        torch.is_grad_enabled,
        torch.autograd.graph.increment_version,
        vars(forward_ad),
    )
    return module


@contextmanager
def use(instruction_set: str) -> Iterator[None]:
    """Inside, every kernel runs on this instruction set, to debug or compare: `with tt.cpu.use("avx2"): ...`.

    It holds for all threads of the process. Results differ between sets by rounding.

    Args:
        instruction_set: one of `cpu.kernels().isas()`, those that this processor has.

    Raises:
        ValueError: a set that this processor does not have.
    """
    module = kernels()
    if instruction_set not in module.isas():
        found = ", ".join(module.isas())
        raise ValueError(f"instruction_set: expected one of {found}, got {instruction_set!r}")
    before = module.isa()
    module.set_isa(instruction_set)
    try:
        yield
    finally:
        module.set_isa(before)


def rows_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if its last dimension is not contiguous: what every kernel may rely on."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return tensor if not strides or strides[-1] == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def call(name: str, *arguments: Any) -> Any:
    """Calls a kernel and returns its answer, if it has one. It reads of each tensor where it lies, its dtype, sizes and
    strides. Tensors whose last dimension is strided are copied first, so never pass an output of that kind."""
    return getattr(kernels(), name)(*arguments)


def is_recording() -> bool:
    """Whether this thread's calls are noted and not run (`ops/recording.py`): what tensors will hold is not known."""
    answer: bool = kernels().is_recording()
    return answer
