"""Text generation with a TwoTower: block diffusion, its two autoregressive relatives, and autoregression by drafts.

The modes differ in who proposes the next tokens (Nemotron-TwoTower, arXiv 2606.26493):

* `mask_diffusion`: the denoiser fills a block of S masks in a few calls, reading the context tower's state; the
  finished block then runs through the context tower. Autoregressive over blocks, parallel within one.
* `mock_ar`: the denoiser as a next-token model. It reads the last token, with the context's state from before it.
* `ar`: the context tower alone.
* `speculative`: the text of `ar`. The denoiser drafts a block behind the next token, the context tower reads it at once
  and keeps what it would have written itself (speculative decoding, arXiv 2211.17192, with one noise for both).

A batch of prompts of different lengths is each prompt alone, but for rounding, which depends on how many rows a product
of matrices has: every row has its own length, its own random stream (from the request's seed and its index there, or
from a seed of its own) and its own count of model calls. A row that has nothing left to do is taken out of the
batch, so it costs nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.generation import MODES, GenerationConfig, Processor, Prompts, prompt_rows
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.generation_request import (
    GenerateResult,
    Run,
    StepEvent,
    begin,
    check_finite,
    logprobs_of,
    propose,
)
from twotower_kernels.reference.model import ContextState, TwoTower
from twotower_kernels.reference.remask import remask
from twotower_kernels.reference.remask_schedule import model_time
from twotower_kernels.reference.speculative import speculate

__all__ = ["MODES", "GenerateResult", "StepEvent", "generate"]

FINISH = RemaskPolicy(finish=True)  # in the last step of its schedule: every candidate, none of which is the mask


@torch.no_grad()
def generate(
    model: TwoTower,
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
    """Continue every prompt by up to `max_new_tokens` tokens.

    Args:
        model: the two towers.
        prompts: [B, T], or B one-dimensional tensors, arrays or lists of any lengths >= 1; integers of any dtype. In
            mask_diffusion masks in them are filled in, and what is given stays: the first block begins with the first
            mask, what is given of it and later ones is read there, and left alone. In the other modes a mask is a token
            as any other.
        mode: "mask_diffusion", "mock_ar", "ar" or "speculative". The last writes what "ar" does with the same
            arguments.
        max_new_tokens: per row, behind its prompt. Where a row does not end with a block, the last one is denoised
            whole and then cut, so a shorter request gives a prefix of a longer one. With 0 masks are filled in, and
            nothing is done to prompts without.
        block_size, steps_per_block: S and T (mask_diffusion). S above the size the model was trained with makes
            sampling collapse and is warned about; below is safe. In speculative, S is the length of a draft, its known
            first token included.
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
            None: the config's.
        eos_token_id: a token, or several: a row ends with the first of them that is written behind everything given.
        seed: the request's seed, or one per row. Row b draws with the key `philox.sequence_seed(seed, b)`, or with its
            own seed as the key. In mask_diffusion the counter holds (token, position in the block, step, index of the
            block); in the other modes (token, 0, 0, index of the new token).
        logprobs: also give the logarithm of each new token's probability at temperature 1, without filters and
            processors, by the tower that proposed it. In mask_diffusion the mask token has none, and it is that of the
            step that wrote the token, or last rewrote it.
        processors: called one after the other as `processor(logits [R, S, V], tokens [R, S], rows [R])` before anything
            is sampled; each returns logits. Tokens are the block as it stands, in the autoregressive modes one mask;
            in speculative they see drafts, and then what the context tower says, one position at a time as in ar.
        on_step: called with a `StepEvent` after every un-masking step and for every finished block.

    Raises:
        ValueError: an argument out of its range (the message names it, its value and the row), a policy that needs no
            masks (renoise).
        TypeError: prompts that are not integers.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    start = time.perf_counter()
    config = GenerationConfig(
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
    rows = prompt_rows(prompts, model.config.vocab_size, next(model.parameters()).device)
    run = begin(model, config, rows, on_step)
    if mode == "mask_diffusion":
        _diffuse(run)
    elif mode == "speculative":
        speculate(run)
    elif config.max_new_tokens:
        _autoregress(run, with_denoiser=mode == "mock_ar")
    sequences, new_tokens, of_new, reasons = (list(part) for part in zip(*map(run.cut, range(len(rows))), strict=True))
    seconds = time.perf_counter() - start
    asked, verifications = of_new if logprobs else None, run.verifications.tolist() if mode == "speculative" else None
    return GenerateResult(sequences, new_tokens, run.nfe.tolist(), reasons, seconds, asked, verifications)


def _diffuse(run: Run) -> None:
    """Block after block: denoise it, hand it out, extend the context of the rows that go on."""
    rows = run.num_blocks.nonzero()[:, 0]  # [R] rows still generating, in the state's order
    if not len(rows):
        return
    lengths = run.first[rows]
    state = run.model.prefill(run.text[rows, : int(lengths.max())], lengths)
    block = 0
    while True:
        tokens, logprobs, steps = _denoise_block(run, state, rows, block)
        go_on = run.finish_block(block, steps, rows, tokens, logprobs) & (run.num_blocks[rows] > block + 1)
        if not go_on.any():
            return  # a row's last block is read by nobody: its context need not grow
        if not go_on.all():
            keep = go_on.nonzero().squeeze(1)
            state, rows, tokens = state.select(keep), rows[keep], tokens[keep]
        state, block = run.model.commit(tokens, state), block + 1


def _denoise_block(run: Run, state: ContextState, rows: Tensor, block: int) -> tuple[Tensor, Tensor, int]:
    """Until no mask is left: int64 [R, S] tokens, their logprobs, and the number of steps the slowest row took."""
    config, mask, block_size = run.config, run.mask_token_id, run.block_size
    policy, num_steps = config.unmasking, config.steps_per_block
    tokens = run.text[run.places(rows)]
    logprobs = torch.full(tokens.shape, torch.nan, device=rows.device)
    editable = tokens == mask
    initial = editable.sum(dim=1)
    active = initial.nonzero()[:, 0]  # [A] rows of this block that still hold masks
    state, masked = state.select(active), initial[active]
    last_call, step = max(num_steps, block_size), 0
    while len(active):
        of_steps = max(num_steps, step + 1)  # past the schedule, every step is the last one
        before = tokens[active]  # [A, S]
        t = model_time(policy, masked, block_size, torch.tensor(step), torch.tensor(of_steps))  # [A]
        logits = run.model.denoise(before, state, t)  # [A, S, V]
        result = remask(
            run.processed(logits, before, rows[active]),
            before,
            mask_token_id=mask,
            policy=policy if step < last_call else FINISH,
            step=step,
            num_steps=of_steps,
            seed=run.seeds[rows[active]],
            offset=block,
            editable=editable[active],
            initial_num_masked=initial[active],
            **config.sampling,
        )
        check_finite(result.confidence, rows[active])
        tokens[active] = result.tokens
        scored = logits.index_fill(2, torch.tensor(mask, device=logits.device), -torch.inf)
        written = torch.where(result.transfer_mask, logprobs_of(scored, result.tokens), logprobs[active])
        logprobs[active] = written.masked_fill(result.tokens == mask, torch.nan)
        masked = result.num_masked.long()
        run.nfe[rows[active]] += 1
        run.report(block, step, rows[active], before, result.tokens, masked, logprobs[active])
        keep = masked.nonzero().squeeze(1)
        state, active, masked, step = state.select(keep), active[keep], masked[keep], step + 1
    return tokens, logprobs, step


def _autoregress(run: Run, with_denoiser: bool) -> None:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar)."""
    rows = torch.arange(len(run.lengths), device=run.lengths.device)  # [R] rows still generating, in the state's order
    prompts = run.text[:, : int(run.lengths.max())]
    last = prompts.gather(1, run.lengths[:, None] - 1)  # [R, 1]
    if with_denoiser:  # it reads the last token itself, so the context stops before it
        state = run.model.prefill(prompts[:, :-1], run.lengths - 1)
    else:
        state = run.model.prefill(prompts, run.lengths)
    for index in range(run.config.max_new_tokens):
        logits = run.model.denoise(last, state, t=None) if with_denoiser else state.logits[:, None]  # [R, 1, V]
        proposed = run.processed(logits, torch.full_like(last, run.mask_token_id), rows)
        token = _next_token(proposed, rows, run.seeds[rows], index, run.config.sampling)  # [R, 1]
        run.nfe[rows] += 1
        go_on = run.finish_block(index, 1, rows, token, logprobs_of(logits, token))
        if index + 1 == run.config.max_new_tokens or not go_on.any():
            return
        if not go_on.all():
            keep = go_on.nonzero().squeeze(1)
            state, rows, last, token = state.select(keep), rows[keep], last[keep], token[keep]
        state = run.model.commit(last if with_denoiser else token, state)
        last = token


def _next_token(logits: Tensor, rows: Tensor, seeds: Tensor, index: int, sampling: dict[str, Any]) -> Tensor:
    """Greedy or sampled next token: logits [R, 1, V] -> int64 [R, 1]."""
    step = propose(logits, seeds, index, sampling)
    check_finite(step.confidence, rows)
    return step.candidate
