"""The short way from a public function to a CPU kernel (`csrc/direct.cpp`), for calls that PyTorch's dispatcher would
only hand on.

It is taken where all tensors are plain ones on a CPU and nobody wants a gradient or to see the call: no mode, no
transform, no autocast, no trace, no profiler. There a call costs what PyTorch's own do. Everywhere else, and for
whatever is not right, the operator is called, so this decides the price of a call and nothing else.

Whoever lays a kernel of his own over `torch.ops.twotower` for CPUs turns it off: `_direct.off()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from twotower_kernels import cpu

KERNELS: dict[str, Callable[..., Any]] = {}  # per operator its checked kernel for CPUs
TENSORS: dict[str, int] = {}  # per operator a bit for every argument that is a tensor
WRITTEN: dict[str, list[int]] = {}  # per operator that writes in place, which of its arguments it writes to


@cache
def entries() -> Any:
    """The compiled module's: one per public function that has one, each answering None where it does not serve."""
    return cpu.kernels().direct


def serves(name: str, *arguments: Any) -> bool:
    """Whether the operator's kernel may be called with these arguments, without the dispatcher."""
    answer: bool = entries().is_direct(TENSORS[name], *arguments)
    return answer


def call(name: str, operator: Callable[..., Any], *arguments: Any) -> Any:
    """`operator`, `torch.ops.twotower.<name>`, outside of a trace."""
    if not serves(name, *arguments):
        return operator(*arguments)
    output = KERNELS[name](*arguments)
    for n in WRITTEN.get(name, ()):
        if not arguments[n].is_inference():
            torch.autograd.graph.increment_version(arguments[n])  # a backward that has saved it must not use it
    return output


@contextmanager
def off() -> Iterator[None]:
    """Inside, every call goes through the dispatcher."""
    entries().set(False)
    try:
        yield
    finally:
        entries().set(True)
