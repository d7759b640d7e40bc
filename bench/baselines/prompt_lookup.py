"""Prompt lookup: drafts that are copied from the text so far, without a model. What a denoiser's drafts must beat.

Apoorv Saxena, "Prompt Lookup Decoding" (2023); in transformers `prompt_lookup_num_tokens`. The text's last few tokens
are looked for further up in it, and what followed them there is the draft. The context tower verifies it as it does a
denoiser's, so the text is autoregression's, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

import twotower_kernels as tt

LONGEST = 3  # tokens that are looked for, as in the original; then fewer


def lookup(text: list[int], count: int, longest: int = LONGEST) -> list[int]:
    """Up to `count` tokens that followed the text's end where it stood before: the longest end, the latest place."""
    for length in range(min(longest, len(text) - 1), 0, -1):
        end = text[-length:]
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin : begin + length] == end:
                return text[begin + length : begin + length + count]
    return []


def generate_by_lookup(
    model: tt.TwoTowerModel,
    prompts: Iterable[list[int]],
    *,
    max_new_tokens: int,
    block_size: int = 16,
    eos_token_id: int | None = None,
) -> tt.GenerateResult:
    """Greedy continuations, a prompt at a time, by drafts of up to `block_size` tokens, the known one included."""
    start, found = (
        time.perf_counter(),
        [_continued(model, list(prompt), max_new_tokens, block_size, eos_token_id) for prompt in prompts],
    )
    seconds = time.perf_counter() - start
    sequences, new_tokens, verifications, reasons = (list(part) for part in zip(*found, strict=True))
    return tt.GenerateResult(sequences, new_tokens, verifications, reasons, seconds, None, verifications)


def _continued(
    model: tt.TwoTowerModel, text: list[int], most: int, block_size: int, eos: int | None
) -> tuple[torch.Tensor, torch.Tensor, int, str]:
    """The sequence, its new tokens, how many drafts were verified, and why it ended."""
    begin, verifications = len(text), 0
    state = model.prefill([text])
    text.append(int(state.logits.argmax()))  # the newest token is known, and not read yet
    while len(text) - begin < most and text[-1] != eos:
        draft = [text[-1], *lookup(text, block_size - 1)]
        verification = model.verify([draft], state)
        own = verification.logits[0].argmax(-1).tolist()
        verifications += 1
        agreed = next((i for i in range(1, len(draft)) if draft[i] != own[i - 1]), len(draft))
        state = model.accept(verification, [agreed])
        for token in own[:agreed]:
            text.append(token)
            if token == eos or len(text) - begin == most:
                break
    ids = torch.tensor(text[: begin + most])
    return ids, ids[begin:], verifications, "eos" if text[-1] == eos else "length"
