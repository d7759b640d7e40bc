"""What a request for text is checked for before the model is called."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower_kernels.ops.remask_checks import REAL
from twotower_kernels.options.arguments import Integers, are_several, integers, real, whole, wholes
from twotower_kernels.options.remask_policy import RemaskPolicy

if TYPE_CHECKING:
    from twotower_kernels.model.two_tower import TwoTowerModel

MOST_BLOCK = 2**16  # tokens; a block is denoised whole, its logits over the vocabulary too
MOST_STEPS = 2**31 - 1


Prompts = Tensor | np.ndarray | Sequence[Integers]


class Blocks(NamedTuple):
    """What only mask_diffusion reads."""

    size: int
    steps: int
    mask_token_id: int
    policy: RemaskPolicy


def prompt_rows(prompts: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
    """B checked one-dimensional int64 prompts on the device."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(f"prompts: expected [B, T] or a list of rows, got a tensor of shape {list(prompts.shape)}")
    if not len(prompts):
        raise ValueError("prompts: expected at least one row, got none")
    rows = []
    for b, prompt in enumerate(prompts):
        row = integers(f"prompts[{b}]", prompt)
        if row.ndim != 1 or not row.numel():
            raise ValueError(f"prompts[{b}]: expected one token or more in one dimension, got shape {list(row.shape)}")
        if row.dtype != torch.int64:
            raise TypeError(f"prompts[{b}]: expected integers, got {row.dtype}")
        wrong = row[(row < 0) | (row >= vocab_size)]
        if len(wrong):
            raise ValueError(f"prompts[{b}]: expected tokens of a vocabulary of {vocab_size}, got {int(wrong[0])}")
        rows.append(row.to(device))
    return rows


def new_tokens(max_new_tokens: int) -> int:
    """How many tokens a row may get."""
    count = whole("max_new_tokens", max_new_tokens)
    if count < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {count}")
    return count


def sampling(temperature: float, top_k: int, top_p: float, vocab_size: int) -> dict[str, Any]:
    """The arguments of the sampler, by name. Comparisons are written so that NaN fails them."""
    temperature, top_k, top_p = real("temperature", temperature), whole("top_k", top_k), real("top_p", top_p)
    hottest = REAL["temperature"].high
    if not 0 <= temperature <= hottest:
        raise ValueError(f"temperature: expected a number from 0 to {hottest:g}, got {temperature}")
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k: expected 0 to the vocabulary size {vocab_size}, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p}


def end_tokens(eos_token_id: int | Integers | None, vocab_size: int) -> list[int]:
    """The tokens with which a row ends."""
    if eos_token_id is None:
        return []
    if not are_several(eos_token_id):
        eos_token_id = [eos_token_id]
    found = wholes("eos_token_id", eos_token_id, "None, a token or tokens")
    for token in found:
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_id: expected tokens of a vocabulary of {vocab_size}, got {token}")
    return found


def blocks(
    model: TwoTowerModel,
    block_size: int,
    steps_per_block: int,
    confidence_threshold: float,
    mask_token_id: int,
    policy: RemaskPolicy | None,
) -> Blocks:
    """The arguments that only mask_diffusion reads."""
    vocab_size, trained = model.config.vocab_size, model.config.block_size
    block_size, steps = whole("block_size", block_size), whole("steps_per_block", steps_per_block)
    threshold = real("confidence_threshold", confidence_threshold)
    mask = whole("mask_token_id", mask_token_id)
    if not 1 <= block_size <= MOST_BLOCK:
        raise ValueError(f"block_size: expected 1 to {MOST_BLOCK}, got {block_size}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps_per_block: expected 1 to {MOST_STEPS}, got {steps}")
    if policy is not None and policy.renoise:
        raise ValueError("policy: expected one that un-masks, got renoise, which has no mask token")
    if math.isnan(threshold):
        raise ValueError(f"confidence_threshold: expected a number, got {threshold}")
    if not 0 <= mask < vocab_size:
        raise ValueError(f"mask_token_id: expected a token of a vocabulary of {vocab_size}, got {mask}")
    if trained is not None and block_size > trained:
        warnings.warn(
            f"block_size {block_size} is larger than the {trained} the model was trained with: sampling may collapse",
            stacklevel=_frames_inside() + 1,
        )
    return Blocks(block_size, steps, mask, policy or RemaskPolicy.twotower(threshold=threshold))


def _frames_inside() -> int:
    """How many of the innermost frames are this package's, this function's left out: a warning is for its caller."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame, count = frame.f_back, count + 1
    return count
