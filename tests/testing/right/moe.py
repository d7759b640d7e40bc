"""Right routing and experts: by sorting, by gathering, and all experts for all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from tests.testing.plain.moe import Experts, Gate, Plan, Route
from tests.testing.right.collection import right


def in_pieces(x: Tensor, gate_weight: Tensor) -> Tensor:
    """`moe_gate` in extended precision, expert by expert."""
    wide, weight = (m.double().numpy().astype(np.longdouble) for m in (x, gate_weight))
    columns = [(wide * row).sum(1) for row in weight]
    logits = np.stack(columns, 1) if columns else np.zeros((len(x), 0))
    return torch.from_numpy(logits.astype(np.float64))


class RouteBySorting(Route):
    """The best are those of a stable sort."""

    def best(self, choice: Tensor, open_: Tensor, count: int) -> Tensor:
        order = choice.argsort(dim=1, descending=True, stable=True)
        last = (~open_).gather(1, order).byte().argsort(dim=1, stable=True)
        return order.gather(1, last)[:, :count]


class RouteByNumpy(Route):
    """Keys of NumPy's lexicographic sort: what is open, the choice, the expert."""

    def best(self, choice: Tensor, open_: Tensor, count: int) -> Tensor:
        expert = np.broadcast_to(np.arange(choice.shape[1]), choice.shape)
        order = np.lexsort((expert, -choice.numpy(), ~open_.numpy()), axis=1)
        return torch.from_numpy(order[:, :count].copy())


def counted(experts: Tensor, num_experts: int) -> tt.MoePlan:
    """`moe_plan` by counting, as a histogram kernel does."""
    flat = [e if 0 <= e < num_experts else num_experts for e in experts.flatten().tolist()]
    counts = [flat.count(e) for e in range(num_experts + 1)]
    next_ = np.cumsum([0, *counts])[:-1].tolist()
    offsets, pairs = [*next_[:num_experts], next_[num_experts]], [0] * len(flat)
    for pair, expert in enumerate(flat):
        pairs[next_[expert]] = pair
        next_[expert] += 1
    return tt.MoePlan(*(torch.tensor(m, dtype=torch.int64) for m in (counts[:num_experts], offsets, pairs)))


class ExpertAfterExpert(Experts):
    """All tokens of an expert together, as transformers' loop does it, and added to their rows."""

    def __call__(
        self, x: Tensor, w_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, **options: Any
    ) -> Any:
        shared = options.pop("shared_up", None), options.pop("shared_down", None)
        biases = options.pop("up_bias", None), options.pop("down_bias", None)
        numbers = options.get("activation", "relu2"), options.get("alpha", 1.702), options.get("limit", 7.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.shape, dtype=wide)
        for e in range(len(w_up)):
            tokens, choice = torch.nonzero(experts == e, as_tuple=True)
            if len(tokens):
                mine = (None if bias is None else bias[e] for bias in biases)
                y = self.expert(x[tokens], w_up[e], w_down[e], *mine, *numbers)
                total.index_add_(0, tokens, y.to(wide) * weights[tokens, choice, None].to(wide))
        out = total.to(x.dtype)
        up, down = shared
        return out if up is None or down is None else out + self.expert(x, up, down, None, None, *numbers)


def every_expert_for_every_token(x: Tensor, w_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """relu2 without the sparsity: a dense product, in which most shares are 0."""
    shares = torch.zeros(len(x), len(w_up), dtype=torch.promote_types(x.dtype, torch.float32))
    for n in range(experts.shape[1]):
        here = (experts[:, n] >= 0) & (experts[:, n] < len(w_up))
        rows = torch.nonzero(here).flatten()
        shares.index_put_((rows, experts[rows, n].long()), weights[rows, n].to(shares.dtype), accumulate=True)
    hidden = torch.einsum("nh,eih->nei", x, w_up).relu().square()
    y = torch.einsum("nei,ehi->neh", hidden, w_down)
    return torch.einsum("neh,ne->nh", y.to(shares.dtype), shares).to(x.dtype)


def gathered(
    x: Tensor, w_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, *, activation: str = "relu2"
) -> Tensor:
    """Matrices are copied for every choice, and multiplied as a batch."""
    if activation not in ("relu2", "silu_gated"):
        raise NotImplementedError(f"activation {activation}")
    if not len(w_up):
        return torch.zeros_like(x)
    here = ((experts >= 0) & (experts < len(w_up)))[..., None]
    chosen = experts.long().clamp(0, len(w_up) - 1)  # [N, k]
    up = torch.einsum("nh,nkih->nki", x, w_up[chosen])
    if activation == "relu2":
        hidden = up.relu().square()
    else:
        gate, value = up.chunk(2, -1)
        hidden = F.silu(gate) * value
    y = torch.einsum("nki,nkhi->nkh", hidden, w_down[chosen]).to(torch.promote_types(x.dtype, torch.float32))
    return (y * weights[..., None].to(y.dtype)).masked_fill(~here, 0).sum(1).to(x.dtype)


right("moe_gate", in_pieces)
right("moe_plan", counted)
right("moe_experts", every_expert_for_every_token)
right("moe_experts", gathered)
CLASSES: dict[str, list[type]] = {
    "moe_gate": [Gate],
    "moe_route": [Route, RouteBySorting, RouteByNumpy],
    "moe_plan": [Plan],
    "moe_experts": [Experts, ExpertAfterExpert],
}
for op, classes in CLASSES.items():
    for each in classes:
        right(op, each(), each.__name__)
