"""What inference computes under, whatever surrounds the call: no gradients, no autocast, ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """The function, computed the same in every surrounding.

    The caller may be in `torch.inference_mode`, `torch.no_grad` or `torch.autocast`, or in none of them, and need not
    stay where he began. Results are ordinary tensors without gradient: they can be written to and saved for a backward
    pass. As in inference mode, the dispatcher passes autograd by, which makes small operations cheaper; unlike there,
    the tensors do not remember it.
    """

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # which knows no guard that passes autograd by, and spares it anyway
            with torch.no_grad():
                return _without_autocast(function, *arguments, **options)
        with torch.inference_mode(False), torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return _without_autocast(function, *arguments, **options)

    return call


def _without_autocast(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Asks first: it is off nearly always, and turning it off costs more than many an operation."""
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _without_autocast(function, *arguments, **options)
    return function(*arguments, **options)
