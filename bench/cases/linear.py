"""The model's linear layers: bound by reading weights on few rows, by arithmetic on many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, Case, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes

ROWS = (1, 16, 64, 256, 1024, 4096)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator, device=device) * inputs**-0.5).to(dtype)
    programs = {
        OURS: partial(tt.linear, x, weight),
        ORIGINAL: partial(F.linear, x, weight),
        "PyTorch: widened": partial(widened, x, weight),
    }
    return Case(
        "linear",
        f"{rows} × {inputs} → {outputs}",
        dtype,
        programs,
        close(5e-3),
        costs.linear(rows, inputs, outputs, dtype.itemsize),
        sizes=dict(rows=rows, hidden=inputs, width=outputs),
        inputs=dict(x=x, weight=weight),
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    """A Mamba-2 layer's projections, into the layer and out of it, and the head; out of it with more rows, too."""
    hidden, inner, block = shapes.hidden_size, shapes.mamba_inner, shapes.block_size
    projected = 2 * inner + 2 * shapes.n_groups * shapes.ssm_state_size + shapes.mamba_num_heads
    for dtype in (torch.bfloat16, torch.float32):
        for batch in batches or (1, 4):
            yield case(batch * block, hidden, projected, dtype, device)
        for rows in [batch * block for batch in batches] if batches else ROWS:
            yield case(rows, inner, hidden, dtype, device)
    for batch in batches or (1,):
        yield case(batch * block, hidden, shapes.vocab_size, torch.bfloat16, device)
