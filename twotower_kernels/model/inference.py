"""What inference computes under, whatever surrounds the call: no gradients, no autocast, ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """The function, computed the same in every surrounding.

    The caller may be in `torch.inference_mode`, `torch.no_grad` or `torch.autocast`, or in none of them, and need not
    stay where he began. Results are ordinary tensors without gradient: they can be written to and saved for a backward
    pass. As in inference mode, the dispatcher passes by autograd and its book of views and versions, which makes small
    operations cheaper; unlike there, the tensors do not remember it. So a result must not be a view of another.
    """

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # a graph has nothing to pass by, and tracing knows no such guards
            return _plainly(function, *arguments, **options)
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            return _plainly(function, *arguments, **options)

    return call


def _plainly(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Leaves each mode that is on. Asks first, as of calls in calls only the first finds any."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # a trace cannot ask for it
        with torch.inference_mode(False):
            return _plainly(function, *arguments, **options)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _plainly(function, *arguments, **options)
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _plainly(function, *arguments, **options)
    return function(*arguments, **options)
