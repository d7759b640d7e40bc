"""The mixture of experts at the released sizes: 128 experts, 6 per token, and a shared one.

Weights are 2.6 GB of bfloat16, of which a block of 16 tokens reads about half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from bench import rivals
from bench.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from reference import moe

E, K, H, I, J = 128, 6, 2688, 1856, 3712  # noqa: E741


def router(n: int, device: str) -> Case:
    """Product and choice together: the router of n tokens."""
    inputs = moe.make_inputs("moe_gate", dict(n=n, e=E, h=H), dtype=torch.bfloat16, device=device)
    x, weight, bias = inputs["x"], inputs["gate_weight"] / H**0.5, torch.zeros(E, device=device)
    options: dict[str, Any] = dict(top_k=K, scaling=2.5)
    programs = {
        OURS: lambda: tt.moe_route(tt.moe_gate(x, weight), bias, **options),
        ORIGINAL: lambda: rivals.eager_moe_route(rivals.moe_gate(x, weight), bias, **options),
        "PyTorch: topk": lambda: rivals.best_moe_route(rivals.moe_gate(x, weight), bias, **options),
    }

    def same(ours: Any, theirs: Any) -> None:
        assert torch.equal(ours[1].long(), theirs[1].long()), "other experts"
        assert torch.allclose(ours[0], theirs[0], rtol=1e-6), "other weights"

    shape = f"N {n}, E {E}, top-{K}"
    return Case("moe_gate + moe_route", shape, torch.float64, programs, same, goals=(3, 1.5, None))


class Weights:
    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)
        self.up, self.down = self.stacked(I, H), self.stacked(H, I)
        self.shared: dict[str, Any] = dict(shared_up=self.normal(J, H), shared_down=self.normal(H, J))

    def normal(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * shape[-1] ** -0.5).bfloat16()

    def stacked(self, *shape: int) -> Tensor:
        """Experts that differ in size alone, since drawing 1.3 billion numbers takes longer than the benchmark."""
        sizes = torch.linspace(0.5, 1.5, E, device=self.device).bfloat16()[:, None, None]
        return torch.mul(self.normal(*shape), sizes, out=sizes.new_empty((E, *shape)))


def experts(w: Weights, n: int, goals: Goals = NO_GOALS) -> Case:
    logits = torch.randn(n, E, generator=w.generator, device=w.device).double()
    weights, chosen = tt.moe_route(logits, torch.zeros(E, device=w.device), top_k=K, scaling=2.5)
    x = torch.randn(n, H, generator=w.generator, device=w.device).bfloat16()
    arguments = x, w.up, w.down, weights, chosen
    programs = {
        OURS: lambda: tt.moe_experts(*arguments, **w.shared),
        ORIGINAL: lambda: rivals.eager_experts(*arguments, **w.shared),
        "PyTorch: experts in use": lambda: rivals.best_experts(*arguments, **w.shared),
    }
    hit = len(chosen.unique())
    return Case(
        "moe_experts",
        f"N {n}, E {E}, top-{K}, {hit} experts hit",
        torch.bfloat16,
        programs,
        close(8e-3),
        bytes=(hit * 2 * I * H + 2 * J * H) * 2,
        flops=2 * n * (K * 2 * I * H + 2 * J * H),
        goals=goals,
    )


def cases(device: str = "cpu") -> Iterator[Case]:
    yield router(16, device)
    yield router(64, device)
    weights = Weights(device)
    yield experts(weights, 16, (3, 1.5, 0.8))
    yield experts(weights, 64)
    if device == "cpu":
        yield experts(weights, 1)
    else:
        yield experts(weights, 256)
        yield experts(weights, 1024)
