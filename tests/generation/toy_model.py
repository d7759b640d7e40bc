"""A model without weights, and the loop around it for one prompt at a time in plain Python: what judges the loop."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.remask import remask

VOCAB, MASK = 13, 12
FINISH = RemaskPolicy(finish=True)
Call = tuple[bool, int, list[int]]  # commit, start, tokens


def toy_logits(past: list[int], block: list[int]) -> Tensor:
    """float64 [S, V]: numbers that depend on every token before the block and in it."""
    seed = zlib.crc32(repr((past, block)).encode())
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=2.0, size=(len(block), VOCAB)))


class ToyModel:
    """A `step` whose cache is a list of tokens per row. It insists on being called as the page says."""

    def __init__(self) -> None:
        self.cache: dict[int, list[int]] = {}
        self.calls: dict[int, list[Call]] = {}  # per row
        self.sizes: list[tuple[bool, int]] = []  # of all calls: commit, rows

    def __call__(self, tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
        assert not torch.is_grad_enabled()
        assert all(t.dtype == torch.int64 for t in (tokens, start, rows))
        assert (
            tokens.ndim == 2 and start.shape == rows.shape == tokens.shape[:1] and len(set(rows.tolist())) == len(rows)
        )
        self.sizes.append((commit, len(rows)))
        logits = []
        for block, begin, row in zip(tokens.tolist(), start.tolist(), rows.tolist(), strict=True):
            past = self.cache.setdefault(row, [])
            assert len(past) == begin
            self.calls.setdefault(row, []).append((commit, begin, block))
            if commit:
                assert MASK not in block
                past += block
            else:
                assert MASK in block
                logits.append(toy_logits(past, block))
        return None if commit else torch.stack(logits)


@dataclass
class Written:
    """What became of one prompt."""

    sequence: list[int]
    new: list[int]
    logprobs: list[float]
    nfe: int
    reason: str
    calls: list[Call] = field(default_factory=list)


def plain_loop(
    prompt: list[int],
    *,
    policy: RemaskPolicy,
    block_size: int,
    steps_per_block: int,
    max_new_tokens: int,
    aligned: bool,
    ends: Sequence[int],
    seed: int,
    sampling: dict[str, Any],
    processor: Callable[[Tensor, list[int]], Tensor] = lambda logits, block: logits,
) -> Written:
    """The definition: one prompt, one block and one step after the other, over a text that is a list."""
    length, behind = len(prompt), max((i + 1 for i, token in enumerate(prompt) if token != MASK), default=0)
    text = prompt + [MASK] * max_new_tokens
    scores = [float("nan")] * (len(text) + block_size)
    holes = [i for i, token in enumerate(text) if token == MASK]
    written = Written([], [], [], 0, "length")
    begin = holes[0] if holes else 0
    begin -= begin % block_size if aligned else 0
    if begin and holes:
        written.calls.append((True, 0, text[:begin]))
    index = 0
    while holes and begin <= holes[-1]:
        block = (text[begin : begin + block_size] + [MASK] * block_size)[:block_size]
        open_ = [token == MASK for token in block]
        step = 0
        while MASK in block:
            written.calls.append((False, begin, list(block)))
            proposed = toy_logits(text[:begin], block)
            result = remask(
                processor(proposed.clone(), list(block))[None],
                torch.tensor([block]),
                mask_token_id=MASK,
                policy=policy if step < max(steps_per_block, block_size) else FINISH,
                step=step,
                num_steps=max(steps_per_block, step + 1),
                seed=torch.tensor([seed]),
                offset=index,
                editable=torch.tensor([open_]),
                initial_num_masked=sum(open_),
                **sampling,
            )
            proposed[:, MASK] = -torch.inf
            for i in result.transfer_mask[0].nonzero().flatten().tolist():
                scores[begin + i] = float(proposed[i].log_softmax(-1)[result.tokens[0, i]])
            block = result.tokens[0].tolist()
            written.nfe, step = written.nfe + 1, step + 1
        text[begin : begin + block_size] = block
        if any(token in ends for token in text[max(begin, behind) : begin + block_size]):
            break
        begin, index = begin + block_size, index + 1
        if begin <= holes[-1]:
            written.calls.append((True, begin - block_size, block))
    text = text[: length + max_new_tokens]
    for i, token in enumerate(text):
        if i >= behind and token in ends:
            text, written.reason = text[: i + 1], "eos"
            break
    new = [i for i in holes if i < len(text)]
    written.sequence, written.new, written.logprobs = text, [text[i] for i in new], [scores[i] for i in new]
    return written
