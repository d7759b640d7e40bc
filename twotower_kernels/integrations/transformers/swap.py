"""What becomes of a module that is considered, and how its forward is replaced and put back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

_SWAPPED = "_twotower_swapped"  # of a module whose forward is one of ours


class Swap(NamedTuple):
    """What `replace` made of a module: its name in the model, whether it was swapped, and why or why not."""

    name: str
    swapped: bool
    why: str


class NotServed(NotImplementedError):
    """Why a module is left as it is."""


def swap_forward(module: torch.nn.Module, forward: Callable[..., Any], *arguments: Any) -> None:
    """The module's forward is `forward(module, *arguments, ...)` from now on. Its class, its hooks and its `state_dict`
    stay what they are; a copy of the module runs on its own weights."""
    module.forward = partial(forward, module, *arguments)
    setattr(module, _SWAPPED, True)


def is_swapped(module: torch.nn.Module) -> bool:
    return hasattr(module, _SWAPPED)


def unswap_forward(module: torch.nn.Module) -> None:
    """The forward of the module's class again."""
    del module.forward
    delattr(module, _SWAPPED)


def refuse_own_forwards(module: torch.nn.Module) -> None:
    """NotServed if an object in the module runs something else than its class says: accelerate, which moves weights
    before a call, and hub kernels put their forward there."""
    for name, part in module.named_modules():
        if "forward" in vars(part):
            where = f"{type(module).__name__}.{name}".rstrip(".")
            raise NotServed(f"{where} has been given a forward already, by accelerate or kernelize for instance")
