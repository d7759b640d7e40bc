"""The model's linear layers on a few rows: weights are read once from memory, which bounds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, Case, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.ops.linear import linear


def widened(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator, device=device) * inputs**-0.5).to(dtype)
    programs = {
        OURS: partial(linear, x, weight),
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
    """A Mamba-2 layer's projections, into the layer and out of it, and the head."""
    hidden, inner, block = shapes.hidden_size, shapes.mamba_inner, shapes.block_size
    projected = 2 * inner + 2 * shapes.n_groups * shapes.ssm_state_size + shapes.mamba_num_heads
    for dtype in (torch.bfloat16, torch.float32):
        for batch in batches or (1, 4):
            yield case(batch * block, hidden, projected, dtype, device)
            if batch == 1 or batches:
                yield case(batch * block, inner, hidden, dtype, device)
    for batch in batches or (1,):
        yield case(batch * block, hidden, shapes.vocab_size, torch.bfloat16, device)
