"""A request for text in progress, as the loops of all modes see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.model.interface import Towers
from twotower_kernels.model.results import StepEvent
from twotower_kernels.model.state import ContextState
from twotower_kernels.options.generation import GenerationConfig


@dataclass
class Request:
    """The request as the three modes see it: checked arguments, and what its B rows have got so far.

    The loops work on some of its rows, R; `request_rows` says which, as indices in the request.
    """

    model: Towers
    options: GenerationConfig
    prompts: list[Tensor]  # per row of the request, 1-D int64
    ends: Tensor  # [n] int64, the tokens with which a row ends
    seeds: Tensor  # [B] int64, Philox keys
    nfe: list[int]  # per row
    blocks: list[list[Tensor]]  # per row, its finished blocks
    logprobs: list[list[Tensor]] | None  # per row, those of its finished blocks, if wanted
    denoise: Callable[..., Tensor]  # the model's; on a GPU recorded and replayed
    commit: Callable[[Tensor, ContextState], ContextState]  # of whole blocks, likewise

    @property
    def mask_token_id(self) -> int:
        """Of the model, or another one that was asked for."""
        assert self.options.mask_token_id is not None
        return self.options.mask_token_id

    def padded(self) -> tuple[Tensor, Tensor]:
        """The prompts as int64 [B, T], right-padded, and their lengths [B]."""
        lengths = torch.tensor([len(row) for row in self.prompts], device=self.seeds.device)
        return torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True), lengths

    def look(
        self, request_rows: list[int], num_masked: Tensor, tokens: Tensor, confidence: Tensor
    ) -> list[tuple[int, bool]]:
        """Counts a model call of these rows, and makes the host's one read of it: per row, the masks left [R] and
        whether its block [R, S] holds an EOS.

        Remasking marks a position without usable logits by a confidence [R, S] of NaN, and leaves it alone for ever.
        """
        for row in request_rows:
            self.nfe[row] += 1
        left = torch.where(confidence.isnan().any(dim=1), -1, num_masked)
        ended = (tokens[..., None] == self.ends).flatten(1).any(dim=1)
        seen = torch.stack([left.long(), ended.long()], dim=1).tolist()
        for row, (masks, _) in zip(request_rows, seen, strict=True):
            if masks < 0:
                raise FloatingPointError(f"logits: expected finite numbers, got NaN or infinity in row {row}")
        return [(masks, bool(end)) for masks, end in seen]

    def step(
        self,
        block: int,
        step: int,
        request_rows: list[int],
        before: Tensor,
        after: Tensor,
        masks: list[int],
        logprobs: Tensor | None,
    ) -> StepEvent:
        """The event of an un-masking step."""
        nfe = torch.tensor([self.nfe[row] for row in request_rows])
        return StepEvent(
            block, step, False, torch.tensor(request_rows), before, after, torch.tensor(masks), nfe, logprobs
        )

    def finish_block(
        self, block: int, steps: int, request_rows: list[int], tokens: Tensor, logprobs: Tensor | None
    ) -> StepEvent:
        """Hands a finished block [R, S] to its rows. The observer gets a copy, to do with as he likes."""
        for row, new in zip(request_rows, tokens, strict=True):
            self.blocks[row].append(new)
        if self.logprobs is not None and logprobs is not None:
            for row, of_new in zip(request_rows, logprobs, strict=True):
                self.logprobs[row].append(of_new)
            logprobs = logprobs.clone()
        shown, nfe = tokens.clone(), torch.tensor([self.nfe[row] for row in request_rows])
        none = torch.zeros(len(request_rows), dtype=torch.int64)
        return StepEvent(block, steps, True, torch.tensor(request_rows), shown, shown, none, nfe, logprobs)

    def cut(self, row: int) -> tuple[Tensor, str]:
        """A row's new tokens, at most `max_new_tokens`, up to and including the first EOS."""
        new = torch.cat([self.prompts[row][:0], *self.blocks[row]])[: self.options.max_new_tokens]
        hits = (new[:, None] == self.ends).any(dim=1).nonzero()
        if len(hits):
            return new[: int(hits[0]) + 1], "eos"
        return new, "length" if len(new) == self.options.max_new_tokens else "interrupted"

    def cut_logprobs(self, row: int, length: int) -> Tensor:
        """Those of a row's first `length` new tokens."""
        assert self.logprobs is not None
        return torch.cat([self.seeds.new_empty(0, dtype=torch.float32), *self.logprobs[row]])[:length]


def log_probabilities(logits: Tensor, tokens: Tensor, without: int | None = None) -> Tensor:
    """The logarithms of the tokens' probabilities, logits [R, S, V] and tokens [R, S] -> float32 [R, S].

    without: a token that has no probability.
    """
    if without is not None:
        logits = logits.clone()
        logits[..., without] = -torch.inf
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).float()


def indices(flags: list[bool]) -> list[int]:
    """Those of the flags that are set."""
    return [i for i, flag in enumerate(flags) if flag]


def on_device(row_index: list[int], device: torch.device) -> Tensor:
    """Indices of rows, for the device. Only where some leave the batch: each is a copy to it."""
    return torch.tensor(row_index, dtype=torch.int64, device=device)
