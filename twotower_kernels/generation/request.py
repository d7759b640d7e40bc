"""A request for text in progress, as every loop of generation sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.generation.plan import BlockPlan
from twotower_kernels.generation.results import GenerateResult, StepEvent
from twotower_kernels.options.arguments import kind_of
from twotower_kernels.options.generation import GenerationConfig
from twotower_kernels.options.seeds import row_seeds


@dataclass
class Request:
    """Checked arguments, and what the B rows have got so far.

    The loops work on some of its rows, R; `request_rows` says which, as indices in the request.
    """

    options: GenerationConfig
    prompts: list[Tensor]  # per row of the request, 1-D int64
    plans: list[BlockPlan]  # per row
    ends: Tensor  # [n] int64, the tokens with which a row ends
    seeds: Tensor  # [B] int64, Philox keys
    nfe: list[int]  # per row
    blocks: list[list[Tensor]]  # per row, its finished blocks
    written: list[int]  # per row, the tokens in them
    logprobs: list[list[Tensor]] | None  # per row, those of its finished blocks, if wanted
    verifications: list[int] | None  # per row, if drafts are verified

    @classmethod
    def begin(cls, options: GenerationConfig, prompts: list[Tensor], plans: list[BlockPlan]) -> Request:
        """A request of which nothing is done, on the prompts' device."""
        device, count = prompts[0].device, len(prompts)
        return cls(
            options=options,
            prompts=prompts,
            plans=plans,
            ends=torch.tensor(options.ends, dtype=torch.int64, device=device),
            seeds=torch.tensor(row_seeds(options.seed, count), device=device),
            nfe=[0] * count,
            blocks=[[] for _ in prompts],
            written=[0] * count,
            logprobs=[[] for _ in prompts] if options.logprobs else None,
            verifications=[0] * count if options.mode == "speculative" else None,
        )

    @property
    def mask_token_id(self) -> int:
        """Of the model, or another one that was asked for."""
        assert self.options.mask_token_id is not None
        return self.options.mask_token_id

    def padded(self, request_rows: list[int]) -> tuple[Tensor, Tensor]:
        """What stands before these rows' first blocks: int64 [R, T], right-padded, and the lengths [R]."""
        rows = [self.prompts[row][: self.plans[row].start] for row in request_rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.seeds.device)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def processed(self, logits: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, S, V] of these rows [R], whose blocks [R, S] are these, after the caller's processors; and as the
        model gave them, which logprobs are of, if these are wanted."""
        proposed, processors = logits, self.options.processors
        if processors and self.logprobs is not None:
            proposed = logits.clone()  # a processor may write to those it gets
        for i, processor in enumerate(processors):
            found = processor(logits, tokens.clone(), rows.clone())
            expected = f"processors[{i}]: expected floating logits {list(logits.shape)} on {logits.device}"
            if not isinstance(found, Tensor) or not found.is_floating_point():
                raise TypeError(f"{expected}, got {kind_of(found)}")
            if found.shape != logits.shape or found.device != logits.device:
                raise ValueError(f"{expected}, got {kind_of(found)}")
            logits = found
        return logits, proposed

    def look(
        self,
        request_rows: list[int],
        num_masked: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        ending: Tensor | None = None,
    ) -> list[tuple[int, bool]]:
        """Counts a model call of these rows, and makes the host's one read of it: per row, the masks left [R] and
        whether its block [R, S] holds an EOS, where that ends a row (`ending` [R, S]; None: everywhere).

        Remasking marks a position without usable logits by a confidence [R, S] of NaN, and leaves it alone for ever.
        """
        for row in request_rows:
            self.nfe[row] += 1
        left = torch.where(confidence.isnan().any(dim=1), -1, num_masked)
        found = tokens[..., None] == self.ends
        if ending is not None:
            found &= ending[..., None]
        ended = found.flatten(1).any(dim=1)
        seen = torch.stack([left.long(), ended.long()], dim=1).tolist()
        for row, (masks, _) in zip(request_rows, seen, strict=True):
            if masks < 0:
                raise FloatingPointError(f"logits: expected finite numbers, got NaN or infinity in row {row}")
        return [(masks, bool(end)) for masks, end in seen]

    def verified(self, request_rows: list[int]) -> None:
        """Counts a draft of each of these rows that was verified, which is a model call."""
        assert self.verifications is not None  # of a request that drafts
        for row in request_rows:
            self.nfe[row] += 1
            self.verifications[row] += 1

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
        rows, nfe, start = self._known(request_rows)
        return StepEvent(block, step, False, rows, before, after, torch.tensor(masks), nfe, logprobs, start)

    def finish_block(
        self,
        block: int,
        steps: int,
        request_rows: list[int],
        tokens: Tensor,
        logprobs: Tensor | None,
        accepted: list[int] | None = None,
    ) -> StepEvent:
        """Hands a finished block [R, S] to its rows, or as many of its tokens as they accept. The observer gets a copy,
        to do with as he likes."""
        rows, nfe, start = self._known(request_rows)
        kept = [tokens.shape[1]] * len(request_rows) if accepted is None else accepted
        for row, new, count in zip(request_rows, tokens, kept, strict=True):
            self.blocks[row].append(new[:count])
            self.written[row] += count
        if self.logprobs is not None and logprobs is not None:
            for row, of_new, count in zip(request_rows, logprobs, kept, strict=True):
                self.logprobs[row].append(of_new[:count])
            logprobs = logprobs.clone()
        shown, counts = tokens.clone(), None if accepted is None else torch.tensor(accepted)
        return StepEvent(block, steps, True, rows, shown, shown, torch.zeros_like(rows), nfe, logprobs, start, counts)

    def _known(self, request_rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the host knows of these rows: their indices, model calls, and where their next blocks begin."""
        starts = [self.plans[row].start + self.written[row] for row in request_rows]
        return torch.tensor(request_rows), torch.tensor([self.nfe[row] for row in request_rows]), torch.tensor(starts)

    def result(self, seconds: float) -> GenerateResult:
        """What has been generated so far."""
        rows = [self._cut(row) for row in range(len(self.prompts))]
        sequences, new_tokens, logprobs, reasons = (list(part) for part in zip(*rows, strict=True))
        asked = None if self.logprobs is None else logprobs
        verifications = None if self.verifications is None else list(self.verifications)
        return GenerateResult(sequences, new_tokens, list(self.nfe), reasons, seconds, asked, verifications)

    def _cut(self, row: int) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """A row's sequence, up to and including the first EOS that ends it; its new tokens, their logprobs, and why
        it ended."""
        prompt, plan = self.prompts[row], self.plans[row]
        text = torch.cat([prompt[:0], *self.blocks[row]])[: plan.end - plan.start]
        reason = "length" if self.written[row] == plan.num_blocks * plan.block_size else "interrupted"
        free = max(plan.tail - plan.start, 0)  # of its text: here begins what no given token follows
        hits = (text[free:, None] == self.ends).any(dim=1).nonzero()
        rest = prompt[plan.start + len(text) :]
        if len(hits):
            text, rest, reason = text[: free + int(hits[0]) + 1], prompt[:0], "eos"
        sequence, logprobs = torch.cat([prompt[: plan.start], text, rest]), None
        if self.logprobs is not None:
            none = torch.empty(0, dtype=torch.float32, device=text.device)
            logprobs = torch.cat([none, *self.logprobs[row]])[: len(text)]
        if free:  # some of it was given
            new = torch.ones_like(text, dtype=torch.bool)
            given = prompt[plan.start : plan.start + len(text)]
            new[: len(given)] = given == self.mask_token_id
            text, logprobs = text[new], None if logprobs is None else logprobs[new]
        return sequence, text, logprobs, reason


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
