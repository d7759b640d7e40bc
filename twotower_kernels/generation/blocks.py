"""Generation by block diffusion: a model fills a block of masks in a few calls, then its context grows by it.

Every row has blocks of its own (`plan.py`): those that its prompt gives in part are denoised with what is given left
alone, those that it gives whole are handed to the context as they are. So rows do their first blocks together, their
second ones, and so on, wherever in their texts these lie, and a row that has no more leaves.

The host learns of a step what it must to go on, and no more: how many masks each row has left, whether its logits
were numbers, whether it wrote its last token. That is one small read per step; everything else stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower_kernels.generation.request import Request, indices, log_probabilities, on_device
from twotower_kernels.generation.results import StepEvent
from twotower_kernels.ops.remask import remask
from twotower_kernels.options.remask_policy import RemaskPolicy

FINISH = RemaskPolicy(finish=True)  # in the last step of its schedule: every candidate, none of which is the mask


class Context(Protocol):
    """What R rows have committed so far, as a value: what a model reads beside the block. `select` leaves it as it is,
    `commit` may consume it."""

    def denoise(self, tokens: Tensor, num_masked: Tensor, step: int, num_steps: int) -> Tensor:
        """Logits [R, S, V] for blocks [R, S] that hold so many masks [R], in this step of so many."""
        ...

    def select(self, index: Tensor) -> Context:
        """Some rows: int64 indices [N]."""
        ...

    def commit(self, tokens: Tensor) -> Context:
        """Extended by finished blocks [R, S]."""
        ...


def diffuse(request: Request, begin: Callable[[list[int]], Context]) -> Generator[StepEvent, None, None]:
    """Block after block: denoise it, hand it out, extend the context of the rows that go on.

    begin: the context of these rows of the request, which holds each one's prompt up to its first block.
    """
    request_rows = indices([plan.num_blocks > 0 for plan in request.plans])
    if not request_rows:
        return
    device, prompts = request.seeds.device, _Prompts(request)
    context, rows = begin(request_rows), on_device(request_rows, device)
    for block in count():
        tokens = prompts.block(block, rows)
        logprobs, steps, ended = yield from _denoise_block(request, context, request_rows, rows, block, tokens)
        yield request.finish_block(block, steps, request_rows, tokens, logprobs)
        more = [block + 1 < request.plans[row].num_blocks for row in request_rows]
        keep = indices([goes_on and not end for goes_on, end in zip(more, ended, strict=True)])
        if not keep:
            return  # a row's last block is read by nobody: its context need not grow
        if len(keep) < len(request_rows):
            index = on_device(keep, device)
            context, rows, tokens = context.select(index), rows[index], tokens[index]
            request_rows = [request_rows[i] for i in keep]
        context = context.commit(tokens)


class _Prompts:
    """What the prompts hold of the blocks."""

    def __init__(self, request: Request) -> None:
        self._size, self._mask = request.options.block_size, request.mask_token_id
        rows = [prompt[plan.start :] for prompt, plan in zip(request.prompts, request.plans, strict=True)]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._mask)
        self._tokens = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % self._size), value=self._mask)

    def block(self, block: int, rows: Tensor) -> Tensor:
        """A block of these rows [R] when it begins: int64 [R, S], masks where nothing is given."""
        begin = block * self._size
        if begin < self._tokens.shape[1]:
            return self._tokens[rows, begin : begin + self._size]
        return torch.full((len(rows), self._size), self._mask, device=rows.device)


class _Given(NamedTuple):
    """What is special about blocks some of whose rows are not behind everything that their prompts give."""

    num_masked: Tensor  # [A], when the block began
    editable: Tensor  # bool [A, S]: masks then
    ending: Tensor  # bool [A, S]: where an EOS ends the row


@dataclass(frozen=True)
class _Waiting:
    """The rows of a block that still hold masks, A of them."""

    context: Context
    places: Tensor  # [A] int64, among the block's rows
    rows: Tensor  # [A] int64, in the request
    seeds: Tensor  # [A] int64
    num_masked: Tensor  # [A] int64
    given: _Given | None

    def select(self, index: Tensor) -> _Waiting:
        return _Waiting(
            context=self.context.select(index),
            places=self.places[index],
            rows=self.rows[index],
            seeds=self.seeds[index],
            num_masked=self.num_masked[index],
            given=None if self.given is None else _Given(*(tensor[index] for tensor in self.given)),
        )


def _denoise_block(
    request: Request, context: Context, request_rows: list[int], rows: Tensor, block: int, tokens: Tensor
) -> Generator[StepEvent, None, tuple[Tensor | None, int, list[bool]]]:
    """Fills the masks of tokens [R, S], in place: float32 [R, S] their logprobs if wanted, the steps that the slowest
    row took, and per row whether it has ended."""
    options, mask_token_id = request.options, request.mask_token_id
    block_size, num_steps, policy = options.block_size, options.steps_per_block, options.unmasking
    last_call = max(num_steps, block_size)
    logprobs = None if request.logprobs is None else torch.full(tokens.shape, torch.nan, device=tokens.device)
    ended = [False] * len(request_rows)
    active = indices([request.plans[row].num_masks(block) > 0 for row in request_rows])
    waiting = _waiting(request, context, request_rows, rows, block, tokens)
    if len(active) < len(request_rows):
        waiting = waiting.select(on_device(active, tokens.device))
    step = 0
    while active:
        of_steps = max(num_steps, step + 1)  # past the schedule, every step is the last one
        before, given = tokens[waiting.places], waiting.given  # [A, S]
        logits = waiting.context.denoise(before, waiting.num_masked, step, of_steps)  # [A, S, V]
        logits, proposed = request.processed(logits, before, waiting.rows)
        result = remask(
            logits,
            before,
            mask_token_id=mask_token_id,
            policy=policy if step < last_call else FINISH,
            step=step,
            num_steps=of_steps,
            seed=waiting.seeds,
            offset=block,
            editable=None if given is None else given.editable,
            initial_num_masked=block_size if given is None else given.num_masked,
            **options.sampling,
        )
        tokens[waiting.places] = result.tokens
        written = None  # [A, S] logprobs
        if logprobs is not None:
            written = log_probabilities(proposed, result.tokens, without=mask_token_id)
            written = torch.where(result.transfer_mask, written, logprobs[waiting.places])
            written = torch.where(result.tokens == mask_token_id, torch.nan, written)
            logprobs[waiting.places] = written
        of_request = [request_rows[i] for i in active]
        ending = None if given is None else given.ending
        seen = request.look(of_request, result.num_masked, result.tokens, result.confidence, ending)
        yield request.step(block, step, of_request, before, result.tokens, [masks for masks, _ in seen], written)
        for i, (_, end) in zip(active, seen, strict=True):
            ended[i] = end
        step, waiting = step + 1, replace(waiting, num_masked=result.num_masked)
        keep = indices([masks > 0 for masks, _ in seen])
        if len(keep) < len(active) and keep:
            waiting = waiting.select(on_device(keep, tokens.device))
        active = [active[i] for i in keep]
    return logprobs, step, ended


def _waiting(
    request: Request, context: Context, request_rows: list[int], rows: Tensor, block: int, tokens: Tensor
) -> _Waiting:
    """All rows of a block [R, S] that begins."""
    block_size, device = request.options.block_size, tokens.device
    masks = tokens == request.mask_token_id
    num_masked = masks.sum(dim=1)
    behind = [request.plans[row].tail - request.plans[row].start - block * block_size for row in request_rows]
    given = None
    if max(behind) > 0:
        ending = torch.arange(block_size, device=device) >= torch.tensor(behind, device=device)[:, None]
        given = _Given(num_masked, masks, ending)
    places = torch.arange(len(request_rows), device=device)
    return _Waiting(context, places, rows, request.seeds[rows], num_masked, given)
