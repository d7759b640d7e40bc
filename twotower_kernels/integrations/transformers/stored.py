"""Keys and values that stay in a cache's storage on their way through a model to `attention`."""

from typing import Any

import torch
from torch import Tensor


class Stored(Tensor):
    """Keys or values of a cache, `[B, Hkv, T, D]` in shape, that lie in pages or in rows of different lengths.

    A tensor without numbers: a model hands it on to its attention, and `attention` reads the storage in place. What
    else computes with it is refused.

    Attributes:
        memory: `[B, room, Hkv, D]`, or pages `[P, page, Hkv, D]` with `table`.
        table: `[B, n]`, a row's pages in order, or None.
        lens: `[B]`, tokens of each row that are in use, or a number.
        starts: `[B]`, those in front that a sliding layer has left behind, a number, or None.
    """

    memory: Tensor
    table: Tensor | None
    lens: Tensor | int
    starts: Tensor | int | None

    @staticmethod
    def __new__(
        cls, tokens: int, memory: Tensor, table: Tensor | None, lens: Tensor | int, starts: Tensor | int | None
    ) -> "Stored":
        batch = memory.shape[0] if table is None else table.shape[0]
        shape = batch, memory.shape[2], tokens, memory.shape[3]
        made: Stored = Tensor._make_wrapper_subclass(cls, shape, dtype=memory.dtype, device=memory.device)
        made.memory, made.table, made.lens, made.starts = memory, table, lens, starts
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({list(self.shape)}, in {list(self.memory.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "twotower BlockCache: pages and rows of different lengths are read by attn_implementation='twotower' "
            f"alone, got a model that computes {function} of them"
        )


def least(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    """The smaller one of two numbers of tokens, row by row."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else _tensor(torch.minimum, a, b)


def most(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    """The larger one."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else _tensor(torch.maximum, a, b)


def _tensor(function: Any, a: Tensor | int, b: Tensor | int) -> Tensor:
    device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
    return function(torch.as_tensor(a, device=device), torch.as_tensor(b, device=device))
