"""A second device for machines that have none: numbers on the CPU that say they are elsewhere.

While `SecondDevice` is entered, the "meta" device holds numbers: an operation on its tensors runs on the CPU, and its
results say that they are there. As between a CPU and a GPU, an operation on tensors of both devices is an error, and
only a copy takes numbers from one to the other. Copies are noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from twotower_kernels import TwoTowerModel

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)


class Elsewhere(Tensor):
    """A tensor on the second device, whose numbers are those of `numbers`."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        told = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        with torch.inference_mode(False):  # a view of an ordinary tensor is one too, wherever it is taken
            tensor = Tensor._make_wrapper_subclass(cls, numbers.shape, device=DEVICE, **told)  # type: ignore
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the second device, which is not there")


class SecondDevice(TorchDispatchMode):
    """Runs operations where their tensors are, and notes the tensors that are copied from one device to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.copied)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = [isinstance(tensor, Elsewhere) for tensor in tensors]
        asked = [leaf.type == DEVICE.type for leaf in leaves if isinstance(leaf, torch.device)]
        to = asked[0] if asked else any(there)

        def bare(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return value.numbers if isinstance(value, Elsewhere) else value

        args, kwargs = tree_map(bare, (args, kwargs or {}))
        if func.overloadpacket in COPIES:
            if func.overloadpacket is torch.ops.aten.copy_:
                to = there[0]
            if there[-1] != to:
                self.copied.append(tensors[-1])
                if func.overloadpacket is not torch.ops.aten.copy_:  # never a view of the other device's numbers
                    numbers = func(*args, **kwargs).clone()
                    return Elsewhere(numbers) if to else numbers
        else:  # a number without dimensions may come from the other device, as an argument does
            strange = [t for t, is_there in zip(tensors, there, strict=True) if is_there != any(there) and t.ndim]
            assert not strange, f"{func}: tensors on two devices, {[(t.device.type, list(t.shape)) for t in tensors]}"

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            same = [t for t in tensors if value is bare(t)]  # given back, as an operation in place does
            return same[0] if same else Elsewhere(value) if to else value

        return tree_map(placed, func(*args, **kwargs))


class _Values(TorchFunctionMode):
    """What PyTorch does not do for the meta device: from and to lists, by way of the CPU, and addresses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist:
            return func(args[0].to("cpu"))
        if func is Tensor.data_ptr and isinstance(args[0], Elsewhere):
            return func(args[0].numbers)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    with ExitStack() as stack:
        stack.enter_context(_Values())
        yield stack.enter_context(SecondDevice())


def apart(model: TwoTowerModel) -> TwoTowerModel:
    """Moves a model's denoiser to the second device."""
    for name, module in model.named_modules():
        if not name.startswith("context_"):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False))
    return model
