"""What a generation tells: an event for everything that happens, and a result at its end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepEvent:
    """What just happened to R rows of the request: one un-masking step, or one block finished.

    In the autoregressive modes a block is one token and only finished blocks are reported. The finished blocks of a
    row, one after the other, are its text from the first block's start on, before the cut at its end and after the
    first EOS. Without masks in the prompt they are its new tokens, behind those that the prompt gives of a block.

    In speculative a block is a draft, and of a finished one the first `accepted` tokens are the row's text: its new
    tokens exactly. A last token that is known without a draft is a finished block of one.

    What the host knows (rows, num_masked, nfe, start) is on the CPU, tokens are where they are drawn.
    """

    block: int  # index of the block, from the row's first one (autoregressive modes: of the new token)
    step: int  # index of the un-masking step inside the block; for a finished block, the steps it took at most
    committed: bool  # the block is finished (otherwise: a step inside it)
    rows: Tensor  # [R] int64, index of each row in the request
    before: Tensor  # [R, S] int64, the tokens the model read (finished block: the same as after)
    after: Tensor  # [R, S] int64
    num_masked: Tensor  # [R] int64, masks left in `after`
    nfe: Tensor  # [R] int64, model calls this row has cost so far
    logprobs: Tensor | None = None  # [R, S] float32, where they were asked for: those of `after`; NaN: mask, or given
    start: Tensor | None = None  # [R] int64, position of the block's first token in its row, prompt included
    accepted: Tensor | None = None  # [R] int64, of a finished draft: how many of its tokens count

    @property
    def finished(self) -> list[list[int]]:
        """Per row, the tokens of a finished block that count."""
        tokens: list[list[int]] = self.after.tolist()
        if self.accepted is None:
            return tokens
        return [row[:count] for row, count in zip(tokens, self.accepted.tolist(), strict=True)]


@dataclass(frozen=True)
class GenerateResult:
    """The generated text of B prompts and what it cost."""

    sequences: list[
        Tensor
    ]  # per row, 1-D int64: prompt, its masks filled, + new tokens, cut after the EOS, which stays
    new_tokens: list[
        Tensor
    ]  # per row, 1-D int64: the tokens written, in order of position: in masks and behind the end
    nfe: list[int]  # per row: denoiser calls while the row had masks (ar: context-tower predictions; speculative: both)
    finish_reason: list[str]  # per row: "eos", "length", or "interrupted" if the stream was left before its end
    seconds: float  # spent generating, prefill included; what an observer does with the events is not counted
    logprobs: list[Tensor] | None = None  # per row, where they were asked for, 1-D float32: one per new token
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
