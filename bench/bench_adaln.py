"""adaLN at the released hidden size, 2688."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import twotower_kernels as tt
from bench import rivals
from bench.timing import ORIGINAL, OURS, Case, close
from reference import adaln

HIDDEN = 2688


def case(op: str, original: Any, best: Any, batch: int, dtype: torch.dtype, device: str) -> Case:
    sizes = dict(b=batch, s=16, h=HIDDEN, order="modulate_norm", gated=True)
    inputs = adaln.make_inputs(op, sizes, dtype=dtype, device=device)
    inputs.pop("gated", None)
    ours = getattr(tt, op)
    programs: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours(**inputs),
        ORIGINAL: lambda: original(**inputs),
        "PyTorch: rms_norm": lambda: best(**inputs),
    }
    tensors = 2 if op == "adaln_norm" else 4
    moved = tensors * batch * 16 * HIDDEN * torch.empty(0, dtype=dtype).element_size()
    return Case(op, f"{batch * 16} × {HIDDEN}", dtype, programs, close(1e-2), bytes=moved, goals=(2, 1, None))


def cases(device: str = "cpu") -> Iterator[Case]:
    norm = "adaln_norm", rivals.eager_adaln_norm, rivals.best_adaln_norm
    both = "gated_residual_adaln_norm", rivals.eager_residual_norm, rivals.best_residual_norm
    for batch in (1, 16) if device == "cpu" else (1, 4, 16, 64):
        yield case(*norm, batch, torch.bfloat16, device)
        yield case(*both, batch, torch.bfloat16, device)
    yield case(*norm, 1, torch.float32, device)
