"""Autoregression's text by drafts of the denoiser: several tokens per pass of the context tower, the same to the bit.

A draft is the token that the context tower has chosen, which is known from its last pass, and masks that the denoiser
fills. One causal pass of the context tower reads it and says, behind every token, which one comes next. As long as
these agree with the draft's, the pass has read what autoregression would have read; what it says behind the last of
them is known in turn, and opens the next draft. (Blockwise decoding, arXiv 1811.03115; speculative decoding, arXiv
2211.17192.)

Sampled tokens agree as greedy ones do, by equality: token number n of a row is drawn with noise that hangs on the row's
seed, on n and on the candidate alone (`remask(noise="sequence")`). A denoiser with the context tower's logits would
draw its very tokens: no draft is rejected by chance, and there is no second distribution.

The host makes one read per round, behind the verification, and one behind every further step of a draft.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from twotower_kernels.generation.request import Request, indices, log_probabilities, on_device
from twotower_kernels.generation.results import StepEvent
from twotower_kernels.model.autoregression import PROPOSE
from twotower_kernels.model.interface import Calls
from twotower_kernels.model.state import ContextState
from twotower_kernels.model.verification import Verification
from twotower_kernels.ops.remask import remask


class _Rows(NamedTuple):
    """R rows that go on, in the state's order, and the token that is known of each: the context tower has chosen it,
    and not read it."""

    rows: Tensor  # [R] int64, in the request
    seeds: Tensor  # [R] int64
    known: Tensor  # [R, 1] int64
    numbers: Tensor  # [R] int64, of the known tokens among the new ones of their rows, from 0
    logprobs: Tensor | None  # [R, 1] float32, of the known tokens, if wanted

    def select(self, index: Tensor) -> _Rows:
        logprobs = None if self.logprobs is None else self.logprobs[index]
        return _Rows(self.rows[index], self.seeds[index], self.known[index], self.numbers[index], logprobs)


def speculate(
    request: Request, calls: Calls, mask_token_id: int, draft_device: torch.device
) -> Generator[StepEvent, None, None]:
    """Draft after draft: fill it, verify it, hand out what of it is autoregression's.

    mask_token_id: what processors see where the context tower's next token will stand, as in autoregression.
    draft_device: the denoiser's.
    """
    max_new_tokens, ends = request.options.max_new_tokens, request.options.ends
    if not max_new_tokens:
        return
    request_rows, seeds = list(range(len(request.prompts))), request.seeds
    drafter, choose = _Drafter(request, calls, draft_device), _Chooser(request, mask_token_id)
    state = calls.prefill(*request.padded(request_rows))
    rows, numbers = torch.arange(len(seeds), device=seeds.device), torch.zeros_like(seeds)
    known, logprobs = choose(state.next_logits()[:, None], rows, seeds, numbers)
    of = _Rows(rows, seeds, known, numbers, logprobs)
    tokens, over = known[:, 0].tolist(), [False] * len(request_rows)  # the known ones; whether a row has ended
    verified: tuple[Verification, Tensor] | None = None  # and how many tokens agree
    for block in count():
        _check_finite(request_rows, [done or token >= 0 for done, token in zip(over, tokens, strict=True)])
        # A known token that is its row's last needs no draft.
        last = [
            not done and (token in ends or request.written[row] + 1 == max_new_tokens)
            for done, token, row in zip(over, tokens, request_rows, strict=True)
        ]
        if any(last):
            found = indices(last)
            ending, of_request = of.select(on_device(found, seeds.device)), [request_rows[i] for i in found]
            yield request.finish_block(block, 0, of_request, ending.known, ending.logprobs, [1] * len(found))
        going = indices([not (done or end) for done, end in zip(over, last, strict=True)])
        if not going:
            return
        if verified is not None:
            state = calls.accept(*verified)
        if len(going) < len(request_rows):
            index = on_device(going, seeds.device)
            state, of, request_rows = state.select(index), of.select(index), [request_rows[i] for i in going]

        draft, left, steps = yield from drafter.draft(block, request_rows, of, state)  # [R, S], [R]
        verification = calls.verify(draft, state)
        own, logprobs = choose(verification.logits, of.rows, of.seeds, of.numbers + 1)  # [R, S], behind each token
        agreed = (draft[:, 1:] == own[:, :-1]).long().cumprod(1).sum(1) + 1  # [R]
        newest = agreed[:, None] - 1
        known, verified = own.gather(1, newest), (verification, agreed)
        seen = torch.cat([left[:, None], agreed[:, None], known, draft], dim=1).tolist()
        _check_finite(request_rows, [masks == 0 for masks, *_ in seen])
        tokens = [token for _, _, token, *_ in seen]
        counts = [
            _counting(agreeing[:number], ends, max_new_tokens - request.written[row])
            for row, (_, number, _, *agreeing) in zip(request_rows, seen, strict=True)
        ]
        request.verified(request_rows)
        accepted, over = [number for number, _ in counts], [done for _, done in counts]
        of_draft = None
        if logprobs is not None and of.logprobs is not None:
            of_draft = torch.cat([of.logprobs, logprobs[:, :-1]], dim=1)
            disagrees = torch.arange(draft.shape[1], device=draft.device) > newest
            of_draft, logprobs = of_draft.masked_fill(disagrees, torch.nan), logprobs.gather(1, newest)
        yield request.finish_block(block, steps, request_rows, draft, of_draft, accepted)
        of = _Rows(of.rows, of.seeds, known, of.numbers + agreed, logprobs)


def _counting(tokens: list[int], ends: tuple[int, ...], room: int) -> tuple[int, bool]:
    """How many of a row's tokens count, up to the first that ends it or its length; and whether it ends with them."""
    for i, token in enumerate(tokens[:room]):
        if token in ends:
            return i + 1, True
    return min(len(tokens), room), len(tokens) >= room


def _check_finite(request_rows: list[int], finite: list[bool]) -> None:
    """FloatingPointError for the first row whose logits are not usable."""
    if not all(finite):
        row = request_rows[finite.index(False)]
        raise FloatingPointError(f"logits: expected finite numbers, got NaN or infinity in row {row}")


class _Chooser:
    """What the context tower chooses: autoregression's rule, at several positions at once."""

    def __init__(self, request: Request, mask_token_id: int) -> None:
        self._request, self._mask_token_id = request, mask_token_id

    def __call__(self, logits: Tensor, rows: Tensor, seeds: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of logits [R, S, V] for the tokens from these numbers [R] on, int64 [R, S] tokens, -1 where logits are not
        usable; and float32 [R, S] their logprobs, if wanted."""
        request, shape = self._request, logits.shape[:2]
        logits, proposed = self._processed(logits, rows)
        masks = torch.zeros(shape, dtype=torch.int64, device=logits.device)  # whatever their number
        result = remask(
            logits,
            masks,
            mask_token_id=0,
            policy=PROPOSE,
            seed=seeds,
            offset=numbers,
            noise="sequence",
            **request.options.sampling,
        )
        tokens = result.candidate
        if request.logprobs is None:
            return tokens, None
        return tokens, log_probabilities(proposed, tokens.clamp(min=0))

    def _processed(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As autoregression has them processed: each position by itself."""
        request = self._request
        if not request.options.processors:
            return logits, logits
        mask = torch.full((len(rows), 1), self._mask_token_id, device=logits.device)
        parts = [request.processed(part, mask, rows) for part in logits.split(1, dim=1)]
        found, proposed = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return found, proposed


class _Drafter:
    """Fills drafts by the denoiser. What is the same for all of them is made once."""

    def __init__(self, request: Request, calls: Calls, device: torch.device) -> None:
        options, rows = request.options, len(request.prompts)
        size = options.block_size
        self._request, self._calls, self._device = request, calls, device
        self._masks = torch.full((rows, size - 1), request.mask_token_id, device=device)
        self._num_masked = torch.full((rows,), size - 1, device=device)
        self._editable = (torch.arange(size, device=device) > 0).expand(rows, size)
        self._time = options.unmasking.model_time(self._num_masked, size, 0, 1)

    def draft(
        self, block: int, request_rows: list[int], of: _Rows, state: ContextState
    ) -> Generator[StepEvent, None, tuple[Tensor, Tensor, int]]:
        """The known tokens and what the denoiser puts behind them, where the former lie: int64 [R, S]; how many masks
        it leaves, as it does where its logits are not usable, [R]; and the steps that the slowest row took."""
        request, options, count = self._request, self._request.options, len(request_rows)
        tokens = torch.cat([of.known.to(self._device), self._masks[:count]], dim=1)
        left = num_masked = self._num_masked[:count]
        seeds, numbers, rows = (tensor.to(self._device) for tensor in (of.seeds, of.numbers, of.rows))
        policy, t = options.unmasking, self._time[:count]
        num_steps, step = min(options.draft_steps, options.block_size - 1), 0  # each fills a mask at least
        active, places = list(range(count)), None  # the rows that hold masks; None: all
        while step < num_steps and active:
            before = tokens if places is None else tokens[places]  # [A, S]
            if step:
                t = policy.model_time(num_masked, options.block_size, step, num_steps)
            logits = self._calls.denoise(before, state, t)
            logits, _ = request.processed(logits, before, rows)
            result = remask(
                logits,
                before,
                mask_token_id=request.mask_token_id,
                policy=policy,
                step=step,
                num_steps=num_steps,
                seed=seeds,
                offset=numbers,
                noise="sequence",
                editable=self._editable[: len(active)],
                **options.sampling,
            )
            after, num_masked = result.tokens, result.num_masked
            tokens = after if places is None else tokens.index_copy(0, places, after)
            left = num_masked if places is None else left.index_copy(0, places, num_masked)
            step += 1
            masks = [0] * len(active) if step == num_steps else num_masked.tolist()
            of_request = [request_rows[i] for i in active]
            for row in of_request:
                request.nfe[row] += 1
            yield request.step(block, step - 1, of_request, before, after.clone(), masks, None)
            keep = indices([number > 0 for number in masks])
            if keep and len(keep) < len(active):
                index = on_device(keep, self._device)
                state, places = state.select(index), index if places is None else places[index]
                num_masked, seeds, numbers, rows = (x[index] for x in (num_masked, seeds, numbers, rows))
            active = [active[i] for i in keep]
        return tokens.to(of.known.device), left.to(of.known.device), step
