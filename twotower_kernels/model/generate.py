"""Text generation with a TwoTower: block diffusion, and its two autoregressive relatives.

The three modes differ only in who proposes the next tokens (Nemotron-TwoTower, arXiv 2606.26493):

* `mask_diffusion`: the denoiser fills a block of S masks in a few calls, reading the context tower's state; the
  finished block then runs through the context tower. Autoregressive over blocks, parallel within one.
* `mock_ar`: the denoiser as a next-token model. It reads the last token, with the context's state from before it.
* `ar`: the context tower alone.

`stream` does the work, one event at a time; `generate` runs a stream to its end. Both are methods of the model, too.

A batch of prompts of different lengths is each prompt alone, but for rounding, which depends on how many rows a product
of matrices has: every row has its own length, its own random stream (from the request's seed and its index there, or
from a seed of its own) and its own count of model calls. A row that has nothing left to do is taken out of the
batch.

Tokens are drawn, and the results lie, where the logits are: on the denoiser's device, in `ar` on the context tower's.
Where these are two, the model itself sends ids to the tower that reads them.

The host learns of a step what it must to go on, and no more: how many masks each row has left, whether its logits
were numbers, whether it wrote its last token. That is one small read per step; everything else stays on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.model.inference import inference
from twotower_kernels.ops.remask import remask
from twotower_kernels.options import generation as checks
from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.generation import Blocks, Prompts
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.options.seeds import row_seeds

if TYPE_CHECKING:
    from twotower_kernels.model.state import ContextState
    from twotower_kernels.model.two_tower import TwoTowerModel

MODES = ("mask_diffusion", "mock_ar", "ar")
FINISH = RemaskPolicy(finish=True)  # in the last step of its schedule: every candidate, none of which is the mask
PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone


@dataclass(frozen=True)
class StepEvent:
    """What just happened to R rows of the request: one un-masking step, or one block finished.

    In the autoregressive modes a block is one token and only finished blocks are reported. The finished blocks of a
    row, one after the other, are its new tokens before the cut at `max_new_tokens` and after the first EOS.

    What the host knows (rows, num_masked, nfe) is on the CPU, tokens are where the model draws them.
    """

    block: int  # index of the block (autoregressive modes: of the new token)
    step: int  # index of the un-masking step inside the block; for a finished block, the steps it took at most
    committed: bool  # the block is finished (otherwise: a step inside it)
    rows: Tensor  # [R] int64, index of each row in the request
    before: Tensor  # [R, S] int64, the tokens the model read (finished block: the same as after)
    after: Tensor  # [R, S] int64
    num_masked: Tensor  # [R] int64, masks left in `after`
    nfe: Tensor  # [R] int64, model calls this row has cost so far
    logprobs: Tensor | None = None  # [R, S] float32, where they were asked for: those of `after`, NaN for masks


@dataclass(frozen=True)
class GenerateResult:
    """The generated text of B prompts and what it cost."""

    sequences: list[Tensor]  # per row, 1-D int64: prompt + new tokens, cut after the EOS, which is kept
    new_tokens: list[Tensor]  # per row, 1-D int64: the new tokens alone
    nfe: list[int]  # per row: denoiser calls while the row had masks (ar: context-tower predictions)
    finish_reason: list[str]  # per row: "eos", "length", or "interrupted" if the stream was left before its end
    seconds: float  # spent generating, prefill included; what an observer does with the events is not counted
    logprobs: list[Tensor] | None = None  # per row, where they were asked for, 1-D float32: one per new token

    @property
    def tokens_per_nfe(self) -> float:
        """New tokens per model call over the whole batch; 0 when nothing was generated."""
        return sum(map(len, self.new_tokens)) / max(1, sum(self.nfe))


@dataclass
class _Request:
    """The request as the three modes see it: checked arguments, and what the rows have got so far."""

    model: TwoTowerModel
    prompts: list[Tensor]  # per row, 1-D int64
    max_new_tokens: int
    ends: Tensor  # [n] int64, the tokens with which a row ends
    sampling: dict[str, Any]  # temperature, top_k, top_p
    seeds: Tensor  # [B] int64, Philox keys
    nfe: list[int]  # per row
    blocks: list[list[Tensor]]  # per row, its finished blocks
    logprobs: list[list[Tensor]] | None  # per row, those of its finished blocks, if wanted
    denoise: Callable[..., Tensor]  # the model's; on a GPU recorded and replayed
    commit: Callable[[Tensor, ContextState], ContextState]  # of whole blocks, likewise

    def padded(self) -> tuple[Tensor, Tensor]:
        """The prompts as int64 [B, T], right-padded, and their lengths [B]."""
        lengths = torch.tensor([len(row) for row in self.prompts], device=self.seeds.device)
        return torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True), lengths

    def look(self, rows: list[int], num_masked: Tensor, tokens: Tensor, confidence: Tensor) -> list[tuple[int, bool]]:
        """Counts a model call of these rows, and makes the host's one read of it: per row, the masks left [R] and
        whether its block [R, S] holds an EOS.

        Remasking marks a position without usable logits by a confidence [R, S] of NaN, and leaves it alone for ever.
        """
        for row in rows:
            self.nfe[row] += 1
        left = torch.where(confidence.isnan().any(dim=1), -1, num_masked)
        ended = (tokens[..., None] == self.ends).flatten(1).any(dim=1)
        seen = torch.stack([left.long(), ended.long()], dim=1).tolist()
        for row, (masks, _) in zip(rows, seen, strict=True):
            if masks < 0:
                raise FloatingPointError(f"logits: expected finite numbers, got NaN or infinity in row {row}")
        return [(masks, bool(end)) for masks, end in seen]

    def step(
        self,
        block: int,
        step: int,
        rows: list[int],
        before: Tensor,
        after: Tensor,
        masks: list[int],
        logprobs: Tensor | None,
    ) -> StepEvent:
        """What the observer is told of an un-masking step."""
        nfe = torch.tensor([self.nfe[row] for row in rows])
        return StepEvent(block, step, False, torch.tensor(rows), before, after, torch.tensor(masks), nfe, logprobs)

    def finish_block(
        self, block: int, steps: int, rows: list[int], tokens: Tensor, logprobs: Tensor | None
    ) -> StepEvent:
        """Hands a finished block [R, S] to its rows. The observer gets a copy, to do with as he likes."""
        for row, new in zip(rows, tokens, strict=True):
            self.blocks[row].append(new)
        if self.logprobs is not None and logprobs is not None:
            for row, of_new in zip(rows, logprobs, strict=True):
                self.logprobs[row].append(of_new)
            logprobs = logprobs.clone()
        shown, nfe = tokens.clone(), torch.tensor([self.nfe[row] for row in rows])
        none = torch.zeros(len(rows), dtype=torch.int64)
        return StepEvent(block, steps, True, torch.tensor(rows), shown, shown, none, nfe, logprobs)

    def cut(self, row: int) -> tuple[Tensor, str]:
        """A row's new tokens, at most `max_new_tokens`, up to and including the first EOS."""
        new = torch.cat([self.prompts[row][:0], *self.blocks[row]])[: self.max_new_tokens]
        hits = (new[:, None] == self.ends).any(dim=1).nonzero()
        if len(hits):
            return new[: int(hits[0]) + 1], "eos"
        return new, "length" if len(new) == self.max_new_tokens else "interrupted"

    def cut_logprobs(self, row: int, length: int) -> Tensor:
        """Those of a row's first `length` new tokens."""
        assert self.logprobs is not None
        return torch.cat([self.seeds.new_empty(0, dtype=torch.float32), *self.logprobs[row]])[:length]


class Stream(Iterator[StepEvent]):
    """A generation in progress: an iterator over its events, and what it has written so far.

    The model works while the next event is asked for. Whoever stops asking, closes the stream or is interrupted
    (Ctrl-C) keeps every finished block: `result` says what they are. A stream that was interrupted does not go on.
    """

    def __init__(self, request: _Request, events: Generator[StepEvent, None, None], seconds: float) -> None:
        self._request, self._events, self._seconds = request, events, seconds

    @inference
    def __next__(self) -> StepEvent:
        start = time.perf_counter()
        try:
            return next(self._events)
        finally:
            self._seconds += time.perf_counter() - start

    def close(self) -> None:
        """Ends the generation and gives its memory back; `result` remains."""
        self._events.close()

    @inference
    def result(self) -> GenerateResult:
        """What has been generated so far; a row that has not ended has the finish reason "interrupted"."""
        request = self._request
        new_tokens, reasons = zip(*map(request.cut, range(len(request.prompts))), strict=True)
        sequences = [torch.cat(pair) for pair in zip(request.prompts, new_tokens, strict=True)]
        logprobs = None
        if request.logprobs is not None:
            logprobs = [request.cut_logprobs(row, len(new)) for row, new in enumerate(new_tokens)]
        return GenerateResult(sequences, list(new_tokens), list(request.nfe), list(reasons), self._seconds, logprobs)


@inference
def stream(
    model: TwoTowerModel,
    prompts: Prompts,
    *,
    mode: str = "mask_diffusion",
    max_new_tokens: int,
    block_size: int = 16,
    steps_per_block: int = 16,
    confidence_threshold: float = 0.8,
    policy: RemaskPolicy | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    mask_token_id: int = 3,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    logprobs: bool = False,
) -> Stream:
    """Continues every prompt by up to `max_new_tokens` tokens, one event after the other. Not differentiable.

    Source: Nemotron-TwoTower (arXiv 2606.26493), with per-row lengths and ends.

    Args:
        model: the two towers.
        prompts: [B, T], or B one-dimensional tensors, arrays or lists of any lengths >= 1; integers of any dtype.
        mode: "mask_diffusion", "mock_ar" or "ar".
        max_new_tokens: per row. When it is no multiple of the block size, the last block is denoised whole and then
            cut, so a shorter request gives a prefix of a longer one.
        block_size, steps_per_block: S and T (mask_diffusion only). S above the size the model was trained with makes
            sampling collapse and is warned about; below is safe.
        confidence_threshold: gamma of the TwoTower rule. With n masks and r steps left, each step commits the
            max(1, #{confidence > gamma}, ceil(n / r)) most confident ones.
        policy: another un-masking rule; replaces `confidence_threshold`. Some rules need more than T calls (a threshold
            may let one token pass at a time, the posterior may leave masks): step i >= T runs as the last step of a
            schedule of i + 1 steps, so its random numbers are new. A block that still has masks after max(T, S) calls
            gets one more, which commits its best tokens everywhere, so it ends in any case and without a mask.
        temperature, top_k, top_p: sampling; temperature 0 is greedy (as 1e-36 is, and less), 1e6 the highest; top_k 0
            and top_p 1 are no filter.
        mask_token_id: what stands at a place to be filled (mask_diffusion only; the other modes treat it as any token).
        eos_token_id: a token, or several: a row ends with the first of them among its new tokens. None: with none.
        seed: the request's seed, 64 bits, or one seed per row. Row b draws with the key `sequence_seed(seed, b)`, or
            with its own seed as the key: so it draws the same in any batch, and `seed=[sequence_seed(seed, b)]` repeats
            row b of a request with one seed. In mask_diffusion the counter holds (token, position in the block, step,
            index of the block); in the autoregressive modes (token, 0, 0, index of the new token).
        logprobs: also say how probable each new token was: the logarithm of its probability at temperature 1, without
            filters, for the tower that proposed it. In mask_diffusion the mask token has no probability, and it is that
            of the step that wrote the token, or last rewrote it.

        Numbers may be NumPy's, and elements of arrays or of tensors on the CPU.

    Returns:
        A `Stream` of `StepEvent`; its `result()` is a `GenerateResult` of what is finished so far.

    Raises:
        ValueError: an argument out of its range, a policy that needs no masks (renoise), seeds for another number of
            rows. TypeError: prompts that are not integers, a number that is none. Both at once; FloatingPointError,
            for logits that are NaN or infinite, when it happens.
    """
    start = time.perf_counter()
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    vocab_size = model.config.vocab_size
    device = model.device if mode == "ar" else model.denoiser_device
    rows = checks.prompt_rows(prompts, vocab_size, device)
    captured = CapturedModel(model)
    request = _Request(
        model=model,
        prompts=rows,
        max_new_tokens=checks.new_tokens(max_new_tokens),
        ends=torch.tensor(checks.end_tokens(eos_token_id, vocab_size), dtype=torch.int64, device=device),
        sampling=checks.sampling(temperature, top_k, top_p, vocab_size),
        seeds=torch.tensor(row_seeds(seed, len(rows)), device=device),
        nfe=[0] * len(rows),
        blocks=[[] for _ in rows],
        logprobs=[[] for _ in rows] if logprobs else None,
        denoise=(captured if _records(model.denoiser_device) else model).denoise,
        commit=(captured if _records(model.device) else model).commit,
    )
    if mode == "mask_diffusion":
        blocks = checks.blocks(model, block_size, steps_per_block, confidence_threshold, mask_token_id, policy)
        events = _diffuse(request, blocks)
    else:
        events = _autoregress(request, with_denoiser=mode == "mock_ar")
    return Stream(request, events, time.perf_counter() - start)


def generate(
    model: TwoTowerModel,
    prompts: Prompts,
    *,
    mode: str = "mask_diffusion",
    max_new_tokens: int,
    block_size: int = 16,
    steps_per_block: int = 16,
    confidence_threshold: float = 0.8,
    policy: RemaskPolicy | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    mask_token_id: int = 3,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    logprobs: bool = False,
    on_step: Callable[[StepEvent], object] | None = None,
) -> GenerateResult:
    """Continues every prompt by up to `max_new_tokens` tokens: a `stream` run to its end. Not differentiable.

    Args:
        model, prompts, mode, ..., logprobs: as for `stream`.
        on_step: called with a `StepEvent` after every un-masking step and for every finished block.

    Returns:
        A `GenerateResult`: text, model calls and finish reason of every row.

    Raises:
        ValueError, TypeError, FloatingPointError: as `stream` does. An exception from `on_step`, or Ctrl-C, ends the
        generation; who wants to keep what was written until then uses `stream`.
    """
    events = stream(
        model,
        prompts,
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps_per_block=steps_per_block,
        confidence_threshold=confidence_threshold,
        policy=policy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        seed=seed,
        logprobs=logprobs,
    )
    for event in events:
        if on_step is not None:
            on_step(event)
    return events.result()


def _records(device: torch.device) -> bool:
    """Whether calls of a tower there are recorded and replayed."""
    return device.type == "cuda"


def _logprobs(logits: Tensor, tokens: Tensor, without: int | None = None) -> Tensor:
    """The logarithms of the tokens' probabilities, logits [R, S, V] and tokens [R, S] -> float32 [R, S].

    without: a token that has no probability.
    """
    if without is not None:
        logits = logits.clone()
        logits[..., without] = -torch.inf
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).float()


def _diffuse(request: _Request, blocks: Blocks) -> Generator[StepEvent, None, None]:
    """Block after block: denoise it, hand it out, extend the context of the rows that go on."""
    num_blocks = -(-request.max_new_tokens // blocks.size)
    if not num_blocks:
        return
    state = request.model.prefill(*request.padded())
    rows, seeds = list(range(len(request.prompts))), request.seeds  # [R] those still generating, in the state's order
    for block in range(num_blocks):
        tokens, logprobs, steps, ended = yield from _denoise_block(request, state, rows, seeds, blocks, block)
        yield request.finish_block(block, steps, rows, tokens, logprobs)
        if block + 1 == num_blocks or all(ended):
            return  # the last block is read by nobody: the context need not grow
        if any(ended):
            keep = _kept([not end for end in ended])
            index = _index(keep, seeds.device)
            state, seeds, tokens, rows = state.select(index), seeds[index], tokens[index], [rows[i] for i in keep]
        state = request.commit(tokens, state)


def _denoise_block(
    request: _Request,
    state: ContextState,
    rows: list[int],
    seeds: Tensor,
    blocks: Blocks,
    block: int,
) -> Generator[StepEvent, None, tuple[Tensor, Tensor | None, int, list[bool]]]:
    """From all masks to none: int64 [R, S] tokens, float32 [R, S] their logprobs if wanted, the steps the slowest row
    took, and per row whether it has ended."""
    block_size, num_steps, mask_token_id, policy = blocks
    device = seeds.device
    tokens = torch.full((len(rows), block_size), mask_token_id, device=device)
    logprobs = None if request.logprobs is None else torch.full(tokens.shape, torch.nan, device=device)
    ended = [False] * len(rows)
    active, where = list(range(len(rows))), torch.arange(len(rows), device=device)  # [A] those that still hold masks
    masked = torch.full((len(rows),), block_size, device=device)  # [A]
    last_call = max(num_steps, block_size)
    for step in range(last_call + 1):
        of_steps = max(num_steps, step + 1)  # past the schedule, every step is the last one
        before = tokens[where]  # [A, S]
        t = policy.model_time(masked, block_size, step, of_steps)  # [A]
        logits = request.denoise(before, state, t)  # [A, S, V]
        result = remask(
            logits,
            before,
            mask_token_id=mask_token_id,
            policy=policy if step < last_call else FINISH,
            step=step,
            num_steps=of_steps,
            seed=seeds,
            offset=block,
            initial_num_masked=block_size,
            **request.sampling,
        )
        tokens[where] = result.tokens
        written = None  # [A, S] logprobs
        if logprobs is not None:
            written = _logprobs(logits, result.tokens, without=mask_token_id)
            written = torch.where(result.transfer_mask, written, logprobs[where])
            written = torch.where(result.tokens == mask_token_id, torch.nan, written)
            logprobs[where] = written
        masked = result.num_masked
        of_request = [rows[i] for i in active]
        seen = request.look(of_request, masked, result.tokens, result.confidence)
        yield request.step(block, step, of_request, before, result.tokens, [masks for masks, _ in seen], written)
        for i, (_, end) in zip(active, seen, strict=True):
            ended[i] = end
        keep = _kept([masks > 0 for masks, _ in seen])
        if not keep:
            break
        if len(keep) < len(active):
            index = _index(keep, device)
            state, seeds, masked, where = state.select(index), seeds[index], masked[index], where[index]
            active = [active[i] for i in keep]
    return tokens, logprobs, step + 1, ended


def _autoregress(request: _Request, with_denoiser: bool) -> Generator[StepEvent, None, None]:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar).

    A token is the proposal of a remasking step on a block of one, so both kinds of generation share one sampler.
    """
    if not request.max_new_tokens:
        return
    prompts, lengths = request.padded()
    rows, seeds = list(range(len(request.prompts))), request.seeds  # [R] those still generating, in the state's order
    last = prompts.gather(1, lengths[:, None] - 1)  # [R, 1]
    if with_denoiser:  # it reads the last token itself, so the context stops before it
        state = request.model.prefill(prompts[:, :-1], lengths - 1)
    else:
        state = request.model.prefill(prompts, lengths)
    for index in range(request.max_new_tokens):
        logits = request.denoise(last, state, t=None) if with_denoiser else state.logits[:, None]  # [R, 1, V]
        mask = torch.zeros_like(last)  # a block of one mask, whatever its number
        result = remask(logits, mask, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=index, **request.sampling)
        token = result.candidate  # [R, 1]
        seen = request.look(rows, result.num_masked, token, result.confidence)
        logprobs = None if request.logprobs is None else _logprobs(logits, token)
        yield request.finish_block(index, 1, rows, token, logprobs)
        keep = _kept([not end for _, end in seen])
        if index + 1 == request.max_new_tokens or not keep:
            return
        if len(keep) < len(rows):
            kept = _index(keep, seeds.device)
            state, seeds, last, token = state.select(kept), seeds[kept], last[kept], token[kept]
            rows = [rows[i] for i in keep]
        state = request.commit(last if with_denoiser else token, state)
        last = token


def _kept(flags: list[bool]) -> list[int]:
    """The indices of the flags that are set."""
    return [i for i, flag in enumerate(flags) if flag]


def _index(rows: list[int], device: torch.device) -> Tensor:
    """The rows that stay, for the device. Only where some leave: each is a copy to it."""
    return torch.tensor(rows, dtype=torch.int64, device=device)
