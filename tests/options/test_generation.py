"""What is asked of a generation is checked once, and both programs refuse alike, before a model is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.small_model import VOCAB, package_model, small_model
from twotower_kernels.model.generate import stream
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.generate import generate as specification

# `stream` raises itself, not its first event.
PROGRAMS: dict[str, Callable[..., Any]] = {
    "specification": lambda prompts, **options: specification(small_model(), prompts, **options),
    "package": lambda prompts, **options: stream(package_model(), prompts, **options),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one row"),
        ({"prompts": [[5], []]}, r"prompts\[1\]: expected one token or more"),
        ({"prompts": torch.zeros(2, 0, dtype=torch.int64)}, r"prompts\[0\]: expected one token or more"),
        ({"prompts": torch.tensor([5, 6])}, r"prompts: expected \[B, T\]"),
        ({"prompts": [[5], [6, VOCAB]]}, rf"prompts\[1\]: expected tokens of a vocabulary of {VOCAB}, got {VOCAB}"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: .* -1"),
        ({"mode": "diffusion"}, "mode: expected one of .*'diffusion'"),
        ({"max_new_tokens": -1}, "max_new_tokens: .* -1"),
        ({"block_size": 0}, "block_size: .* 0"),
        ({"steps_per_block": 0}, "steps_per_block: .* 0"),
        ({"confidence_threshold": math.nan}, "confidence_threshold: .* nan"),
        ({"temperature": -0.5}, "temperature: .* -0.5"),
        ({"temperature": math.nan}, "temperature: .* nan"),
        ({"temperature": math.inf}, "temperature: .* inf"),
        ({"top_k": -1}, "top_k: .* -1"),
        ({"top_k": VOCAB + 1}, f"top_k: .* {VOCAB + 1}"),
        ({"top_p": 0.0}, "top_p: .* 0.0"),
        ({"top_p": math.nan}, "top_p: .* nan"),
        ({"mask_token_id": VOCAB}, f"mask_token_id: .* {VOCAB}"),
        ({"eos_token_id": -1}, "eos_token_id: .* -1"),
        ({"seed": 2**64}, "seed: .* 64 bits"),
        ({"policy": RemaskPolicy.diffusion_gemma()}, "policy: .* renoise"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, program: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROGRAMS[program](**{"prompts": [[5, 6]], "max_new_tokens": 4, **change})


@pytest.mark.parametrize("program", PROGRAMS)
def test_prompts_of_fractions_are_refused(program: str) -> None:
    with pytest.raises(TypeError, match=r"prompts\[0\]: expected integers, got torch.float32"):
        PROGRAMS[program]([[0.5]], max_new_tokens=4)
