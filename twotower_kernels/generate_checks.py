"""What a request for text is checked for before the model is called."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower_kernels.remask_policy import RemaskPolicy

if TYPE_CHECKING:
    from twotower_kernels.model import TwoTowerModel

MOST_BLOCK = 2**16  # tokens; a block is denoised whole, its logits over the vocabulary too
MOST_STEPS = 2**31 - 1


def prompt_rows(
    prompts: Tensor | Sequence[Tensor | Sequence[int]], vocab_size: int, device: torch.device
) -> list[Tensor]:
    """B checked one-dimensional int64 prompts on the device."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(f"prompts: expected [B, T] or a list of rows, got a tensor of shape {list(prompts.shape)}")
    if not len(prompts):
        raise ValueError("prompts: expected at least one row, got none")
    rows = []
    for b, prompt in enumerate(prompts):
        row = torch.as_tensor(prompt)
        if row.ndim != 1 or not row.numel():
            raise ValueError(f"prompts[{b}]: expected one token or more in one dimension, got shape {list(row.shape)}")
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"prompts[{b}]: expected integers, got {row.dtype}")
        wrong = row[(row < 0) | (row >= vocab_size)]
        if len(wrong):
            raise ValueError(f"prompts[{b}]: expected tokens of a vocabulary of {vocab_size}, got {int(wrong[0])}")
        rows.append(row.to(device=device, dtype=torch.int64))
    return rows


def check_options(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, eos_token_id: int | None, vocab_size: int
) -> None:
    """The arguments that every mode reads. Comparisons are written so that NaN fails them."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number, 0 or more, got {temperature}")
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k: expected 0 to the vocabulary size {vocab_size}, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id: expected a token of a vocabulary of {vocab_size}, got {eos_token_id}")


def check_blocks(
    model: TwoTowerModel,
    block_size: int,
    steps_per_block: int,
    confidence_threshold: float,
    mask_token_id: int,
    policy: RemaskPolicy | None,
) -> None:
    """The arguments that only mask_diffusion reads."""
    vocab_size, trained = model.config.vocab_size, model.config.block_size
    if not 1 <= block_size <= MOST_BLOCK:
        raise ValueError(f"block_size: expected 1 to {MOST_BLOCK}, got {block_size}")
    if not 1 <= steps_per_block <= MOST_STEPS:
        raise ValueError(f"steps_per_block: expected 1 to {MOST_STEPS}, got {steps_per_block}")
    if policy is not None and policy.renoise:
        raise ValueError("policy: expected one that un-masks, got renoise, which has no mask token")
    if math.isnan(confidence_threshold):
        raise ValueError(f"confidence_threshold: expected a number, got {confidence_threshold}")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id: expected a token of a vocabulary of {vocab_size}, got {mask_token_id}")
    if trained is not None and block_size > trained:
        warnings.warn(
            f"block_size {block_size} is larger than the {trained} the model was trained with: sampling may collapse",
            stacklevel=_frames_inside() + 1,
        )


def _frames_inside() -> int:
    """How many of the innermost frames are this package's, this function's left out: a warning is for its caller."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame, count = frame.f_back, count + 1
    return count
