"""What the un-masking threshold buys and costs: the shipped model on files that were held out of its training.

How the context tower's negative log-likelihood and the share of distinct 4-grams are computed: `reference.demo_report`.
48 prompts of 64 tokens, 64 tokens more. Greedy text earns a low likelihood loss by repeating
itself, so both figures are read together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.cases.model import BLOCK
from twotower_kernels.reference.demo_data import corpus, encode, windows
from twotower_kernels.reference.demo_report import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, distinct, nll_of_continuations

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TRACED = 0.3  # low enough that steps commit more than one token


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(tt.demo_path() / "tokenizer.json"))


@cache
def held_out() -> Tensor:
    """The held-out files as one stream of tokens."""
    return encode(tokenizer(), list(corpus().held_out.values()))


def sweep(
    model: tt.TwoTowerModel, scorer: tt.TwoTowerModel, prompts: Tensor, new: int, values: Sequence[float] = THRESHOLDS
) -> list[dict[str, Any]]:
    """Greedy generation in mode `ar`, whose threshold is None, then in mask diffusion over the thresholds.

    `scorer` gives the likelihood. Tokens per second count everything that a request costs, prefill included.
    """
    rows = []
    model.generate(prompts, max_new_tokens=BLOCK)  # to warm up
    for threshold in (None, *values):
        options = dict(mode="ar") if threshold is None else dict(confidence_threshold=threshold)
        result = model.generate(prompts, max_new_tokens=new, **options)  # type: ignore[arg-type]
        tokens = sum(map(len, result.new_tokens))
        rows.append(
            {
                "mode": "ar" if threshold is None else "mask_diffusion",
                "threshold": threshold,
                "tokens per NFE": result.tokens_per_nfe,
                "tokens per second": tokens / result.seconds,
                "nats per token": nll_of_continuations(scorer, result.sequences),
                "distinct 4-grams": distinct(result.sequences),
            }
        )
    return rows


def trace(model: tt.TwoTowerModel, prompt: Tensor, new: int, threshold: float = TRACED) -> dict[str, Any]:
    """One generation, position by position: the model call that committed each token.

    Returns:
        "block" and "threshold"; "token": per position its id; "call": per position the call after which it stood
        there, counted from 1 over the whole text; "calls": how many there were.
    """
    call: list[int] = []
    tokens: list[int] = []
    calls, size = 0, 0
    for event in model.stream(prompt[None], max_new_tokens=new, confidence_threshold=threshold):
        if event.committed:
            tokens += event.after[0].tolist()
            continue
        calls, size = int(event.nfe[0]), event.after.shape[1]
        if event.step == 0:
            call += [0] * size
        for i in (event.before[0] != event.after[0]).nonzero()[:, 0].tolist():
            call[event.block * size + i] = calls
    return {"threshold": threshold, "block": size, "calls": calls, "token": tokens, "call": call}


def measure() -> dict[str, Any]:
    """The sweep, the real text's figures, and the trace with its text."""
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    scorer = tt.TwoTowerModel.from_pretrained(tt.demo_path(), dtype=torch.float32)
    real = windows(held_out(), PROMPT_TOKENS + NEW_TOKENS, PROMPTS, torch.Generator().manual_seed(11))
    prompts, words = real[:, :PROMPT_TOKENS], tokenizer()
    traced = trace(model, prompts[0], 3 * BLOCK)
    return {
        "prompts": PROMPTS,
        "prompt tokens": PROMPT_TOKENS,
        "new tokens": NEW_TOKENS,
        "real text": {
            "nats per token": nll_of_continuations(scorer, list(real)),
            "distinct 4-grams": distinct(list(real)),
        },
        "sweep": sweep(model, scorer, prompts, NEW_TOKENS),
        "trace": {
            "prompt": words.decode(prompts[0].tolist()),
            "text": [words.decode([token], skip_special_tokens=False) for token in traced["token"]],
            **traced,
        },
    }
