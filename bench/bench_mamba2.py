"""Mamba-2's convolution, scan and gated norm at the released sizes: 64 heads of 64, state 128, 8 groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import twotower_kernels as tt
from bench import rivals
from bench.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from reference import mamba2

HEADS, DIM, STATE, GROUPS = 64, 64, 128, 8
PARAMETERS = ("xbc", "dt", "conv_weight", "conv_bias", "a_log", "d", "dt_bias")
OPTIONS = ("n_groups", "head_dim", "conv_state", "ssm_state")


def scan(batch: int, length: int, states: bool, device: str, goals: Goals = NO_GOALS) -> Case:
    sizes = dict(b=batch, l=length, heads=HEADS, head_dim=DIM, state=STATE, groups=GROUPS, seeded=True)
    inputs = mamba2.make_inputs("mamba2_scan", sizes, dtype=torch.bfloat16, device=device)
    parameters = [inputs[name] for name in PARAMETERS]
    options = {name: inputs[name] for name in OPTIONS} | {"return_states": states}
    programs = {
        OURS: lambda: tt.mamba2_scan(*parameters, **options),
        ORIGINAL: lambda: rivals.eager_scan(*parameters, **options),
        "PyTorch: closed form": lambda: rivals.best_scan(*parameters, **options),
    }
    xbc, size = parameters[0], inputs["ssm_state"].numel()
    return Case(
        "mamba2_scan",
        f"B {batch}, L {length}{', states returned' if states else ''}",
        torch.bfloat16,
        programs,
        close(2e-2),
        bytes=(1 + states) * size * 4 + 2 * xbc.numel() * xbc.element_size(),
        goals=goals,
    )


def norm(batch: int, device: str, goals: Goals = NO_GOALS) -> Case:
    sizes = dict(b=batch, l=16, width=4096, groups=8)
    inputs = mamba2.make_inputs("gated_rms_norm", sizes, dtype=torch.bfloat16, device=device)
    programs = {
        OURS: lambda: tt.gated_rms_norm(**inputs),
        ORIGINAL: lambda: rivals.eager_gated_rms_norm(**inputs),
        "PyTorch: rms_norm": lambda: rivals.best_gated_rms_norm(**inputs),
    }
    moved = 3 * inputs["y"].numel() * inputs["y"].element_size()
    shape = f"{batch * 16} × 4096"
    return Case("gated_rms_norm", shape, torch.bfloat16, programs, close(1e-2), bytes=moved, goals=goals)


def cases(device: str = "cpu") -> Iterator[Case]:
    if device != "cpu":
        for batch in (1, 4, 16, 64):
            yield scan(batch, 16, False, device)
            yield norm(batch, device)
        yield scan(1, 64, False, device)
        yield scan(1, 16, True, device)
        yield scan(1, 4096, True, device)
        return
    yield scan(1, 16, False, device, (10, 4, None))
    yield scan(1, 16, True, device)
    yield scan(16, 16, False, device, (10, 4, None))
    yield scan(1, 1, True, device)
    yield scan(1, 1024, True, device)
    yield norm(1, device, (2, 1, None))
    yield norm(16, device, (2, 1, None))
