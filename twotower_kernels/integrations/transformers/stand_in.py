"""Modules that are compared with what replaces them: by computing, with random weights, on the CPU."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from twotower_kernels.integrations.transformers.swap import NotServed

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, tuple, list, type(None))
_OF_ITS_PLACE = {"layer_idx", "training"}  # attributes that say where a module stands, not what it computes


def stand_in(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy with the module's sizes and flags, without its hooks, and with random weights of a dtype.

    So a comparison is about what the module computes, not about weights that hide it, such as norms of ones, and
    neither copies the weights nor needs them to be loaded.

    Raises:
        NotServed: a weight is not an ordinary tensor.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if type(x) not in (Tensor, nn.Parameter, nn.Buffer) or not x.is_floating_point():
            raise NotServed(f"{type(module).__name__}.{name}: expected a floating tensor, got {type(x).__name__}")
        fan_in = x[0].numel() if x.ndim > 1 else 4
        random = torch.randn(x.shape, generator=generator).div_(fan_in**0.5).to(dtype)
        memo[id(x)] = nn.Parameter(random, requires_grad=False) if isinstance(x, nn.Parameter) else random
    for part in module.modules():
        for name in _HOOKS:
            memo[id(getattr(part, name))] = OrderedDict()
        if (config := getattr(part, "config", None)) is not None:
            memo[id(config)] = config
    return copy.deepcopy(module, memo).eval()


def kind_of(module: nn.Module) -> str:
    """What two modules have in common if one is proven with the other: classes, flags, shapes."""
    found = []
    for name, part in module.named_modules():
        flags = {key: x for key, x in vars(part).items() if isinstance(x, _PLAIN) and key not in _OF_ITS_PLACE}
        shapes = [(key, tuple(x.shape)) for key, x in [*part.named_parameters(recurse=False)]]
        found.append((name, type(part).__module__, type(part).__qualname__, sorted(flags.items()), shapes))
    return repr(found)


def run(kind: str, forward: Callable[..., Any], *arguments: Any) -> Any:
    """What a forward gives; NotServed if it does not run on the input that its kind takes."""
    try:
        with torch.no_grad():
            return forward(*arguments)
    except Exception as error:  # whatever a module's code may raise
        raise NotServed(f"{kind} cannot be tried out: {type(error).__name__}: {error}") from error


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether two results are of one dtype and shape and differ by no more than a share of the largest number."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6))
