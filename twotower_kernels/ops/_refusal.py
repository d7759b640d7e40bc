"""Gradients that do not exist: an error where a backward asks for one, at that time and no sooner.

`torch.compile` traces the backward together with the forward. An error raised while it traces would stop the forward,
so a graph gets an operator that raises when it runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("twotower_gradients", "DEF")
_LIBRARY.define("refuse(Tensor[] grads, SymInt[] size, ScalarType dtype, str text) -> Tensor")


def _refuse(grads: Sequence[Tensor], size: Sequence[int], dtype: torch.dtype, text: str) -> Tensor:
    raise NotImplementedError(text)


_LIBRARY.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake(
    "twotower_gradients::refuse",
    lambda grads, size, dtype, text: grads[0].new_empty(size, dtype=dtype),
    lib=_LIBRARY,
)


def refused(text: str, grads: Sequence[Any], x: tuple[torch.Size, torch.dtype]) -> Tensor:
    """The gradient that does not exist of a tensor of this size and dtype, in a backward that is given `grads`.

    Raises:
        NotImplementedError: unless a graph is traced, which will raise it.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None:
        raise NotImplementedError(text)
    # It takes all that the backward is given, so that the graph cannot place it in the forward.
    given = [grad for grad in grads if grad is not None]
    gradient: Tensor = torch.ops.twotower_gradients.refuse.default(given, *x, text)
    return gradient
