"""What is asked of a generation: its options as one value, checked before a model is called; and its prompts."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower_kernels.options.arguments import Integers, are_several, integers, kind_of, real, whole, wholes
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.remask_choices import HIGHEST_TEMPERATURE
from twotower_kernels.options.remask_policy import RemaskPolicy

MODES = ("mask_diffusion", "mock_ar", "ar", "speculative")
DRAFTING = ("mask_diffusion", "speculative")  # the modes in which the denoiser fills blocks of masks
MOST_BLOCK = 2**16  # tokens; a block is denoised whole, its logits over the vocabulary too
MOST_DRAFT = 64  # tokens that the context tower reads at once as it reads them one by one, to the bit (CPU)
MOST_STEPS = 2**31 - 1
MOST_VOCABULARY = 2**31  # tokens

Prompts = Tensor | np.ndarray | Sequence[Integers]
Processor = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits [R, S, V], tokens [R, S], rows [R]) -> logits


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The options of `TwoTowerModel.generate` and `stream`, whose keyword arguments explain them. Immutable.

    Numbers become Python's, tokens that end a row a tuple of them, and so do seeds of rows. What only some modes read
    is checked in these alone. What depends on a model is checked by `for_model`.

    Raises:
        ValueError: an option out of its range, a policy that needs no masks (renoise), a policy for drafts.
        TypeError: a number that is none.
    """

    mode: str = "mask_diffusion"
    max_new_tokens: int
    block_size: int = 16
    steps_per_block: int = 16
    draft_steps: int = 1
    confidence_threshold: float = 0.8
    policy: RemaskPolicy | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    mask_token_id: int | None = None  # None: the model's
    eos_token_id: int | Integers | None = None
    seed: int | Integers = 0
    logprobs: bool = False
    processors: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        checked = self._of_every_mode()
        if self.mode in DRAFTING:
            checked |= self._of_blocks()
            checked |= self._of_drafts() if self.mode == "speculative" else self._of_diffusion()
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _of_every_mode(self) -> dict[str, Any]:
        """What all modes read, as Python's numbers. Comparisons are written so that NaN fails them."""
        count, top_k = whole("max_new_tokens", self.max_new_tokens), whole("top_k", self.top_k)
        temperature, top_p = real("temperature", self.temperature), real("top_p", self.top_p)
        if count < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {count}")
        if not 0 <= temperature <= HIGHEST_TEMPERATURE:
            raise ValueError(f"temperature: expected a number from 0 to {HIGHEST_TEMPERATURE:g}, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected 0 to the vocabulary size, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
        checked = {"max_new_tokens": count, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return checked | {"eos_token_id": self._ends(), "seed": self._seed(), "processors": self._processors()}

    def _ends(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        given: Any = self.eos_token_id
        ends = wholes("eos_token_id", given if are_several(given) else [given], "None, a token or tokens")
        if min(ends, default=0) < 0:
            raise ValueError(f"eos_token_id: expected tokens, 0 or more, got {min(ends)}")
        return tuple(ends)

    def _seed(self) -> int | tuple[int, ...]:
        if are_several(self.seed):
            return tuple(wholes("seed", self.seed, "an integer, or one per row"))
        return whole("seed", self.seed)

    def _processors(self) -> tuple[Processor, ...]:
        given: Any = self.processors
        if callable(given) or not isinstance(given, Iterable):
            raise TypeError(f"processors: expected a list of callables, got {kind_of(given)}")
        found = tuple(given)
        for i, processor in enumerate(found):
            if not callable(processor):
                raise TypeError(f"processors[{i}]: expected a callable, got {kind_of(processor)}")
        return found

    def _of_blocks(self) -> dict[str, Any]:
        """What only modes with blocks of masks read."""
        size, threshold = whole("block_size", self.block_size), real("confidence_threshold", self.confidence_threshold)
        mask = None if self.mask_token_id is None else whole("mask_token_id", self.mask_token_id)
        most = MOST_DRAFT if self.mode == "speculative" else MOST_BLOCK
        if not 1 <= size <= most:
            raise ValueError(f"block_size: expected 1 to {most}, got {size}")
        if mask is not None and mask < 0:
            raise ValueError(f"mask_token_id: expected a token, 0 or more, got {mask}")
        if math.isnan(threshold):
            raise ValueError(f"confidence_threshold: expected a number, got {threshold}")
        return {"block_size": size, "confidence_threshold": threshold, "mask_token_id": mask}

    def _of_diffusion(self) -> dict[str, Any]:
        """What only mask_diffusion reads."""
        steps = whole("steps_per_block", self.steps_per_block)
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps_per_block: expected 1 to {MOST_STEPS}, got {steps}")
        if self.policy is not None and not isinstance(self.policy, RemaskPolicy):
            raise TypeError(f"policy: expected a RemaskPolicy, got {kind_of(self.policy)}")
        if self.policy is not None and self.policy.renoise:
            raise ValueError("policy: expected one that un-masks, got renoise, which has no mask token")
        return {"steps_per_block": steps}

    def _of_drafts(self) -> dict[str, Any]:
        """What only speculative reads."""
        steps = whole("draft_steps", self.draft_steps)
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"draft_steps: expected 1 to {MOST_STEPS}, got {steps}")
        if self.policy is not None:
            raise ValueError(
                "policy: expected None, as drafts have a rule of their own (draft_steps, confidence_threshold), "
                f"got {kind_of(self.policy)}"
            )
        return {"draft_steps": steps}

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens with which a row ends."""
        found: Any = self.eos_token_id
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampler's arguments, by name."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def unmasking(self) -> RemaskPolicy:
        """The rule by which masks are filled: for drafts what is certain from the left, for mask_diffusion the policy
        that was given, or the TwoTower rule with its threshold."""
        if self.mode == "speculative":
            return RemaskPolicy.prefix(self.confidence_threshold)
        return self.policy or RemaskPolicy.twotower(threshold=self.confidence_threshold)

    def for_model(self, model: TwoTowerConfig) -> GenerationConfig:
        """These options for a model of this shape: with its mask token, unless another one is given.

        Warns of a block larger than the model was trained with.

        Raises:
            ValueError: tokens that are not in its vocabulary, or a top_k larger than that.
        """
        found = self
        if self.mode in DRAFTING and self.mask_token_id is None:
            found = replace(self, mask_token_id=model.mask_token_id)
        found.check_vocabulary(model.vocab_size)
        trained = model.block_size if self.mode == "mask_diffusion" else None
        if trained is not None and self.block_size > trained:
            warnings.warn(
                f"block_size {self.block_size} is larger than the {trained} the model was trained with: sampling may "
                "collapse",
                stacklevel=_frames_inside() + 1,
            )
        return found

    def check_vocabulary(self, size: int) -> None:
        """ValueError unless tokens are in a vocabulary of this size, and top_k is no larger."""
        if self.top_k > size:
            raise ValueError(f"top_k: expected 0 to the vocabulary size {size}, got {self.top_k}")
        for token in self.ends:
            if token >= size:
                raise ValueError(f"eos_token_id: expected tokens of a vocabulary of {size}, got {token}")
        mask = self.mask_token_id if self.mode in DRAFTING else None
        if mask is not None and not 0 <= mask < size:
            raise ValueError(f"mask_token_id: expected a token of a vocabulary of {size}, got {mask}")


def prompt_rows(prompts: Prompts, vocab_size: int | None, device: torch.device | None) -> list[Tensor]:
    """B checked one-dimensional int64 prompts on the device.

    Args:
        vocab_size: None: not known; tokens are 0 or more.
        device: None: where they are.
    """
    size = MOST_VOCABULARY if vocab_size is None else vocab_size
    expected = "tokens, 0 or more" if vocab_size is None else f"tokens of a vocabulary of {vocab_size}"
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
        wrong = row[(row < 0) | (row >= size)]
        if len(wrong):
            raise ValueError(f"prompts[{b}]: expected {expected}, got {int(wrong[0])}")
        rows.append(row.to(device))
    return rows


def _frames_inside() -> int:
    """How many of the innermost frames are this package's, this function's left out: a warning is for its caller."""
    package = __name__.partition(".")[0]
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, count = frame.f_back, count + 1
    return count
