"""adaLN on blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.reference import adaln


def case(
    op: str, original: Any, best: Any, batch: int, dtype: torch.dtype, device: str, shapes: Shapes = RELEASED
) -> Case:
    block, hidden = shapes.block_size, shapes.hidden_size
    sizes = dict(b=batch, s=block, h=hidden, order="modulate_norm")
    inputs = adaln.make_inputs(op, sizes, dtype=dtype, device=device)
    programs = {
        OURS: partial(getattr(tt, op), **inputs),
        ORIGINAL: partial(original, **inputs),
        "PyTorch: rms_norm": partial(best, **inputs),
    }
    return Case(
        op,
        f"{batch * block} × {hidden}",
        dtype,
        programs,
        close(1e-2),
        getattr(costs, op)(batch * block, hidden, dtype.itemsize),
        goals=(2, 1, None) if device == "cpu" else NO_GOALS,
        sizes=dict(batch=batch, block=block, rows=batch * block, hidden=hidden),
        inputs=inputs,
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    norm = "adaln_norm", pytorch.eager_adaln_norm, pytorch.best_adaln_norm
    both = "gated_residual_adaln_norm", pytorch.eager_residual_norm, pytorch.best_residual_norm
    for batch in batches or ((1, 16) if device == "cpu" else (1, 4, 16, 64)):
        yield case(*norm, batch, torch.bfloat16, device, shapes)
        yield case(*both, batch, torch.bfloat16, device, shapes)
    for batch in batches or (1,):
        yield case(*norm, batch, torch.float32, device, shapes)
