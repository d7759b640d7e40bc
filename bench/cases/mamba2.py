"""Mamba-2's convolution, scan and gated norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.reference import mamba2


def scan(
    batch: int, length: int, states: bool, device: str, goals: Goals = NO_GOALS, shapes: Shapes = RELEASED
) -> Case:
    layer = dict(
        heads=shapes.mamba_num_heads,
        head_dim=shapes.mamba_head_dim,
        state=shapes.ssm_state_size,
        groups=shapes.n_groups,
    )
    given = dict(b=batch, l=length, seeded=True, width=shapes.conv_kernel, **layer)
    inputs = mamba2.make_inputs("mamba2_scan", given, dtype=torch.bfloat16, device=device)
    inputs["return_states"] = states
    programs = {
        OURS: partial(tt.mamba2_scan, **inputs),
        ORIGINAL: partial(pytorch.eager_scan, **inputs),
        "PyTorch: closed form": partial(pytorch.best_scan, **inputs),
    }
    sizes = {f"mamba_{name}" if "head" in name else name: value for name, value in layer.items()}
    return Case(
        "mamba2_scan",
        f"B {batch}, L {length}{', states returned' if states else ''}",
        torch.bfloat16,
        programs,
        close(2e-2),
        costs.mamba2_scan(batch, length, **layer, kernel=shapes.conv_kernel, returned=states),
        goals=goals,
        sizes=dict(batch=batch, length=length, **sizes),
        inputs=inputs,
    )


def norm(batch: int, device: str, goals: Goals = NO_GOALS, shapes: Shapes = RELEASED) -> Case:
    block, width, groups = shapes.block_size, shapes.mamba_inner, shapes.n_groups
    given = dict(b=batch, l=block, width=width, groups=groups)
    inputs = mamba2.make_inputs("gated_rms_norm", given, dtype=torch.bfloat16, device=device)
    programs = {
        OURS: partial(tt.gated_rms_norm, **inputs),
        ORIGINAL: partial(pytorch.eager_gated_rms_norm, **inputs),
        "PyTorch: rms_norm": partial(pytorch.best_gated_rms_norm, **inputs),
    }
    return Case(
        "gated_rms_norm",
        f"{batch * block} × {width}",
        torch.bfloat16,
        programs,
        close(1e-2),
        costs.gated_rms_norm(batch * block, width),
        goals=goals,
        sizes=dict(batch=batch, block=block, rows=batch * block, width=width, groups=groups),
        inputs=inputs,
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    block = shapes.block_size
    if batches or device != "cpu":
        for batch in batches or (1, 4, 16, 64):
            yield scan(batch, block, False, device, shapes=shapes)
            yield norm(batch, device, shapes=shapes)
        if not batches:
            yield scan(1, 64, False, device, shapes=shapes)
            yield scan(1, block, True, device, shapes=shapes)
            yield scan(1, 4096, True, device, shapes=shapes)
        return
    yield scan(1, block, False, device, (10, 4, None), shapes)
    yield scan(1, block, True, device, shapes=shapes)
    yield scan(16, block, False, device, (10, 4, None), shapes)
    yield scan(1, 1, True, device, shapes=shapes)
    yield scan(1, 1024, True, device, shapes=shapes)
    yield norm(1, device, (2, 1, None), shapes)
    yield norm(16, device, (2, 1, None), shapes)
