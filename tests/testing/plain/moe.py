"""Routing and experts as short programs whose steps are methods."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from tests.testing.plain.adaln import wide


class Gate:
    """`moe_gate`."""

    def __call__(self, x: Tensor, gate_weight: Tensor) -> Tensor:
        return self.product(x, gate_weight).double()

    def product(self, x: Tensor, gate_weight: Tensor) -> Tensor:
        return x.double() @ gate_weight.double().T


class Route:
    """`moe_route`: experts are taken one after the other, each the best that is left."""

    def __call__(
        self,
        logits: Tensor,
        correction_bias: Tensor | None = None,
        *,
        top_k: int,
        score: str = "sigmoid",
        n_group: int = 1,
        topk_group: int = 1,
        renormalize: bool = True,
        scaling: float = 1.0,
        dropped: str = "zero",
        per_expert_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        scores = self.scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), score)
        choice = self.choice(scores, correction_bias)
        open_ = torch.ones_like(choice, dtype=torch.bool)
        if n_group > 1:
            kept = self.kept(choice, n_group, topk_group)
            choice = self.without(choice, kept, dropped)
            open_ = self.can_be_taken(kept, dropped)
        experts = self.best(choice, open_, top_k)
        weights = self.weights(scores, choice, experts)
        weights = self.scaled(weights, renormalize, scaling)
        if per_expert_scale is not None:
            weights = weights * self.expert_scale(per_expert_scale, experts).to(weights.dtype)
        return weights.float(), experts.int()

    def scores(self, logits: Tensor, score: str) -> Tensor:
        return logits.sigmoid() if score == "sigmoid" else logits.softmax(1)

    def choice(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else scores + bias.to(scores.dtype)

    def kept(self, choice: Tensor, n_group: int, topk_group: int) -> Tensor:
        """The experts of the best groups, bool [N, E]."""
        size = choice.shape[1] // n_group
        merit = self.merit(choice.unflatten(1, (n_group, size)))  # [N, groups]
        groups = self.best(merit, torch.ones_like(merit, dtype=torch.bool), topk_group)
        kept = torch.zeros_like(merit, dtype=torch.bool).scatter(1, groups, True)
        return kept.repeat_interleave(size, 1)

    def merit(self, grouped: Tensor) -> Tensor:
        """Of groups [N, groups, size]: the sum of the two best."""
        return grouped.sort(-1, descending=True).values[..., :2].sum(-1)

    def without(self, choice: Tensor, kept: Tensor, dropped: str) -> Tensor:
        return choice.masked_fill(~kept, 0)

    def can_be_taken(self, kept: Tensor, dropped: str) -> Tensor:
        return kept if dropped == "-inf" else torch.ones_like(kept)

    def best(self, choice: Tensor, open_: Tensor, count: int) -> Tensor:
        """The best `count` that are open, best first, the lowest first among equals."""
        taken, open_ = [], open_.clone()
        for _ in range(count):
            left = choice.masked_fill(~open_, -torch.inf)
            best = (left == left.amax(1, keepdim=True)) & open_
            taken.append(self.of_equals(best))
            open_.scatter_(1, taken[-1][:, None], False)
        return torch.stack(taken, 1)

    def of_equals(self, best: Tensor) -> Tensor:
        return best.int().argmax(1)

    def weights(self, scores: Tensor, choice: Tensor, experts: Tensor) -> Tensor:
        return scores.gather(1, experts)

    def scaled(self, weights: Tensor, renormalize: bool, scaling: float) -> Tensor:
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return weights * scaling

    def expert_scale(self, scale: Tensor, experts: Tensor) -> Tensor:
        return scale[experts]


class Plan:
    """`moe_plan`: expert after expert."""

    def __call__(self, experts: Tensor, num_experts: int) -> tt.MoePlan:
        flat = experts.flatten()
        places = [self.pairs_of(flat, e) for e in range(num_experts)]
        counts = torch.tensor([len(x) for x in places], dtype=torch.int64, device=flat.device)
        nobodys = torch.nonzero(self.is_nobodys(flat, num_experts)).flatten()
        return tt.MoePlan(counts, self.offsets(counts), torch.cat([*places, nobodys]))

    def pairs_of(self, flat: Tensor, expert: int) -> Tensor:
        return torch.nonzero(flat == expert).flatten()

    def is_nobodys(self, flat: Tensor, num_experts: int) -> Tensor:
        return (flat < 0) | (flat >= num_experts)

    def offsets(self, counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (1, 0))


class Experts:
    """`moe_experts`: token by token, and choice by choice."""

    def __call__(
        self,
        x: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        weights: Tensor,
        experts: Tensor,
        *,
        activation: str = "relu2",
        shared_up: Tensor | None = None,
        shared_down: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> Tensor:
        weights, numbers = self.routing(weights, x.dtype), (activation, alpha, limit)
        rows = []
        for token, (chosen, shares) in enumerate(zip(experts.tolist(), weights, strict=True)):
            total = torch.zeros(x.shape[1], dtype=wide(x), device=x.device)
            for n, e in self.served(chosen, len(w_up), token):
                biases = (None if bias is None else bias[e] for bias in (up_bias, down_bias))
                y = self.expert(x[token], w_up[e], self.down_of(w_down, e), *biases, *numbers)
                total = total + y.to(wide(x)) * shares[n].to(wide(x))
            rows.append(total)
        out = (torch.stack(rows) if rows else torch.zeros(x.shape)).to(x.dtype)
        if shared_up is not None and shared_down is not None:
            out = self.with_shared(out, self.expert(x, shared_up, shared_down, None, None, *numbers))
        return out

    def routing(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        return weights

    def served(self, chosen: list[int], count: int, token: int) -> list[tuple[int, int]]:
        """The choices of a token, as their number and expert, whose expert is here."""
        return [(n, e) for n, e in enumerate(chosen) if 0 <= e < count]

    def down_of(self, w_down: Tensor, expert: int) -> Tensor:
        return w_down[expert]

    def with_shared(self, out: Tensor, shared: Tensor) -> Tensor:
        return out + shared

    def expert(
        self,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        alpha: float,
        limit: float,
    ) -> Tensor:
        return F.linear(self.activated(F.linear(x, up, up_bias), activation, alpha, limit), down, down_bias)

    def activated(self, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
        if activation == "relu2":
            return self.relu2(up)
        if activation == "silu":
            return F.silu(up)
        if activation in ("gelu", "gelu_tanh"):
            return self.gelu(up, activation == "gelu_tanh")
        gate, value = self.halves(up)
        if activation == "silu_gated":
            return F.silu(gate) * value
        if activation in ("gelu_gated", "gelu_erf_gated"):
            return self.gelu(gate, activation == "gelu_gated") * value
        gate, value = self.clamped(gate, value, limit)
        gate_wide = gate.to(wide(gate))
        return (gate_wide * (alpha * gate_wide).sigmoid()).to(up.dtype) * (value + 1)

    def relu2(self, up: Tensor) -> Tensor:
        return up.relu().square()

    def gelu(self, up: Tensor, tanh: bool) -> Tensor:
        return F.gelu(up, approximate="tanh" if tanh else "none")

    def halves(self, up: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = up.chunk(2, -1)
        return gate, value

    def clamped(self, gate: Tensor, value: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        return gate.clamp(max=limit), value.clamp(-limit, limit)
