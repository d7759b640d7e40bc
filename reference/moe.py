"""Mixture of experts: router, routing, plan, experts.

    logits   = x·Wᵀ in float64                                     (`moe_gate`: selection must not hang on rounding)
    s        = sigmoid(logits) or softmax(logits)
    choice   = s + correction_bias; with groups, only the `topk_group` groups whose two best choices sum highest stay:
               the choices of the others count as 0, or cannot be taken
    experts  = the top_k of choice; weights = their s, / (Σ + 1e-20) if renormalized, · scaling, · per_expert_scale of
               the expert                                                                           (`moe_route`)
    y        = Σ_k weight_k · down_k(act(up_k·x)) [+ down(act(up·x)) of the shared expert]          (`moe_experts`)

Routing with bias and groups: DeepSeek-V3 (arXiv 2412.19437, eq. 12-16). Activations of u, or of g and u with
`w_up = [g rows; u rows]`:

    relu2      relu(u)² (Primer, arXiv 2109.08668)        silu_gated      SiLU(g)·u (GLU variants, arXiv 2002.05202)
    silu       SiLU(u)                                    gelu_gated      gelu(g)·u, the tanh form
    gelu       gelu(u), by erf (arXiv 1606.08415)         gelu_erf_gated  gelu(g)·u, by erf
    gelu_tanh  gelu(u), the tanh form                     clamped_gated   g'·sigmoid(α·g')·(u' + 1) (gpt-oss)

with g' = min(g, limit) and u' = u clamped to [-limit, limit].
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_gelu_tanh = partial(F.gelu, approximate="tanh")
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda u: u.relu().square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_gated": F.silu,
    "gelu_gated": _gelu_tanh,
    "gelu_erf_gated": F.gelu,
}
ACTIVATIONS = (*PLAIN, *GATES, "clamped_gated")
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss
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

    counts: `[E]` pairs per expert. offsets: `[E+1]` their exclusive running sum. pairs: `[N·k]`, token·k + choice;
    behind the last offset those of experts outside [0, E), which belong to nobody here.
    """

    counts: Tensor
    offsets: Tensor
    pairs: Tensor


def moe_plan(experts: Tensor, num_experts: int) -> MoePlan:
    """Sorts the pairs of `experts [N, k]` by expert, on the device.

    Raises:
        ValueError: `experts` is no integer matrix.
    """
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts: expected integers [N, k], got {experts.dtype} {tuple(experts.shape)}")
    flat = experts.flatten().long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # what is nobody's comes last
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts = counts.index_add_(0, flat, torch.ones_like(flat))[:num_experts]
    return MoePlan(counts, F.pad(counts.cumsum(0), (1, 0)), flat.sort(stable=True).indices)


def activate(up: Tensor, activation: str, alpha: float = ALPHA, limit: float = LIMIT) -> Tensor:
    """The activation of products `[..., I or 2I]`, each of its operations rounded to their dtype."""
    if activation in PLAIN:
        return PLAIN[activation](up)
    gate, value = up.chunk(2, -1)
    if activation in GATES:
        return GATES[activation](gate) * value
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * (alpha * wide).sigmoid()).to(gate.dtype) * (value + 1)


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "relu2",
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = ALPHA,
    limit: float = LIMIT,
) -> Tensor:
    """`down(act(up·x))`: one expert, the shared expert, a dense MLP. x `[N, H]`, up `[I or 2I, H]`, down `[H, I]`."""
    return F.linear(activate(F.linear(x, up, up_bias), activation, alpha, limit), down, down_bias)


def _check_matrices(names: str, up: Tensor, down: Tensor, x: Tensor, activation: str) -> None:
    """An expert's matrices are `[I or 2I, H]` and `[H, I]`, in the dtype of `x [N, H]`."""
    factor = 1 if activation in PLAIN else 2
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
    up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
    alpha: float = ALPHA,
    limit: float = LIMIT,
) -> Tensor:
    """The weighted sum of each token's experts, summed in float32, then the shared expert.

    Args:
        x: `[N, H]`.
        w_up: `[E, I, H]` (gated: `[E, 2I, H]`, gate rows first), or a sequence of E matrices.
        w_down: `[E, H, I]`, or a sequence.
        weights, experts: `[N, k]`, from `moe_route`. An expert outside [0, E) adds nothing.
        plan: `moe_plan(experts, E)`, computed if None.
        activation: one of `ACTIVATIONS`.
        shared_up, shared_down: the expert that every token passes, unweighted.
        up_bias, down_bias: `[E, I or 2I]` and `[E, H]`, added to the experts' products; or None.
        alpha, limit: of "clamped_gated".

    Returns:
        `[N, H]` in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, one shared matrix without the other.
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

    if up_bias is not None and [b.shape for b in up_bias] != [up.shape[:1] for up in w_up]:
        raise ValueError(f"up_bias: expected a vector for every expert's rows, got {[tuple(b.shape) for b in up_bias]}")
    if down_bias is not None and [b.shape for b in down_bias] != [down.shape[:1] for down in w_down]:
        shapes = [tuple(b.shape) for b in down_bias]
        raise ValueError(f"down_bias: expected [{x.shape[1]}] for every expert, got {shapes}")

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
            y = feed_forward(
                x[tokens],
                w_up[e],
                w_down[e],
                activation,
                up_bias=None if up_bias is None else up_bias[e],
                down_bias=None if down_bias is None else down_bias[e],
                alpha=alpha,
                limit=limit,
            )
            total = total.index_add(0, tokens, y.to(acc_dtype) * flat_weights[pairs, None])
    out = total.to(x.dtype)
    if shared_up is None or shared_down is None:
        return out
    return out + feed_forward(x, shared_up, shared_down, activation, alpha=alpha, limit=limit)


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
    "silu": dict(n=9, e=8, top_k=2, h=16, i=12, activation="silu"),
    "gelu_biased": dict(n=6, e=4, top_k=2, h=19, i=21, activation="gelu", biased=True, shared=5),
    "gelu_tanh": dict(n=4, e=3, top_k=2, h=9, i=6, activation="gelu_tanh"),
    "gelu_erf_gated": dict(n=5, e=4, top_k=3, h=16, i=20, activation="gelu_erf_gated"),
    "clamped_gated": dict(n=7, e=6, top_k=3, h=33, i=19, activation="clamped_gated", limit=0.7, biased=True),
    "not_mine": dict(n=17, e=5, of=12, top_k=3, h=10, i=7, activation="silu_gated", shared=4, biased=True),
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
    # Router logits are float32 or float64, whatever the activations' dtype. `of`: so many experts, some not here.
    logits = normal(n, sizes.get("of", e), to=torch.float32 if dtype == torch.float32 else torch.float64)
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
    factor = 1 if activation in PLAIN else 2
    inputs = dict(
        x=normal(n, h),
        w_up=normal(e, factor * i, h) / h**0.5,
        w_down=normal(e, h, i) / i**0.5,
        weights=weights,
        experts=experts,
        activation=activation,
        shared_up=normal(factor * shared, h) / h**0.5 if shared else None,
        shared_down=normal(h, shared) / shared**0.5 if shared else None,
    )
    if sizes.get("biased"):
        inputs |= dict(up_bias=normal(e, factor * i), down_bias=normal(e, h))
    return inputs | {name: sizes[name] for name in ("alpha", "limit") if name in sizes}
