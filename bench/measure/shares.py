"""Where the time of a denoiser step goes: seconds per operation, where `bench.cases.model` exchanges them."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.cases.model import BLOCK, CONFIG, operations, random_model, random_state
from twotower_kernels.ops.moe import moe_router

# The operations that a step is made of: those that the baselines replace, here the package's own.
INNER = {"moe_router": moe_router}
OPERATIONS = {name: INNER.get(name) or getattr(tt, name) for name in pytorch.BEST}
NORMS = ("adaln_norm", "gated_residual_adaln_norm", "gated_rms_norm")
OTHER = "other"  # embedding, splits and activations between the operations, and Python


def of_step(model: tt.TwoTowerModel, batch: int, context: int, seconds: float = 2.0) -> dict[str, Any]:
    """A denoiser step of random tokens behind a random context, with and without a clock around every operation.

    Both kinds of steps take turns for so many seconds in all, three rounds at least. The parts, medians over the
    rounds, are those of the steps with clocks; "whole" is the median step without. Where the clocks cost nothing and
    the machine is quiet, the parts sum to the whole.
    """
    ids = torch.randint(model.config.vocab_size, (batch, BLOCK))
    state, t = random_state(model, batch, context), torch.linspace(0.25, 1, batch)
    spent: Counter[str] = Counter()

    def clocked(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = op(*arguments, **options)
            spent[name] += time.perf_counter() - start
            return result

        return call

    def step() -> float:
        start = time.perf_counter()
        model.denoise(ids, state, t)
        return time.perf_counter() - start

    with_clocks = {name: clocked(name, op) for name, op in OPERATIONS.items()}
    wholes: list[float] = []
    rounds: list[dict[str, float]] = []
    step()
    begin = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - begin < seconds:
        wholes.append(step())
        spent.clear()
        with operations(with_clocks):
            total = step()
        rounds.append({**spent, OTHER: total - spent.total()})
    parts = {name: statistics.median(found.get(name, 0.0) for found in rounds) for name in (*OPERATIONS, OTHER)}
    return {"batch": batch, "context": context, "whole": statistics.median(wholes), "parts": parts}


def over_context(
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072), config: tt.TwoTowerConfig = CONFIG, seconds: float = 2.0
) -> Iterator[dict[str, Any]]:
    """`of_step` at batch 1 of the mid-size model of random weights in bfloat16."""
    torch.manual_seed(0)
    model = random_model(torch.bfloat16, "denoiser", config)
    for context in contexts:
        yield of_step(model, 1, context, seconds)
