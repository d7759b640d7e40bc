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


def case(op: str, ours: Callable[..., Any], original: Any, best: Any, batch: int, dtype: torch.dtype) -> Case:
    sizes = dict(b=batch, s=16, h=HIDDEN, order="modulate_norm", gated=True)
    inputs = adaln.make_inputs(op, sizes, dtype=dtype)
    inputs.pop("gated", None)
    programs = {
        OURS: lambda: ours(**inputs),
        ORIGINAL: lambda: original(**inputs),
        "PyTorch: rms_norm": lambda: best(**inputs),
    }
    tensors = 2 if op == "adaln_norm" else 4
    moved = tensors * batch * 16 * HIDDEN * torch.empty(0, dtype=dtype).element_size()
    return Case(op, f"{batch * 16} × {HIDDEN}", dtype, programs, close(1e-2), bytes=moved, goals=(2, 1, None))


def cases() -> Iterator[Case]:
    for batch in (1, 16):
        yield case("adaln_norm", tt.adaln_norm, rivals.eager_adaln_norm, rivals.best_adaln_norm, batch, torch.bfloat16)
    yield case("adaln_norm", tt.adaln_norm, rivals.eager_adaln_norm, rivals.best_adaln_norm, 1, torch.float32)
    yield case(
        "gated_residual_adaln_norm",
        tt.gated_residual_adaln_norm,
        rivals.eager_residual_norm,
        rivals.best_residual_norm,
        1,
        torch.bfloat16,
    )
