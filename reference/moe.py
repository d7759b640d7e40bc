"""Mixture of experts: router, routing, plan, experts.

    logits   = x·Wᵀ in float64                                     (`moe_gate`: selection must not hang on rounding)
    s        = sigmoid(logits) or softmax(logits)
    choice   = s + correction_bias; with groups, only the `topk_group` groups whose two best choices sum highest stay:
               the choices of the others count as 0, or cannot be taken
    experts  = the top_k of choice; weights = their s, / (Σ + 1e-20) if renormalized, · scaling, · per_expert_scale of
               the expert                                                                           (`moe_route`)
    y        = Σ_k weight_k · down_k(act(up_k·x)) [+ down(act(up·x)) of the shared expert]          (`moe_experts`)

Routing with bias and groups: DeepSeek-V3 (arXiv 2412.19437, eq. 12-16). relu²: Primer (arXiv 2109.08668).
Activations: "relu2" relu(u)²; "silu_gated" SiLU(g)·u and "gelu_gated" gelu_tanh(g)·u with `w_up = [g rows; u rows]`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("relu2", "silu_gated", "gelu_gated")
SCORES = ("sigmoid", "softmax")
DROPPED = ("zero", "-inf")


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    """Router logits `x·Wᵀ` with both factors upcast to float64.

    Args:
        x: `[N, H]`. gate_weight: `[E, H]`.

    Returns:
        `[N, E]` float64.
    """
    if x.dim() != 2 or gate_weight.dim() != 2 or x.shape[1] != gate_weight.shape[1]:
        raise ValueError(
            f"x, gate_weight: expected [N, H] and [E, H], got {tuple(x.shape)} and {tuple(gate_weight.shape)}"
        )
    return x.double() @ gate_weight.double().T


def moe_route(
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
    """Chooses `top_k` experts per token (arXiv 2412.19437, eq. 13-16).

    The bias takes part in the selection only, never in the weights. Ties take the lowest expert.

    Args:
        logits: `[N, E]`, any floating dtype; scores are float32, float64 for float64.
        correction_bias: `[E]` or None.
        top_k: experts per token, at most E.
        score: "sigmoid" or "softmax".
        n_group, topk_group: experts lie in `n_group` equal groups, of which `topk_group` are eligible.
        renormalize: divide the chosen scores by their sum.
        scaling: multiplies the weights, after renormalization.
        dropped: what the choices of the other groups become. "zero": 0, which is chosen before a negative choice of a
            group that stayed. "-inf": they cannot be chosen.
        per_expert_scale: `[E]` or None; multiplies the weight of a chosen expert, after renormalization.

    Returns:
        weights `[N, top_k]` float32 (float64 for float64 logits is rounded here) and experts `[N, top_k]` int32, in
        descending selection score.

    Raises:
        ValueError: `top_k` or groups that do not fit E, fewer experts than `top_k` that can be chosen, an unknown score
            or `dropped`.
        TypeError: logits that are not floating.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [N, E], got {tuple(logits.shape)}")
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    e = logits.shape[1]
    if n_group < 1 or e % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"n_group, topk_group: expected a divisor of {e} and 1..n_group, got {n_group} and {topk_group}"
        )
    if not 1 <= top_k <= e:
        raise ValueError(f"top_k: expected 1..{e} for {e} experts, got {top_k}")
    for name, vector in (("correction_bias", correction_bias), ("per_expert_scale", per_expert_scale)):
        if vector is not None and vector.shape != (e,):
            raise ValueError(f"{name}: expected shape {(e,)}, got {tuple(vector.shape)}")
    if dropped not in DROPPED:
        raise ValueError(f"dropped: expected one of {DROPPED}, got {dropped!r}")
    kept = e // n_group * topk_group
    if dropped == "-inf" and kept < top_k:
        raise ValueError(f"top_k: expected 1..{kept}, the experts of {topk_group} of {n_group} groups, got {top_k}")

    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    choice = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    if n_group > 1:
        grouped = choice.unflatten(1, (n_group, -1))  # [N, groups, E/groups]
        best_two = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)  # [N, groups]
        best_groups = torch.zeros_like(best_two, dtype=torch.bool)
        best_groups.scatter_(1, best_two.sort(dim=1, descending=True, stable=True).indices[:, :topk_group], True)
        others = ~best_groups[..., None].expand_as(grouped)  # [N, groups, E/groups]
        choice = grouped.masked_fill(others, 0).flatten(1)
    # A stable sort keeps the lower expert first among equals; torch.topk promises no order.
    experts = choice.sort(dim=1, descending=True, stable=True).indices
    if n_group > 1 and dropped == "-inf":  # behind all that can be chosen, also behind a choice of -inf
        last = others.flatten(1).gather(1, experts).byte().sort(dim=1, stable=True).indices
        experts = experts.gather(1, last)
    experts = experts[:, :top_k]
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights = weights * scaling
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.to(weights.dtype)[experts]
    return weights.float(), experts.int()


class MoePlan(NamedTuple):
    """The (token, choice) pairs sorted by expert, stably, so that tokens ascend within an expert.

    counts: `[E]` pairs per expert. offsets: `[E+1]` their exclusive running sum. pairs: `[N·k]`, token·k + choice.
    """

    counts: Tensor
    offsets: Tensor
    pairs: Tensor


def moe_plan(experts: Tensor, num_experts: int) -> MoePlan:
    """Sorts the pairs of `experts [N, k]` by expert, on the device.

    Raises:
        ValueError: `experts` is no integer matrix, or has numbers outside [0, num_experts).
    """
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts: expected integers [N, k], got {experts.dtype} {tuple(experts.shape)}")
    flat = experts.flatten().long()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < num_experts:
        raise ValueError(f"experts: expected 0..{num_experts - 1}, got {int(flat.min())}..{int(flat.max())}")
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).index_add_(0, flat, torch.ones_like(flat))
    return MoePlan(counts, F.pad(counts.cumsum(0), (1, 0)), flat.sort(stable=True).indices)


def _activate(up: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return up.relu().square()
    gate, value = up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu_gated" else F.gelu(gate, approximate="tanh")) * value


def feed_forward(x: Tensor, up: Tensor, down: Tensor, activation: str = "relu2") -> Tensor:
    """`down(act(up·x))`: one expert, the shared expert, a dense MLP. x `[N, H]`, up `[I or 2I, H]`, down `[H, I]`."""
    return F.linear(_activate(F.linear(x, up), activation), down)


def _check_matrices(names: str, up: Tensor, down: Tensor, x: Tensor, activation: str) -> None:
    """An expert's matrices are `[I or 2I, H]` and `[H, I]`, in the dtype of `x [N, H]`."""
    factor = 1 if activation == "relu2" else 2
    if up.dim() != 2 or down.dim() != 2 or up.shape != (factor * down.shape[1], x.shape[1]) or len(down) != x.shape[1]:
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise ValueError(
            f"{names}: expected [{'I' if factor == 1 else '2I'}, {x.shape[1]}] and its [H, I], got {shapes}"
        )
    if up.dtype != x.dtype or down.dtype != x.dtype:
        raise TypeError(f"{names}: expected {x.dtype} as x, got {up.dtype} and {down.dtype}")


def moe_experts(
    x: Tensor,
    w_up: Tensor | Sequence[Tensor],
    w_down: Tensor | Sequence[Tensor],
    weights: Tensor,
    experts: Tensor,
    *,
    plan: MoePlan | None = None,
    activation: str = "relu2",
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, summed in float32, then the shared expert.

    Args:
        x: `[N, H]`.
        w_up: `[E, I, H]` (gated: `[E, 2I, H]`, gate rows first), or a sequence of E matrices.
        w_down: `[E, H, I]`, or a sequence.
        weights, experts: `[N, k]`, from `moe_route`.
        plan: `moe_plan(experts, E)`, computed if None.
        activation: "relu2", "silu_gated" or "gelu_gated".
        shared_up, shared_down: the expert that every token passes, unweighted.

    Returns:
        `[N, H]` in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, one shared matrix without the other, experts that
            have no matrices.
        TypeError: matrices in another dtype than `x`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if (shared_up is None) != (shared_down is None):
        raise ValueError("shared_up and shared_down: expected both or neither")
    if x.dim() != 2 or weights.shape != experts.shape or weights.dim() != 2 or len(weights) != len(x):
        shapes = tuple(x.shape), tuple(weights.shape), tuple(experts.shape)
        raise ValueError(f"x, weights, experts: expected [N, H], [N, k], [N, k], got {shapes}")
    if len(w_up) != len(w_down):
        raise ValueError(f"w_up, w_down: expected a pair for every expert, got {len(w_up)} and {len(w_down)}")
    for e, (up, down) in enumerate(zip(w_up, w_down, strict=True)):
        _check_matrices(f"w_up[{e}], w_down[{e}]", up, down, x, activation)
    if shared_up is not None and shared_down is not None:
        _check_matrices("shared_up, shared_down", shared_up, shared_down, x, activation)

    plan = plan or moe_plan(experts, len(w_up))
    acc_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(x.shape, dtype=acc_dtype, device=x.device)
    top_k = experts.shape[1]
    flat_weights = weights.flatten().to(acc_dtype)
    offsets = plan.offsets.tolist()
    for e in range(len(w_up)):
        pairs = plan.pairs[offsets[e] : offsets[e + 1]]
        if len(pairs):
            tokens = pairs // top_k
            y = feed_forward(x[tokens], w_up[e], w_down[e], activation).to(acc_dtype)
            total = total.index_add(0, tokens, y * flat_weights[pairs, None])
    out = total.to(x.dtype)
    return (
        out if shared_up is None or shared_down is None else out + feed_forward(x, shared_up, shared_down, activation)
    )


_ROUTE: dict[str, dict] = {
    "one": dict(n=1, e=1, top_k=1),
    "empty": dict(n=0, e=8, top_k=2),
    "plain": dict(n=5, e=8, top_k=2, bias=False),
    "biased": dict(n=33, e=16, top_k=4, scaling=2.5),
    "softmax": dict(n=7, e=12, top_k=3, score="softmax", renormalize=False),
    "grouped": dict(n=19, e=16, top_k=4, n_group=4, topk_group=2, scaling=2.5),
    "singleton_groups": dict(n=6, e=4, top_k=2, n_group=4, topk_group=2),
    "dropped": dict(n=19, e=16, top_k=4, n_group=4, topk_group=2, dropped="-inf", bias=-1.0),
    "dropped_all_kept": dict(n=7, e=12, top_k=4, score="softmax", n_group=6, topk_group=2, dropped="-inf"),
    "scaled": dict(n=9, e=8, top_k=3, score="softmax", per_expert_scale=True),
    "all": dict(n=4, e=6, top_k=6),
    "released": dict(n=16, e=128, top_k=6, scaling=2.5),
}
_EXPERTS: dict[str, dict] = {
    "one": dict(n=1, e=1, top_k=1, h=1, i=1),
    "empty": dict(n=0, e=4, top_k=2, h=8, i=6),
    "relu2": dict(n=9, e=8, top_k=2, h=16, i=12),
    "silu_gated": dict(n=9, e=8, top_k=2, h=16, i=12, activation="silu_gated"),
    "gelu_gated": dict(n=5, e=4, top_k=3, h=7, i=5, activation="gelu_gated"),
    "shared": dict(n=17, e=8, top_k=3, h=17, i=11, shared=23),
    "idle_experts": dict(n=2, e=32, top_k=2, h=8, i=6, shared=6),
    "released": dict(n=16, e=128, top_k=6, h=2688, i=1856, shared=3712),
}
CASES: dict[str, dict[str, dict]] = {
    "moe_gate": {
        "one": dict(n=1, e=1, h=1),
        "empty": dict(n=0, e=4, h=8),
        "odd": dict(n=5, e=12, h=33),
        "prompt": dict(n=513, e=128, h=100),
        "released": dict(n=16, e=128, h=2688),
    },
    "moe_route": _ROUTE,
    "moe_plan": {name: dict(n=case["n"], e=case["e"], top_k=case["top_k"]) for name, case in _ROUTE.items()}
    | {"prompt": dict(n=1400, e=128, top_k=6)},
    "moe_experts": _EXPERTS,
}


def make_inputs(
    op: str, case: str | dict, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments for `op`; `case` is a name in `CASES[op]` or a dict of the same keys."""
    sizes = CASES[op][case] if isinstance(case, str) else case
    # Drawn on the device: the released experts' billion numbers take a processor minutes.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device).to(to)

    n, e = sizes["n"], sizes["e"]
    if op == "moe_gate":
        return dict(x=normal(n, sizes["h"]), gate_weight=normal(e, sizes["h"], to=torch.float32))
    # Router logits are float32 or float64, whatever the activations' dtype.
    logits = normal(n, e, to=torch.float32 if dtype == torch.float32 else torch.float64)
    if op == "moe_route":
        options = {k: v for k, v in sizes.items() if k not in ("n", "e", "bias", "per_expert_scale")}
        bias = sizes.get("bias", 0.0)  # False: none; a number: their mean
        bias = None if bias is False else normal(e, to=torch.float32) * 0.1 + bias
        inputs = dict(logits=logits, correction_bias=bias, **options)
        if sizes.get("per_expert_scale"):
            inputs["per_expert_scale"] = 1 + 0.3 * normal(e, to=torch.float32)
        return inputs
    weights, experts = moe_route(logits, top_k=sizes["top_k"])
    if op == "moe_plan":
        return dict(experts=experts, num_experts=e)
    h, i, shared = sizes["h"], sizes["i"], sizes.get("shared", 0)
    activation = sizes.get("activation", "relu2")
    factor = 1 if activation == "relu2" else 2
    return dict(
        x=normal(n, h),
        w_up=normal(e, factor * i, h) / h**0.5,
        w_down=normal(e, h, i) / i**0.5,
        weights=weights,
        experts=experts,
        activation=activation,
        shared_up=normal(factor * shared, h) / h**0.5 if shared else None,
        shared_down=normal(h, shared) / shared**0.5 if shared else None,
    )
