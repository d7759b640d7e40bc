"""Text generation with a TwoTower: block diffusion, its two autoregressive relatives, and autoregression by drafts.

The modes differ in who proposes the next tokens (Nemotron-TwoTower, arXiv 2606.26493):

* `mask_diffusion`: the denoiser fills a block of S masks in a few calls, reading the context tower's state; the
  finished block then runs through the context tower. Autoregressive over blocks, parallel within one.
* `mock_ar`: the denoiser as a next-token model. It reads the last token, with the context's state from before it.
* `ar`: the context tower alone.
* `speculative`: the text of `ar`, several tokens at a time (`speculative.py`): the denoiser drafts a block, the context
  tower reads it in one pass and keeps what it would have written itself.

`stream` does the work, one event at a time; `generate` runs a stream to its end. Both are methods of the model, too.

A batch of prompts of different lengths is each prompt alone, but for rounding, which depends on how many rows a product
of matrices has: every row has its own length, its own random stream (from the request's seed and its index there, or
from a seed of its own) and its own count of model calls. A row that has nothing left to do is taken out of the
batch.

Tokens are drawn, and the results lie, where the logits are: on the denoiser's device, in `ar` and `speculative` on the
context tower's.
Where these are two, the model itself sends ids to the tower that reads them.

The loop over blocks is `generation.blocks`, which any model can use; its steps read one small tensor back to the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from twotower_kernels.generation.blocks import diffuse
from twotower_kernels.generation.plan import plan_blocks, plan_tokens
from twotower_kernels.generation.request import Request
from twotower_kernels.generation.results import GenerateResult, StepEvent
from twotower_kernels.generation.stream import Stream
from twotower_kernels.model.autoregression import autoregress
from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.model.diffusion import prefilled
from twotower_kernels.model.inference import inference
from twotower_kernels.model.interface import Calls, Towers
from twotower_kernels.model.speculative import speculate
from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.generation import MODES as MODES
from twotower_kernels.options.generation import GenerationConfig, Processor, Prompts, prompt_rows
from twotower_kernels.options.remask_policy import RemaskPolicy


@inference
def stream(
    model: Towers,
    prompts: Prompts,
    *,
    mode: str = "mask_diffusion",
    max_new_tokens: int,
    block_size: int = 16,
    steps_per_block: int = 16,
    draft_steps: int = 1,
    confidence_threshold: float = 0.8,
    policy: RemaskPolicy | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    mask_token_id: int | None = None,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    logprobs: bool = False,
    processors: Sequence[Processor] = (),
) -> Stream:
    """Continues every prompt by up to `max_new_tokens` tokens, one event after the other. Not differentiable.

    Source: Nemotron-TwoTower (arXiv 2606.26493), with per-row lengths and ends.

    Args:
        model: the two towers.
        prompts: [B, T], or B one-dimensional tensors, arrays or lists of any lengths >= 1; integers of any dtype. In
            mask_diffusion masks in them are filled in, and what is given stays: the first block begins with the first
            mask, what is given of it and later ones is read there, and left alone. In the other modes a mask is a token
            as any other.
        mode: "mask_diffusion", "mock_ar", "ar" or "speculative". The last writes what "ar" does with the same
            arguments, on a CPU to the bit (logprobs, too), on a GPU but where rounding decides between two tokens.
        max_new_tokens: per row, behind its prompt. Where a row does not end with a block, the last one is denoised
            whole and then cut, so a shorter request gives a prefix of a longer one. With 0 masks are filled in, and
            nothing is done to prompts without.
        block_size, steps_per_block: S and T (mask_diffusion). S above the size the model was trained with makes
            sampling collapse and is warned about; below is safe. In speculative, S is the length of a draft, its known
            first token included: 1 to 64.
        draft_steps: calls of the denoiser per draft (speculative only). All but the last fill masks from the left as
            far as their confidence is above `confidence_threshold`, one at least; the last fills the rest.
        confidence_threshold: gamma of the TwoTower rule. With n masks and r steps left, each step commits the
            max(1, #{confidence > gamma}, ceil(n / r)) most confident ones.
        policy: another un-masking rule (mask_diffusion only); replaces `confidence_threshold`. Some rules need more
            than T calls (a threshold may let one token pass at a time, the posterior may leave masks): step i >= T runs
            as the last step of a schedule of i + 1 steps, so its random numbers are new. A block that still has masks
            after max(T, S) calls gets one more, which commits its best tokens everywhere, so it ends in any case and
            without a mask.
        temperature, top_k, top_p: sampling; temperature 0 is greedy (as 1e-36 is, and less), 1e6 the highest; top_k 0
            and top_p 1 are no filter.
        mask_token_id: what a position to be filled holds, of a block or a draft; the other modes treat it as any token.
            None: the config's `mask_token_id`, which is 3 where a released file does not say another.
        eos_token_id: a token, or several: a row ends with the first of them that is written behind everything given.
            None: with none.
        seed: the request's seed, 64 bits, or one seed per row. Row b draws with the key `sequence_seed(seed, b)`, or
            with its own seed as the key: so it draws the same in any batch, and `seed=[sequence_seed(seed, b)]` repeats
            row b of a request with one seed. In mask_diffusion the counter holds (token, position in the block, step,
            index of the block); in the other modes (token, 0, 0, index of the new token).
        logprobs: also say how probable each new token was: the logarithm of its probability at temperature 1, without
            filters and processors, for the tower that proposed it. In mask_diffusion the mask token has no probability,
            and it is that of the step that wrote the token, or last rewrote it. In speculative it is the context
            tower's, and un-masking steps have none.
        processors: called one after the other as `processor(logits [R, S, V], tokens [R, S], rows [R])` in every step,
            before anything is sampled; each returns logits of the same shape, and may have written to those it got.
            Rows are indices in the request. Tokens are the block as it stands, in the autoregressive modes one mask;
            what stands before it is told by the events. In speculative they see the drafts, and then what the context
            tower says of each position by itself, as in ar, before the event that tells what stands there.

        Numbers may be NumPy's, and elements of arrays or of tensors on the CPU.

    Returns:
        A `Stream` of `StepEvent`; its `result()` is a `GenerateResult` of what is finished so far.

    Raises:
        ValueError: an argument out of its range, a policy that needs no masks (renoise), any in speculative, seeds for
            another number of rows. TypeError: prompts that are not integers, a number that is none. Both at once;
            FloatingPointError, for logits that are NaN or infinite, when it happens.
    """
    start = time.perf_counter()
    options = GenerationConfig(
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps_per_block=steps_per_block,
        draft_steps=draft_steps,
        confidence_threshold=confidence_threshold,
        policy=policy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        seed=seed,
        logprobs=logprobs,
        processors=processors,
    ).for_model(model.config)
    device = model.device if mode in ("ar", "speculative") else model.denoiser_device
    rows = prompt_rows(prompts, model.config.vocab_size, device)
    captured = CapturedModel(model)
    context = captured if _records(model.device) else model
    calls = Calls(
        prefill=model.prefill,
        denoise=(captured if _records(model.denoiser_device) else model).denoise,
        commit=context.commit,
        verify=context.verify,
        accept=context.accept,
    )
    if mode == "mask_diffusion":
        mask, new = options.mask_token_id, options.max_new_tokens
        assert mask is not None  # the model's, if no other was given
        plans = [
            plan_blocks(row, mask_token_id=mask, block_size=options.block_size, max_new_tokens=new, aligned=False)
            for row in rows
        ]
        request = Request.begin(options, rows, plans)
        events = diffuse(request, partial(prefilled, request, calls))
    else:
        request = Request.begin(options, rows, [plan_tokens(row, options.max_new_tokens) for row in rows])
        if mode == "speculative":
            events = speculate(request, calls, model.config.mask_token_id, model.denoiser_device)
        else:
            events = autoregress(request, calls, mode == "mock_ar", model.config.mask_token_id)
    return Stream(request, events, time.perf_counter() - start, inference)


def generate(
    model: Towers,
    prompts: Prompts,
    *,
    mode: str = "mask_diffusion",
    max_new_tokens: int,
    block_size: int = 16,
    steps_per_block: int = 16,
    draft_steps: int = 1,
    confidence_threshold: float = 0.8,
    policy: RemaskPolicy | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    mask_token_id: int | None = None,
    eos_token_id: int | Integers | None = None,
    seed: int | Integers = 0,
    logprobs: bool = False,
    processors: Sequence[Processor] = (),
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
    return stream(
        model,
        prompts,
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps_per_block=steps_per_block,
        draft_steps=draft_steps,
        confidence_threshold=confidence_threshold,
        policy=policy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        seed=seed,
        logprobs=logprobs,
        processors=processors,
    ).run(on_step)


def _records(device: torch.device) -> bool:
    """Whether calls of a tower there are recorded and replayed."""
    return device.type == "cuda"
