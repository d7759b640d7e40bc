"""Text generation with a TwoTower: block diffusion, and its two autoregressive relatives.

The three modes differ only in who proposes the next tokens (Nemotron-TwoTower, arXiv 2606.26493):

* `mask_diffusion`: the denoiser fills a block of S masks in a few calls, reading the context tower's state; the
  finished block then runs through the context tower. Autoregressive over blocks, parallel within one.
* `mock_ar`: the denoiser as a next-token model. It reads the last token, with the context's state from before it.
* `ar`: the context tower alone.

A batch of prompts of different lengths is each prompt alone, but for rounding, which depends on how many rows a product
of matrices has: every row has its own length, its own random stream (from the request's seed and its index there, or
from a seed of its own) and its own count of model calls. A row that has nothing left to do is taken out of the
batch, so it costs nothing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options.arguments import Integers
from twotower_kernels.options.generation import MODES, GenerationConfig, Prompts, prompt_rows
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.model import ContextState, TwoTower
from twotower_kernels.reference.philox import row_seeds
from twotower_kernels.reference.remask import remask
from twotower_kernels.reference.remask_schedule import model_time

__all__ = ["MODES", "GenerateResult", "StepEvent", "generate"]

FINISH = RemaskPolicy(finish=True)  # in the last step of its schedule: every candidate, none of which is the mask
PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone


@dataclass(frozen=True)
class StepEvent:
    """What just happened to R rows of the request: one un-masking step, or one block finished.

    In the autoregressive modes a block is one token and only finished blocks are reported. The finished blocks of a
    row, one after the other, are its new tokens before the cut at `max_new_tokens` and after the first EOS.
    """

    block: int  # index of the block (autoregressive modes: of the new token)
    step: int  # index of the un-masking step inside the block; for a finished block, the steps it took at most
    committed: bool  # the block is finished (otherwise: a step inside it)
    rows: Tensor  # [R] int64, index of each row in the request
    before: Tensor  # [R, S] int64, the tokens the model read (finished block: the same as after)
    after: Tensor  # [R, S] int64
    num_masked: Tensor  # [R] int64, masks left in `after`
    nfe: Tensor  # [R] int64, model calls this row has cost so far
    logprobs: Tensor | None = None  # [R, S] float32, if asked for: those of `after`, NaN for masks


@dataclass(frozen=True)
class GenerateResult:
    """The generated text of B prompts and what it cost."""

    sequences: list[Tensor]  # per row, 1-D int64: prompt + new tokens, cut after the EOS, which is kept
    new_tokens: list[Tensor]  # per row, 1-D int64: the new tokens alone
    nfe: list[int]  # per row: denoiser calls while the row had masks (ar: context-tower predictions)
    finish_reason: list[str]  # per row: "eos" or "length"
    seconds: float  # wall-clock time of the whole request, prefill included
    logprobs: list[Tensor] | None = None  # per row, if asked for, 1-D float32: one per new token

    @property
    def tokens_per_nfe(self) -> float:
        """New tokens per model call over the whole batch; 0 when nothing was generated."""
        return sum(map(len, self.new_tokens)) / max(1, sum(self.nfe))


@dataclass
class _Run:
    """The request as the three modes see it: checked arguments, and what the rows have got so far."""

    model: TwoTower
    prompts: Tensor  # [B, T] int64, right-padded
    lengths: Tensor  # [B] int64
    max_new_tokens: int
    ends: list[int]  # the tokens with which a row ends
    sampling: dict[str, Any]  # temperature, top_k, top_p
    seeds: Tensor  # [B] int64, Philox keys
    on_step: Callable[[StepEvent], object] | None
    nfe: Tensor  # [B] int64
    with_logprobs: bool
    blocks: list[list[Tensor]]  # per row, its finished blocks
    logprobs: list[list[Tensor]]  # per row, those of its finished blocks

    def report(
        self, block: int, step: int, rows: Tensor, before: Tensor, after: Tensor, masked: Tensor, logprobs: Tensor
    ) -> None:
        """Tell the observer about an un-masking step."""
        if self.on_step is not None:
            tensors = rows.clone(), before.clone(), after.clone(), masked, self.nfe[rows]
            self.on_step(StepEvent(block, step, False, *tensors, logprobs.clone() if self.with_logprobs else None))

    def finish_block(self, block: int, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Hand a finished block [R, S] to its rows; return bool [R]: which rows want another one."""
        for row, new, of_new in zip(rows.tolist(), tokens, logprobs, strict=True):
            self.blocks[row].append(new)
            self.logprobs[row].append(of_new)
        if self.on_step is not None:
            tensors = rows.clone(), tokens.clone(), tokens.clone(), torch.zeros_like(rows), self.nfe[rows]
            self.on_step(StepEvent(block, step, True, *tensors, logprobs.clone() if self.with_logprobs else None))
        return ~self.is_end(tokens).any(dim=1)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which tokens end a row."""
        return torch.isin(tokens, torch.tensor(self.ends, dtype=tokens.dtype, device=tokens.device))

    def cut(self, row: int) -> tuple[Tensor, Tensor, str]:
        """A row's new tokens, at most `max_new_tokens`, up to and including the first EOS; their logprobs."""
        new = torch.cat([self.prompts.new_empty(0), *self.blocks[row]])[: self.max_new_tokens]
        logprobs = torch.cat([torch.empty(0, device=new.device), *self.logprobs[row]])
        hits = self.is_end(new).nonzero()
        if len(hits):
            new = new[: int(hits[0]) + 1]
        return new, logprobs[: len(new)], "eos" if len(hits) else "length"


@torch.no_grad()
def generate(
    model: TwoTower,
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
    """Continue every prompt by up to `max_new_tokens` tokens.

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
        mask_token_id: what a position to be filled holds (mask_diffusion only; the other modes treat it as any token);
            None: the config's.
        eos_token_id: a token, or several: a row ends with the first of them among its new tokens.
        seed: the request's seed, or one per row. Row b draws with the key `philox.sequence_seed(seed, b)`, or with its
            own seed as the key. In mask_diffusion the counter holds (token, position in the block, step, index of the
            block); in the autoregressive modes (token, 0, 0, index of the new token).
        logprobs: also give the logarithm of each new token's probability at temperature 1, without filters, by the
            tower that proposed it. In mask_diffusion the mask token has none, and it is that of the step that wrote the
            token, or last rewrote it.
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
    device = next(model.parameters()).device
    rows = prompt_rows(prompts, model.config.vocab_size, device)
    run = _Run(
        model=model,
        prompts=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=torch.tensor([len(row) for row in rows], device=device),
        max_new_tokens=config.max_new_tokens,
        ends=list(config.ends),
        sampling=config.sampling,
        seeds=torch.tensor(row_seeds(config.seed, len(rows)), device=device),
        on_step=on_step,
        nfe=torch.zeros(len(rows), dtype=torch.int64, device=device),
        with_logprobs=logprobs,
        blocks=[[] for _ in rows],
        logprobs=[[] for _ in rows],
    )
    if config.max_new_tokens and mode == "mask_diffusion":
        assert config.mask_token_id is not None  # the model's, if no other was given
        _diffuse(run, config.unmasking, config.block_size, config.steps_per_block, config.mask_token_id)
    elif config.max_new_tokens:
        _autoregress(run, with_denoiser=mode == "mock_ar")
    new_tokens, of_new, reasons = zip(*(run.cut(b) for b in range(len(rows))), strict=True)
    sequences = [torch.cat(pair) for pair in zip(rows, new_tokens, strict=True)]
    seconds = time.perf_counter() - start
    asked = list(of_new) if logprobs else None
    return GenerateResult(sequences, list(new_tokens), run.nfe.tolist(), list(reasons), seconds, asked)


def _diffuse(run: _Run, policy: RemaskPolicy, block_size: int, num_steps: int, mask_token_id: int) -> None:
    """Block after block: denoise it, hand it out, extend the context of the rows that go on."""
    state = run.model.prefill(run.prompts, run.lengths)
    rows = torch.arange(len(run.lengths), device=run.lengths.device)  # [R] rows still generating, in the state's order
    num_blocks = math.ceil(run.max_new_tokens / block_size)
    for block in range(num_blocks):
        tokens, logprobs, steps = _denoise_block(run, state, rows, policy, block, block_size, num_steps, mask_token_id)
        go_on = run.finish_block(block, steps, rows, tokens, logprobs)
        if block + 1 == num_blocks or not go_on.any():
            return  # the last block is read by nobody: the context need not grow
        if not go_on.all():
            keep = go_on.nonzero().squeeze(1)
            state, rows, tokens = state.select(keep), rows[keep], tokens[keep]
        state = run.model.commit(tokens, state)


def _denoise_block(
    run: _Run,
    state: ContextState,
    rows: Tensor,
    policy: RemaskPolicy,
    block: int,
    block_size: int,
    num_steps: int,
    mask_token_id: int,
) -> tuple[Tensor, Tensor, int]:
    """From all masks to none: int64 [R, S] tokens, their logprobs, and the number of steps the slowest row took."""
    tokens = torch.full((len(rows), block_size), mask_token_id, device=rows.device)
    logprobs = torch.full(tokens.shape, torch.nan, device=rows.device)
    active = torch.arange(len(rows), device=rows.device)  # [A] rows of this block that still hold masks
    masked = torch.full_like(rows, block_size)  # [A]
    last_call = max(num_steps, block_size)
    for step in range(last_call + 1):
        of_steps = max(num_steps, step + 1)  # past the schedule, every step is the last one
        before = tokens[active]  # [A, S]
        t = model_time(policy, masked, block_size, torch.tensor(step), torch.tensor(of_steps))  # [A]
        logits = run.model.denoise(before, state, t)  # [A, S, V]
        result = remask(
            logits,
            before,
            mask_token_id=mask_token_id,
            policy=policy if step < last_call else FINISH,
            step=step,
            num_steps=of_steps,
            seed=run.seeds[rows[active]],
            offset=block,
            initial_num_masked=block_size,
            **run.sampling,
        )
        _check_finite(result.confidence, rows[active])
        tokens[active] = result.tokens
        scored = logits.index_fill(2, torch.tensor(mask_token_id, device=logits.device), -torch.inf)
        written = torch.where(result.transfer_mask, _logprobs(scored, result.tokens), logprobs[active])
        logprobs[active] = written.masked_fill(result.tokens == mask_token_id, torch.nan)
        masked = result.num_masked.long()
        run.nfe[rows[active]] += 1
        run.report(block, step, rows[active], before, result.tokens, masked, logprobs[active])
        if not masked.all():
            keep = masked.nonzero().squeeze(1)
            if not len(keep):
                break
            state, active, masked = state.select(keep), active[keep], masked[keep]
    return tokens, logprobs, step + 1


def _autoregress(run: _Run, with_denoiser: bool) -> None:
    """One token at a time, proposed by the denoiser (mock_ar) or by the context tower (ar)."""
    rows = torch.arange(len(run.lengths), device=run.lengths.device)  # [R] rows still generating, in the state's order
    last = run.prompts.gather(1, run.lengths[:, None] - 1)  # [R, 1]
    if with_denoiser:  # it reads the last token itself, so the context stops before it
        state = run.model.prefill(run.prompts[:, :-1], run.lengths - 1)
    else:
        state = run.model.prefill(run.prompts, run.lengths)
    for index in range(run.max_new_tokens):
        logits = run.model.denoise(last, state, t=None)[:, 0] if with_denoiser else state.logits  # [R, V]
        token = _next_token(logits, rows, run.seeds[rows], index, run.sampling)  # [R, 1]
        run.nfe[rows] += 1
        go_on = run.finish_block(index, 1, rows, token, _logprobs(logits[:, None], token))
        if index + 1 == run.max_new_tokens or not go_on.any():
            return
        if not go_on.all():
            keep = go_on.nonzero().squeeze(1)
            state, rows, last, token = state.select(keep), rows[keep], last[keep], token[keep]
        state = run.model.commit(last if with_denoiser else token, state)
        last = token


def _next_token(logits: Tensor, rows: Tensor, seeds: Tensor, index: int, sampling: dict[str, Any]) -> Tensor:
    """Greedy or sampled next token: logits [R, V] -> int64 [R, 1].

    It is the proposal of a remasking step on a block of one, so both kinds of generation share one sampler.
    """
    block = torch.zeros(len(seeds), 1, dtype=torch.int64, device=logits.device)  # of masks, whatever their number
    step = remask(logits[:, None], block, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=index, **sampling)
    _check_finite(step.confidence, rows)
    return step.candidate


def _check_finite(confidence: Tensor, rows: Tensor) -> None:
    """Remasking marks a position without usable logits by a confidence of NaN, and leaves it alone for ever."""
    bad = rows[confidence.isnan().any(dim=1)]  # [R, S] -> [N]
    if len(bad):
        raise FloatingPointError(f"the model's logits for row {int(bad[0])} hold NaN or infinity")


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """What the tokens' probabilities are logarithms of: logits [R, S, V], tokens [R, S] -> float32 [R, S]."""
    return (logits.double() - logits.double().logsumexp(-1, keepdim=True)).gather(2, tokens[..., None])[..., 0].float()
