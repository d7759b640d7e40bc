"""How prompts are cut into blocks: what is committed at once, what is denoised, and what of that is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of one row, in positions of its text, which begins with its prompt at 0."""

    length: int  # of the prompt
    start: int  # of the first block; what lies before it is given
    end: int  # behind the last token that is kept
    num_blocks: int
    block_size: int
    masks: tuple[int, ...]  # in each block that holds some of the prompt; in those behind them all tokens are masks
    tail: int  # behind the last given token: from here on an EOS ends the row

    def num_masks(self, block: int) -> int:
        """Masks in a block when it begins."""
        return self.masks[block] if block < len(self.masks) else self.block_size


def plan_blocks(
    prompt: Tensor, *, mask_token_id: int, block_size: int, max_new_tokens: int, aligned: bool
) -> BlockPlan:
    """The plan of a prompt, `[T]` with masks where something is to be filled in, on any device.

    The first block is the one that holds the first mask, or the first new token if there is none.

    Args:
        aligned: blocks begin at multiples of their size; otherwise the first one begins with its first mask.
    """
    given = (prompt != mask_token_id).cpu().numpy()
    length, places = len(given), np.flatnonzero(given)
    holes = np.flatnonzero(~given)
    first = int(holes[0]) if len(holes) else length
    start = first - first % block_size if aligned else first
    last = length + max_new_tokens if max_new_tokens else int(holes[-1]) + 1 if len(holes) else start
    num_blocks = -(-(last - start) // block_size)
    of_prompt = np.zeros(min(-(-(length - start) // block_size), num_blocks) * block_size, dtype=bool)
    covered = given[start : start + len(of_prompt)]
    of_prompt[: len(covered)] = covered
    return BlockPlan(
        length=length,
        start=start,
        end=length + max_new_tokens,
        num_blocks=num_blocks,
        block_size=block_size,
        masks=tuple((~of_prompt.reshape(-1, block_size)).sum(axis=1).tolist()),
        tail=int(places[-1]) + 1 if len(places) else 0,
    )


def plan_tokens(prompt: Tensor, max_new_tokens: int) -> BlockPlan:
    """The plan of a prompt that is continued token by token: blocks of one, behind it."""
    length = len(prompt)
    return BlockPlan(length, length, length + max_new_tokens, max_new_tokens, 1, (), length)
