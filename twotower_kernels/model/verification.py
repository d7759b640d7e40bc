"""A commit in two halves: the context tower has read a block, and is yet to be told how many of its tokens count."""

from __future__ import annotations

from torch import Tensor

from twotower_kernels.model.state import BlockLook, ContextState


class Verification:
    """What `TwoTowerModel.verify` returns, for `TwoTowerModel.accept`.

    Keys and values of the whole block lie behind the context's already: those that will not count are dead, as they lie
    beyond a length, and are overwritten. Of a Mamba-2 layer, whose states cannot be cut, there is what its scan read.
    """

    def __init__(self, state: ContextState, look: BlockLook) -> None:
        self._state, self._look = state, look

    @property
    def logits(self) -> Tensor:
        """What the context tower says of the token behind each position: `[B, S, V]` float32 (float64)."""
        return self._look.logits

    def pending(self) -> tuple[ContextState, BlockLook]:
        """For the model: the state before the block, and what it made of it. RuntimeError once it was accepted."""
        if not vars(self._state):
            raise RuntimeError("verification: expected one that was not accepted yet; verify the block again")
        return self._state, self._look
