"""`generate_blocks`: the loop around a block-diffusion language model, for any model that is a function of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower_kernels.generation.blocks import diffuse
from twotower_kernels.generation.plan import plan_blocks
from twotower_kernels.generation.request import Request, on_device
from twotower_kernels.generation.results import GenerateResult, StepEvent
from twotower_kernels.generation.stream import Stream
from twotower_kernels.options.arguments import Integers, kind_of
from twotower_kernels.options.generation import GenerationConfig, Processor, Prompts, prompt_rows
from twotower_kernels.options.remask_policy import RemaskPolicy

Step = Callable[[Tensor, Tensor, Tensor, bool], Tensor | None]  # (tokens [R, S], start [R], rows [R], commit) -> logits


def stream_blocks(
    step: Step,
    prompts: Prompts,
    *,
    policy: RemaskPolicy,
    block_size: int,
    mask_token_id: int,
    max_new_tokens: int,
    steps_per_block: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    processors: Sequence[Processor] = (),
    logprobs: bool = False,
    aligned: bool = True,
    device: torch.device | str | None = None,
) -> Stream:
    """Fills the masks of every prompt, and continues it by up to `max_new_tokens` tokens, one event after the other.

    The loop of block diffusion (BD3-LM, arXiv 2503.09573), for any model. Not differentiable: `step` is called under
    `torch.no_grad`.

    Args:
        step: the model, `step(tokens, start, rows, commit)`. tokens `[R, W]` int64 stand in these rows of the request,
            rows `[R]` int64, at positions `start[r]` to `start[r] + W - 1`, start `[R]` int64. All are copies, on the
            device of the prompts.

            commit False: W is `block_size`, and tokens hold masks; returns their logits `[R, W, V]`, floating: row i
            those of position i, V the same in every call, the mask token included. The same block comes again until no
            mask is left, without the rows that have none any more.

            commit True: the tokens are final, and everything before them was committed; extends the rows' caches and
            returns None. First the prompts up to their first blocks: rows of which this part is equally long share one
            call, with start 0 and all of it, shorter ones first; rows without it are left out. Then each finished
            block, W `block_size`, but not a row's last one.
        prompts: `[B, T]`, or B one-dimensional tensors, arrays or lists of any lengths >= 1; integers of any dtype.
            Masks in them are filled in; what is given is left as it is.
        policy: the un-masking rule, one that needs masks. Some need more than T steps: step i >= T runs as the last of
            a schedule of i + 1, and a block that still has masks after max(T, S) gets one more, which fills them.
        block_size, steps_per_block: S and T; None: T = S.
        mask_token_id: what a position to be filled holds.
        max_new_tokens: behind each prompt. The last block is denoised whole and then cut, so that a shorter request
            gives a prefix of a longer one. With 0, masks are filled in, and nothing is done to prompts without.
        temperature, top_k, top_p: sampling; temperature 0 is greedy; top_k 0 and top_p 1 are no filter.
        eos_token_id: a token, or several: a row ends with the first of them that is written behind its last given
            token; one written between given tokens is a token as any other. None: with none.
        seed: the request's seed, 64 bits, or one per row. Row b draws with the key `sequence_seed(seed, b)`, or with
            its own seed as the key; the counter holds (token, position in the block, step, index of the block, counted
            from the row's first one that holds a mask).
        processors: called one after the other as `processor(logits [R, S, V], tokens [R, S], rows [R])` in every step,
            before anything is sampled; each returns logits of the same shape, and may have written to those it got.
            Tokens are the block as it stands; what stands before it is told by the events.
        logprobs: also say how probable each new token was: the logarithm of its probability at temperature 1, without
            filters and processors, the mask token left out, in the step that wrote it, or last rewrote it.
        aligned: blocks begin at multiples of S, as in BD3-LM, SDAR and LLaDA2: the first one is that of the first mask,
            or new token, and holds the end of the prompt. False: the first block begins with the first mask or new
            token, as in LLaDA, Dream and Nemotron-TwoTower.
        device: of the model; None: that of the prompts.

        Numbers may be NumPy's, and elements of arrays or of tensors on the CPU.

    Returns:
        A `Stream` of `StepEvent`; its `result()` is a `GenerateResult` of what is finished so far.

    Raises:
        ValueError: an argument out of its range, a policy that needs no masks (renoise), seeds for another number of
            rows. TypeError: prompts that are not integers, a number that is none, no callable. Both at once.
            When it happens: TypeError and ValueError for what `step` and processors return, and for tokens that are not
            in the vocabulary of the first logits; FloatingPointError for logits that are NaN or infinite.
    """
    began = time.perf_counter()
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps_per_block=block_size if steps_per_block is None else steps_per_block,
        policy=policy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        seed=seed,
        logprobs=logprobs,
        processors=processors,
    )
    if not callable(step):
        raise TypeError(f"step: expected a callable, got {kind_of(step)}")
    if options.policy is None:
        raise TypeError("policy: expected a RemaskPolicy, got NoneType")
    if options.mask_token_id is None:
        raise TypeError("mask_token_id: expected a token, got None")
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned: expected True or False, got {aligned!r}")
    rows = prompt_rows(prompts, None, None if device is None else torch.device(device))
    devices = {row.device for row in rows}
    if len(devices) > 1:
        raise ValueError(f"prompts: expected one device, got {', '.join(sorted(map(str, devices)))}")
    plans = [
        plan_blocks(
            row,
            mask_token_id=options.mask_token_id,
            block_size=options.block_size,
            max_new_tokens=options.max_new_tokens,
            aligned=aligned,
        )
        for row in rows
    ]
    request = Request.begin(options, rows, plans)
    model = _CheckedStep(step, options, max(int(row.max()) for row in rows))
    events = diffuse(request, lambda request_rows: _prefilled(model, request, request_rows))
    return Stream(request, events, time.perf_counter() - began, torch.no_grad())


def generate_blocks(
    step: Step,
    prompts: Prompts,
    *,
    policy: RemaskPolicy,
    block_size: int,
    mask_token_id: int,
    max_new_tokens: int,
    steps_per_block: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    processors: Sequence[Processor] = (),
    logprobs: bool = False,
    aligned: bool = True,
    device: torch.device | str | None = None,
    on_step: Callable[[StepEvent], object] | None = None,
) -> GenerateResult:
    """Fills the masks of every prompt, and continues it by up to `max_new_tokens` tokens: `stream_blocks` run to its
    end.

    Args:
        step, prompts, policy, ..., device: as for `stream_blocks`.
        on_step: called with a `StepEvent` after every un-masking step and for every finished block.

    Returns:
        A `GenerateResult`: text, model calls and finish reason of every row.

    Raises:
        ValueError, TypeError, FloatingPointError: as `stream_blocks` does. An exception from `step` or `on_step`, or
        Ctrl-C, ends the generation; who wants to keep what was written until then uses `stream_blocks`.
    """
    return stream_blocks(
        step,
        prompts,
        policy=policy,
        block_size=block_size,
        mask_token_id=mask_token_id,
        max_new_tokens=max_new_tokens,
        steps_per_block=steps_per_block,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        seed=seed,
        processors=processors,
        logprobs=logprobs,
        aligned=aligned,
        device=device,
    ).run(on_step)


class _CheckedStep:
    """The caller's step: it gets copies of tokens, and what it returns is checked."""

    def __init__(self, step: Step, options: GenerationConfig, highest_token: int) -> None:
        self._step, self._options, self._highest_token = step, options, highest_token
        self._vocabulary: int | None = None  # known from the first logits on

    def logits(self, tokens: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        logits = self._step(tokens.clone(), start.clone(), rows.clone(), False)
        vocabulary = "V" if self._vocabulary is None else self._vocabulary
        expected = f"step: expected floating logits [{tokens.shape[0]}, {tokens.shape[1]}, {vocabulary}]"
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"{expected} on {tokens.device}, got {kind_of(logits)}")
        shaped = logits.ndim == 3 and logits.shape[:2] == tokens.shape and vocabulary in ("V", logits.shape[2])
        if not shaped or logits.device != tokens.device:
            raise ValueError(f"{expected} on {tokens.device}, got {kind_of(logits)}")
        if self._vocabulary is None:
            self._check_tokens(logits.shape[2])
        return logits

    def commit(self, tokens: Tensor, start: Tensor, rows: Tensor) -> None:
        returned = self._step(tokens.clone(), start.clone(), rows.clone(), True)
        if returned is not None:
            raise TypeError(f"step: expected None where commit is True, got {kind_of(returned)}")

    def _check_tokens(self, vocabulary: int) -> None:
        self._options.check_vocabulary(vocabulary)
        if self._highest_token >= vocabulary:
            raise ValueError(f"prompts: expected tokens of a vocabulary of {vocabulary}, got {self._highest_token}")
        self._vocabulary = vocabulary


@dataclass(frozen=True)
class _StepContext:
    """The context of R rows, as `diffuse` sees it. What it holds is the caller's."""

    step: _CheckedStep
    start: Tensor  # [R] int64, position of the block
    rows: Tensor  # [R] int64, in the request

    def denoise(self, tokens: Tensor, num_masked: Tensor, step: int, num_steps: int) -> Tensor:
        return self.step.logits(tokens, self.start, self.rows)

    def select(self, index: Tensor) -> _StepContext:
        return replace(self, start=self.start[index], rows=self.rows[index])

    def commit(self, tokens: Tensor) -> _StepContext:
        self.step.commit(tokens, self.start, self.rows)
        return replace(self, start=self.start + tokens.shape[1])


def _prefilled(step: _CheckedStep, request: Request, request_rows: list[int]) -> _StepContext:
    """The context of these rows, with what stands before their first blocks committed."""
    device, starts = request.seeds.device, [request.plans[row].start for row in request_rows]
    for length in sorted({*starts} - {0}):
        group = [row for row, start in zip(request_rows, starts, strict=True) if start == length]
        tokens, rows = torch.stack([request.prompts[row][:length] for row in group]), on_device(group, device)
        step.commit(tokens, torch.zeros_like(rows), rows)
    return _StepContext(step, on_device(starts, device), on_device(request_rows, device))
