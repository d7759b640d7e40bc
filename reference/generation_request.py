"""A request for text, as every mode of generation sees it: what was asked, what is written so far, what is told."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.options.generation import GenerationConfig
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.model import TwoTower
from twotower_kernels.reference.philox import row_seeds
from twotower_kernels.reference.remask import RemaskResult, remask

PROPOSE = RemaskPolicy(suppress_mask=False)  # a rule that leaves the candidate alone


@dataclass(frozen=True)
class StepEvent:
    """What just happened to R rows of the request: one un-masking step, or one block finished.

    In the autoregressive modes a block is one token and only finished blocks are reported. The finished blocks of a
    row, one after the other, are its text from its first mask on (without one, its new tokens), before the cut at
    `max_new_tokens` and after the first EOS.
    """

    block: int  # index of the block, from the row's first one (autoregressive modes: of the new token)
    step: int  # index of the un-masking step inside the block; for a finished block, the steps it took at most
    committed: bool  # the block is finished (otherwise: a step inside it)
    rows: Tensor  # [R] int64, index of each row in the request
    before: Tensor  # [R, S] int64, the tokens the model read (finished block: the same as after)
    after: Tensor  # [R, S] int64
    num_masked: Tensor  # [R] int64, masks left in `after`
    nfe: Tensor  # [R] int64, model calls this row has cost so far
    logprobs: Tensor | None = None  # [R, S] float32, if asked for: those of `after`, NaN for masks and what is given
    start: Tensor | None = None  # [R] int64, position of the block's first token in its row, prompt included
    accepted: Tensor | None = None  # [R] int64, of a finished draft: how many of its tokens count


@dataclass(frozen=True)
class GenerateResult:
    """The generated text of B prompts and what it cost."""

    sequences: list[
        Tensor
    ]  # per row, 1-D int64: prompt, masks filled, and what follows, cut after the EOS, which is kept
    new_tokens: list[Tensor]  # per row, 1-D int64: the new tokens alone: those in the prompt's masks, and behind it
    nfe: list[int]  # per row: denoiser calls while the row had masks (ar: context-tower predictions; speculative: both)
    finish_reason: list[str]  # per row: "eos" or "length"
    seconds: float  # wall-clock time of the whole request, prefill included
    logprobs: list[Tensor] | None = None  # per row, if asked for, 1-D float32: one per new token
    verifications: list[int] | None = None  # per row, of speculative alone: drafts that the context tower read

    @property
    def accepted(self) -> float | None:
        """New tokens per verified draft over the whole batch, for speculative alone."""
        if self.verifications is None:
            return None
        return sum(map(len, self.new_tokens)) / max(1, sum(self.verifications))

    @property
    def tokens_per_nfe(self) -> float:
        """New tokens per model call over the whole batch; 0 when nothing was generated."""
        return sum(map(len, self.new_tokens)) / max(1, sum(self.nfe))


@dataclass
class Run:
    """The request as the modes see it: checked arguments, and the texts that the rows have got so far.

    A text is laid out whole: the prompt, then masks as far as blocks reach. Blocks are written into it.
    """

    model: TwoTower
    config: GenerationConfig
    text: Tensor  # [B, N] int64
    given: Tensor  # bool [B, N]: what the prompt says
    lengths: Tensor  # [B] int64, of the prompts
    first: Tensor  # [B] int64, where a row's first block begins
    num_blocks: Tensor  # [B] int64
    block_size: int  # of modes that write token by token: 1
    written: Tensor  # [B] int64, tokens of finished blocks
    mask_token_id: int
    seeds: Tensor  # [B] int64, Philox keys
    on_step: Callable[[StepEvent], object] | None
    nfe: Tensor  # [B] int64
    verifications: Tensor  # [B] int64
    logprobs: Tensor  # [B, N] float32

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the text the next blocks of these rows [R] lie: indices [R, 1] and [R, S]."""
        begin = self.first[rows] + self.written[rows]
        return rows[:, None], begin[:, None] + torch.arange(self.block_size, device=rows.device)

    def processed(self, logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """The logits [R, S, V] after the caller's processors, which get copies."""
        for processor in self.config.processors:
            logits = processor(logits.clone(), tokens.clone(), rows.clone())
        return logits

    def report(
        self,
        block: int,
        step: int,
        rows: Tensor,
        before: Tensor,
        after: Tensor,
        masked: Tensor,
        logprobs: Tensor | None,
    ) -> None:
        """Tell the observer about an un-masking step."""
        if self.on_step is not None:
            tensors = rows.clone(), before.clone(), after.clone(), masked, self.nfe[rows]
            asked = None if logprobs is None or not self.config.logprobs else logprobs.clone()
            self.on_step(StepEvent(block, step, False, *tensors, asked, self.places(rows)[1][:, 0]))

    def finish_block(self, block: int, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Write a finished block [R, S] into its rows' texts; return bool [R]: which rows want another one."""
        places = self.places(rows)
        self.text[places], self.logprobs[places] = tokens, logprobs
        self._tell(block, step, rows, tokens, logprobs)
        self.written[rows] += self.block_size
        return ~self.is_end(rows, places[1]).any(dim=1)

    def finish_draft(
        self, block: int, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor, agreed: Tensor
    ) -> Tensor:
        """Write the tokens of a draft [R, S] that agree [R] into their rows' texts, up to the ends of these; return
        bool [R]: which rows want more."""
        accepted, goes_on = torch.zeros_like(agreed), torch.zeros_like(agreed, dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            count = min(int(agreed[i]), self.config.max_new_tokens - int(self.written[row]))
            ends = [n for n in range(count) if int(tokens[i, n]) in self.config.ends]
            count = ends[0] + 1 if ends else count
            begin = int(self.first[row] + self.written[row])
            self.text[row, begin : begin + count] = tokens[i, :count]
            self.logprobs[row, begin : begin + count] = logprobs[i, :count]
            accepted[i], goes_on[i] = count, not ends and int(self.written[row]) + count < self.config.max_new_tokens
        self._tell(block, step, rows, tokens, logprobs, accepted)
        self.written[rows] += accepted
        return goes_on

    def _tell(
        self, block: int, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor, accepted: Tensor | None = None
    ) -> None:
        """Tell the observer about a finished block, before it counts as written."""
        if self.on_step is not None:
            tensors = rows.clone(), tokens.clone(), tokens.clone(), torch.zeros_like(rows), self.nfe[rows]
            asked = logprobs.clone() if self.config.logprobs else None
            self.on_step(StepEvent(block, step, True, *tensors, asked, self.places(rows)[1][:, 0], accepted))

    def is_end(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Which tokens of the rows' texts, at positions [R, n], end a row: those behind everything given."""
        numbers = torch.arange(1, self.text.shape[1] + 1, device=rows.device)
        behind = (self.given[rows] * numbers).amax(dim=1, keepdim=True)  # [R, 1]
        ends = torch.tensor(self.config.ends, dtype=torch.int64, device=rows.device)
        return torch.isin(self.text[rows[:, None], positions], ends) & (positions >= behind)

    def cut(self, row: int) -> tuple[Tensor, Tensor, Tensor, str]:
        """A row's text up to its length, or up to and including the first EOS that ends it; of that the new tokens,
        and their logprobs."""
        positions = torch.arange(int(self.lengths[row]) + self.config.max_new_tokens, device=self.text.device)
        hits = self.is_end(torch.tensor([row], device=self.text.device), positions[None])[0].nonzero()
        end = int(hits[0]) + 1 if len(hits) else len(positions)
        new = ~self.given[row, :end]
        text, logprobs = self.text[row, :end], self.logprobs[row, :end]
        return text, text[new], logprobs[new], "eos" if len(hits) else "length"


def begin(
    model: TwoTower, config: GenerationConfig, prompts: list[Tensor], on_step: Callable[[StepEvent], object] | None
) -> Run:
    """The request with nothing written yet."""
    device, in_blocks = prompts[0].device, config.mode == "mask_diffusion"
    mask = config.mask_token_id if in_blocks else model.config.mask_token_id
    assert mask is not None  # the model's, if no other was given
    size, new = config.block_size if in_blocks else 1, config.max_new_tokens
    plans = []  # per row: where its first block begins, and how many it has
    for row in prompts:
        masks = (row == mask).nonzero()[:, 0].tolist() if in_blocks else []
        first = masks[0] if masks else len(row)
        last = len(row) + new if new else masks[-1] + 1 if masks else first
        plans.append((first, math.ceil((last - first) / size)))
    longest = max(max(len(row) + new, first + count * size) for row, (first, count) in zip(prompts, plans, strict=True))
    text = torch.full((len(prompts), longest), mask, device=device)
    given = torch.zeros_like(text, dtype=torch.bool)
    for b, row in enumerate(prompts):
        text[b, : len(row)] = row
        given[b, : len(row)] = row != mask if in_blocks else True
    first, num_blocks = torch.tensor(plans, device=device).T
    return Run(
        model=model,
        config=config,
        text=text,
        given=given,
        lengths=torch.tensor([len(row) for row in prompts], device=device),
        first=first,
        num_blocks=num_blocks,
        block_size=size,
        written=torch.zeros(len(prompts), dtype=torch.int64, device=device),
        mask_token_id=mask,
        seeds=torch.tensor(row_seeds(config.seed, len(prompts)), device=device),
        on_step=on_step,
        nfe=torch.zeros(len(prompts), dtype=torch.int64, device=device),
        verifications=torch.zeros(len(prompts), dtype=torch.int64, device=device),
        logprobs=torch.full(text.shape, torch.nan, device=device),
    )


def propose(logits: Tensor, seeds: Tensor, index: int | Tensor, sampling: dict[str, Any]) -> RemaskResult:
    """The next token of logits [R, 1, V] is the proposal of a remasking step on a block of one, so that both kinds of
    generation share one sampler."""
    block = torch.zeros(len(seeds), 1, dtype=torch.int64, device=logits.device)  # of masks, whatever their number
    return remask(logits, block, mask_token_id=0, policy=PROPOSE, seed=seeds, offset=index, **sampling)


def check_finite(confidence: Tensor, rows: Tensor) -> None:
    """Remasking marks a position without usable logits by a confidence of NaN, and leaves it alone for ever."""
    bad = rows[confidence.isnan().any(dim=1)]  # [R, S] -> [N]
    if len(bad):
        raise FloatingPointError(f"the model's logits for row {int(bad[0])} hold NaN or infinity")


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """What the tokens' probabilities are logarithms of: logits [R, S, V], tokens [R, S] -> float32 [R, S]."""
    return (logits.double() - logits.double().logsumexp(-1, keepdim=True)).gather(2, tokens[..., None])[..., 0].float()
