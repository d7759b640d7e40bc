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

import torch

from twotower_kernels.model.autoregression import autoregress
from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.model.diffusion import diffuse
from twotower_kernels.model.inference import inference
from twotower_kernels.model.interface import Towers
from twotower_kernels.model.request import Request
from twotower_kernels.model.results import GenerateResult, StepEvent
from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.generation import MODES as MODES
from twotower_kernels.options.generation import GenerationConfig, Prompts, prompt_rows
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.options.seeds import row_seeds


class Stream(Iterator[StepEvent]):
    """A generation in progress: an iterator over its events, and what it has written so far.

    The model works while the next event is asked for. Whoever stops asking, closes the stream or is interrupted
    (Ctrl-C) keeps every finished block: `result` says what they are. A stream that was interrupted does not go on.
    """

    def __init__(self, request: Request, events: Generator[StepEvent, None, None], seconds: float) -> None:
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
    model: Towers,
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
    mask_token_id: int | None = None,
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
        mask_token_id: what a position to be filled holds (mask_diffusion only; the other modes treat it as any token).
            None: the config's `mask_token_id`, which is 3 where a released file does not say another.
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
    options = GenerationConfig(
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
    ).for_model(model.config)
    device = model.device if mode == "ar" else model.denoiser_device
    rows = prompt_rows(prompts, model.config.vocab_size, device)
    captured = CapturedModel(model)
    request = Request(
        model=model,
        options=options,
        prompts=rows,
        ends=torch.tensor(options.ends, dtype=torch.int64, device=device),
        seeds=torch.tensor(row_seeds(options.seed, len(rows)), device=device),
        nfe=[0] * len(rows),
        blocks=[[] for _ in rows],
        logprobs=[[] for _ in rows] if logprobs else None,
        denoise=(captured if _records(model.denoiser_device) else model).denoise,
        commit=(captured if _records(model.device) else model).commit,
    )
    events = diffuse(request) if mode == "mask_diffusion" else autoregress(request, with_denoiser=mode == "mock_ar")
    return Stream(request, events, time.perf_counter() - start)


def generate(
    model: Towers,
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
    mask_token_id: int | None = None,
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
