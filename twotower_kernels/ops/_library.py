"""How an operation enters PyTorch's dispatcher: its schema, its kernel per device, its fake, its transforms."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from twotower_kernels.ops import _direct, overlap
from twotower_kernels.ops._traced import traced_kernel, traced_schema
from twotower_kernels.ops._transforms import Rule, register_autocast, register_batching, register_derivatives

_LIBRARY = torch.library.Library("twotower", "DEF")

CPU = _direct.KERNELS  # per op what is registered for CPUs
CUDA: dict[str, str] = {}  # "module:function" in twotower_kernels, for every op that has a kernel for GPUs
_CHECKED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}  # per op: from a kernel to its entry
DIFFERENTIABLE: set[str] = set()  # every op that has a gradient; the others raise when one is asked for


def define(
    schema: str,
    *,
    check: Callable[..., None],
    cpu: Callable[..., Any],
    cuda: str | None = None,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Rule | None = None,
) -> None:
    """Registers `torch.ops.twotower.<name>` for `schema`, e.g. "scale(Tensor x, float by) -> Tensor". It has no default
    values: the dispatcher leaves such arguments out of what it hands on.

    check takes the op's arguments and raises ValueError or TypeError unless shapes, dtypes, devices and numbers fit. It
    runs before every kernel and before the fake, so whoever calls the operator itself is told, too; it reads no
    tensor's values. What is written in place must not overlap; what is read from there is copied (`ops/overlap.py`).

    cpu is the kernel; cuda names one, "module:function" in twotower_kernels, imported at its first call, so that a CPU
    alone needs no Triton. An op without `backward`, or whose backward gives None where a gradient is wanted, raises
    there; forward-mode derivatives raise in every op. autocast makes of the op's arguments those that it runs on under
    autocast; None: the same. On a device without a kernel, the call raises NotImplementedError with the op's and the
    device's name.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    arguments = torch._C.parse_schema(schema).arguments
    names = [argument.name for argument in arguments]
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    required = [i for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]

    def checked(kernel: Callable[..., Any], in_memory: bool = True) -> Callable[..., Any]:
        def entry(*arguments: Any) -> Any:
            for i in required:  # the dispatcher takes None for a tensor, too
                if arguments[i] is None:
                    raise TypeError(f"{names[i]}: expected a tensor, got None")
            check(*arguments)
            if written and in_memory:
                arguments = overlap.apart(names, written, arguments)
            return kernel(*arguments)

        return entry

    _CHECKED[name] = checked
    CPU[name] = checked(cpu)
    _LIBRARY.impl(name, CPU[name], "CPU")
    _direct.TENSORS[name] = sum(1 << i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))
    if written:
        _direct.WRITTEN[name] = written
    if backward is not None:
        DIFFERENTIABLE.add(name)
    if cuda is not None:
        CUDA[name] = cuda
        _LIBRARY.impl(name, lambda *arguments: cuda_kernel(name)(*arguments), "CUDA")
    torch.library.register_fake(f"twotower::{name}", checked(fake, in_memory=False), lib=_LIBRARY)
    op = getattr(getattr(torch.ops.twotower, name.split(".")[0]), name.partition(".")[2] or "default")
    register_derivatives(_LIBRARY, op, backward, setup_context, CPU)
    register_batching(_LIBRARY, op)
    register_autocast(_LIBRARY, op, autocast)
    if traced := traced_schema(schema):  # its kernel calls the operator, which checks
        kernel = traced_kernel(name)
        define(
            traced,
            check=lambda *_: None,
            cpu=kernel,
            fake=fake,
            backward=backward,
            setup_context=setup_context,
            autocast=autocast,
        )
        if cuda is not None:
            _LIBRARY.impl(f"{name}.traced", kernel, "CUDA")


@cache
def cuda_kernel(name: str) -> Callable[..., Any]:
    """The GPU kernel's launcher of an op, with the op's checks before it; found once.

    Raises:
        ImportError: Triton is not installed.
    """
    module, function = CUDA[name].split(":")
    try:
        launcher = getattr(importlib.import_module(f"twotower_kernels.{module}"), function)
    except ModuleNotFoundError as error:
        raise ImportError(f"twotower::{name} on a GPU needs {error.name}: pip install {error.name}") from error
    return _CHECKED[name](launcher)


def refuse_gradients(op: str, /, **tensors: Tensor | None) -> None:
    """ValueError if a gradient is wanted for an argument that gets none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: {op} is not differentiable in it, expected no requires_grad; detach it")


def check_alike(first_name: str, first: Tensor, /, **others: Tensor | None) -> None:
    """TypeError or ValueError unless all are of one floating dtype and on one device."""
    dtype, device = first.dtype, first.device
    if dtype not in _FLOATS:
        check_float(**{first_name: first})
    for name, x in others.items():
        if x is not None:
            if x.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype} as {first_name}, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_floats(first: Tensor, /, **tensors: Tensor | None) -> None:
    """TypeError or ValueError unless all are floating, of any dtypes, and on the device of the first."""
    device = first.device
    for name, x in tensors.items():
        if x is not None:
            if x.dtype not in _FLOATS:
                check_float(**{name: x})
            if x.device != device:
                raise ValueError(f"{name}: expected device {device}, got {x.device}")


def same_device(first: Tensor, /, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on the device of the first."""
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def check_float(**tensors: Tensor | None) -> None:
    """TypeError unless all are float64, float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")


_INDICES = frozenset((torch.int64, torch.int32))
_OTHER_INTEGERS = frozenset((torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64))


@overload
def as_index(x: Tensor) -> Tensor: ...
@overload
def as_index(x: None) -> None: ...
@overload
def as_index(x: Tensor | None) -> Tensor | None: ...
def as_index(x: Tensor | None) -> Tensor | None:
    """Integers as the operators take them: other dtypes than int32 and int64 as int64. What holds no integers stays
    as it is, to be refused by its name."""
    return x.to(torch.int64) if x is not None and x.dtype in _OTHER_INTEGERS else x


def check_index(**tensors: Tensor | None) -> None:
    """TypeError unless all are int32 or int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _INDICES:
            raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")
