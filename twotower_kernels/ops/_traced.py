"""Operations under `torch.compile`: one graph for all values of a number.

A trace keeps a number that varies as a symbol. An operator's argument of type SymInt takes it; of type float nothing
does, and a graph would be compiled for every value. So operators with such arguments have an overload, `traced`, that
takes them as tensors on the CPU, which a trace can follow; its kernel reads them and calls the operator.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops import _direct

_FLOAT = re.compile(r"\bfloat(\[\]|\?)? ")
_FLOATS: dict[str, list[bool]] = {}  # per operator that has the overload: which of its arguments are floats
_PLAIN: dict[str, Callable[..., Any]] = {}  # every operator


def traced_schema(schema: str) -> str | None:
    """The schema of the overload of an operator that is defined; None if it needs none."""
    name, rest = schema.split("(", 1)
    if "." in name:
        return None  # such an overload itself
    _PLAIN[name] = getattr(torch.ops.twotower, name).default
    if not _FLOAT.search(schema):
        return None
    _FLOATS[name] = [_FLOAT.match(argument) is not None for argument in rest.split(") ->")[0].split(", ")]
    return f"{name}.traced({_FLOAT.sub(lambda found: 'Tensor? ' if found[1] == '?' else 'Tensor ', rest)}"


def traced_kernel(name: str) -> Callable[..., Any]:
    """The overload's kernel, on every device."""

    def kernel(*arguments: Any) -> Any:
        pairs = zip(arguments, _FLOATS[name], strict=False)  # the dispatcher leaves out what is as by default
        plain = [a.tolist() if is_float and a is not None else a for a, is_float in pairs]
        return _PLAIN[name](*plain)

    return kernel


def call(name: str, *arguments: Any) -> Any:
    """`torch.ops.twotower.<name>`, as every public function calls it."""
    if not torch.compiler.is_compiling():
        return _direct.call(name, _PLAIN[name], *arguments)
    if name in _FLOATS:
        return call_in_graph(name, *arguments)
    return _PLAIN[name](*arguments)


@torch.compiler.allow_in_graph  # looked into when the graph is lowered: only then a symbol is told from a number
def call_in_graph(name: str, *arguments: Any) -> Any:
    """The operator, or its overload if one of the numbers is a symbol, or has become a tensor for being one."""
    floats = [a for a, is_float in zip(arguments, _FLOATS[name], strict=True) if is_float]
    if not any(map(_symbolic, floats)):
        return _PLAIN[name](*arguments)
    pairs = zip(arguments, _FLOATS[name], strict=True)
    return getattr(torch.ops.twotower, name).traced(
        *[_tensor(a) if is_float and a is not None else a for a, is_float in pairs]
    )


def _symbolic(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_symbolic, value))
    return isinstance(value, torch.SymFloat | Tensor)


def _tensor(value: Any) -> Tensor:
    """float64 `[]` of a number, `[n]` of a list."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        return torch.stack([_tensor(v) for v in value])
    return torch.zeros((), dtype=torch.float64, device="cpu") + value  # a sum is what the compiler can follow
