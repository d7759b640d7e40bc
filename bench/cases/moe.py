"""The mixture of experts, and its router.

At the released sizes, 128 experts, 6 per token, and a shared one, weights are 2.6 GB of bfloat16, of which a block of
16 tokens reads about half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.reference import moe


def routed(route: Any, gate: Any) -> Any:
    """Product and choice together: x [N, H], gate_weight [E, H], correction_bias [E] to weights and experts [N, k]."""

    def moe_router(x: Tensor, gate_weight: Tensor, correction_bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return route(gate(x, gate_weight), correction_bias, **options)

    return moe_router


def router(n: int, device: str, shapes: Shapes = RELEASED) -> Case:
    """The router of n tokens."""
    e, top_k, h = shapes.n_routed_experts, shapes.num_experts_per_tok, shapes.hidden_size
    inputs = moe.make_inputs("moe_gate", dict(n=n, e=e, h=h), dtype=torch.bfloat16, device=device)
    inputs["gate_weight"] /= h**0.5
    inputs |= dict(correction_bias=torch.zeros(e, device=device), top_k=top_k, scaling=2.5)
    programs = {
        OURS: partial(routed(tt.moe_route, tt.moe_gate), **inputs),
        ORIGINAL: partial(routed(pytorch.eager_moe_route, pytorch.moe_gate), **inputs),
        "PyTorch: topk": partial(routed(pytorch.best_moe_route, pytorch.moe_gate), **inputs),
    }

    def same(ours: Any, theirs: Any) -> None:
        assert torch.equal(ours[1].long(), theirs[1].long()), "other experts"
        assert torch.allclose(ours[0], theirs[0], rtol=1e-6), "other weights"

    return Case(
        "moe_gate + moe_route",
        f"N {n}, E {e}, top-{top_k}",
        torch.float64,
        programs,
        same,
        costs.moe_router(n, h, e),
        goals=(3, 1.5, None) if device == "cpu" else NO_GOALS,
        sizes=dict(rows=n, hidden=h, experts=e, top_k=top_k),
        inputs=inputs,
    )


class Weights:
    """Of all experts, drawn once for all cases."""

    def __init__(self, device: str, shapes: Shapes = RELEASED) -> None:
        self.device, self.generator, self.shapes = device, torch.Generator(device).manual_seed(0), shapes
        h, i, shared = shapes.hidden_size, shapes.moe_intermediate_size, shapes.moe_shared_expert_intermediate_size
        self.up, self.down = self.stacked(i, h), self.stacked(h, i)
        self.shared = dict(shared_up=self.normal(shared, h), shared_down=self.normal(h, shared))

    def normal(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * shape[-1] ** -0.5).bfloat16()

    def stacked(self, *shape: int) -> Tensor:
        """Experts that differ in size alone, since drawing 1.3 billion numbers takes longer than the benchmark."""
        count = self.shapes.n_routed_experts
        sizes = torch.linspace(0.5, 1.5, count, device=self.device).bfloat16()[:, None, None]
        return torch.mul(self.normal(*shape), sizes, out=sizes.new_empty((count, *shape)))


def experts(w: Weights, n: int, goals: Goals = NO_GOALS) -> Case:
    e, top_k, h = w.shapes.n_routed_experts, w.shapes.num_experts_per_tok, w.shapes.hidden_size
    i, shared = w.shapes.moe_intermediate_size, w.shapes.moe_shared_expert_intermediate_size
    logits = torch.randn(n, e, generator=w.generator, device=w.device).double()
    weights, chosen = tt.moe_route(logits, torch.zeros(e, device=w.device), top_k=top_k, scaling=2.5)
    x = torch.randn(n, h, generator=w.generator, device=w.device).bfloat16()
    inputs = dict(x=x, w_up=w.up, w_down=w.down, weights=weights, experts=chosen, **w.shared)
    programs = {
        OURS: partial(tt.moe_experts, **inputs),
        ORIGINAL: partial(pytorch.eager_experts, **inputs),
        "PyTorch: experts in use": partial(pytorch.best_experts, **inputs),
    }
    hit = len(chosen.unique())
    sizes = dict(rows=n, hidden=h, experts=e, experts_hit=hit, top_k=top_k, intermediate=i, shared_intermediate=shared)
    return Case(
        "moe_experts",
        f"N {n}, E {e}, top-{top_k}, {hit} experts hit",
        torch.bfloat16,
        programs,
        close(8e-3),
        costs.moe_experts(n, h, i, top_k, hit, shared),
        goals=goals,
        sizes=sizes,
        inputs=inputs,
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    block, weights = shapes.block_size, Weights(device, shapes)
    for batch in batches or ((1, 4) if device == "cpu" else (1, 4, 16, 64, 256)):
        yield router(batch * block, device, shapes)
    if batches:
        for batch in batches:
            yield experts(weights, batch * block)
        return
    yield experts(weights, block, (3, 1.5, 0.8) if device == "cpu" else (None, None, 0.85))
    yield experts(weights, 4 * block)
    for n in (1,) if device == "cpu" else (256, 1024, 4096):
        yield experts(weights, n)
