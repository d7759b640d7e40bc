"""Mixture of experts: router, choice, plan, experts. Formulas: `reference/moe.py`; kernels: `csrc/cpu/moe_*.cpp`,
`csrc/cuda/moe_*.cu`, `triton/moe.py`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from twotower_kernels import cpu
from twotower_kernels.ops._direct import entries
from twotower_kernels.ops._library import (
    as_index,
    check_alike,
    check_float,
    check_floats,
    check_index,
    define,
    refuse_gradients,
    same_device,
)
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import cast_to, lowered
from twotower_kernels.options.arguments import real, whole

ACTIVATIONS = ("relu2", "silu_gated", "gelu_gated")  # the order of Activation in csrc/cpu/moe.h
SCORES = ("sigmoid", "softmax")


class MoePlan(NamedTuple):
    """The (token, choice) pairs sorted by expert, stably, so that tokens ascend within an expert. All int64.

    counts: `[E]` pairs per expert. offsets: `[E+1]` their exclusive running sum. pairs: `[N·k]`, token·k + choice.
    """

    counts: Tensor
    offsets: Tensor
    pairs: Tensor


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    """Router logits `x·Wᵀ`, both factors upcast to float64: which expert is chosen must not hang on rounding.

    Source: the token-to-expert affinities of DeepSeek-V3 (arXiv 2412.19437, eq. 15), before the sigmoid.

    Args:
        x: `[N, H]`; float64, float32, bfloat16 or float16; any strides.
        gate_weight: `[E, H]`, any of these dtypes.

    Returns:
        `[N, E]` float64, under autocast too. Not differentiable.

    Raises:
        ValueError: wrong shape or device, an argument that requires grad. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling() and (out := entries().moe_gate(x, gate_weight)) is not None:
        return out
    refuse_gradients("moe_gate", x=x, gate_weight=gate_weight)
    return call("moe_gate", x, gate_weight)


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
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts per token by score + bias, and weighs them by their scores alone.

    Source: DeepSeek-V3 (arXiv 2412.19437, eq. 13-16 and section 2.1.2). With groups, only the `topk_group` whose two
    best choices sum highest stay; the choices of the others count as 0. Ties take the lowest expert, and the lowest
    group; NaN ranks highest.

    Args:
        logits: `[N, E]` float64 or float32; scores are computed in that precision. Under autocast, narrower ones are
            widened to float32.
        correction_bias: `[E]`, any floating dtype, or None. It takes part in the choice only.
        top_k: experts per token, 1 to E.
        score: "sigmoid" or "softmax" of the logits.
        n_group, topk_group: experts lie in `n_group` equal groups, of which `topk_group` survive.
        renormalize: divide the weights by their sum + 1e-20.
        scaling: multiplies the weights, after renormalization.

    Returns:
        weights `[N, top_k]` float32 and experts `[N, top_k]` int32, in descending order of choice. Not differentiable.

    Raises:
        ValueError: wrong shape or device, `top_k` or groups that do not fit E, an unknown score, an argument that
            requires grad. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling():
        options = top_k, score, n_group, topk_group, renormalize, scaling
        if (chosen := entries().moe_route(logits, correction_bias, *options)) is not None:
            return chosen
    (logits,) = cast_to(torch.float32, logits)
    choice = _choice(top_k, score, n_group, topk_group, renormalize, scaling)
    refuse_gradients("moe_route", logits=logits, correction_bias=correction_bias)
    return call("moe_route", logits, correction_bias, *choice)


def moe_router(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, MoePlan]:
    """`moe_gate`, `moe_route` with its options, and `moe_plan`; on a GPU the last two in one launch. Not public: it is
    the model's, and saves dispatches.

    Returns:
        weights, experts, plan.
    """
    choice = _choice(**options)
    refuse_gradients("moe_router", x=x, gate_weight=gate_weight, correction_bias=correction_bias)
    weights, experts, *plan = call("moe_router", x, gate_weight, correction_bias, *choice)
    return weights, experts, MoePlan(*plan)


def moe_plan(experts: Tensor, num_experts: int) -> MoePlan:
    """Sorts the (token, choice) pairs by expert, so that an expert's weights are read once for all its tokens.

    Source: the block-sparse grouping of MegaBlocks (arXiv 2211.15841), without its padding.

    Args:
        experts: `[N, k]` integers, from `moe_route`.
        num_experts: E.

    Returns:
        counts `[E]`, offsets `[E+1]`, pairs `[N·k]`; int64, on the device of `experts`. Not differentiable.

    Raises:
        ValueError: wrong shape, on a CPU experts outside `[0, E)`, which a GPU leaves out. TypeError: wrong dtype.
    """
    return MoePlan(*call("moe_plan", as_index(experts), whole("num_experts", num_experts)))


def moe_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    plan: MoePlan | None = None,
    activation: str = "relu2",
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """`Σ_k weight_k · down_k(act(up_k·x))`, plus `down(act(up·x))` of the shared expert.

    Source: DeepSeekMoE (arXiv 2401.06066, eq. 9); squared ReLU: Primer (arXiv 2109.08668); gated activations:
    arXiv 2002.05202. Sums are float32 (float64 for float64); each product, the activation and each expert's result are
    rounded to the dtype of `x`, as when such models are trained. Experts are added in ascending order, the shared one
    last. A token's result does not depend on the other tokens. (Processors with AVX512-BF16 take subnormal bfloat16
    weights for zeros.)

    Args:
        x: `[N, H]`; float64, float32, bfloat16 or float16; any strides.
        w_up: `[E, I, H]` in the dtype of `x`; for gated activations `[E, 2I, H]`, gate rows first.
        w_down: `[E, H, I]` in the dtype of `x`.
        weights: `[N, k]`, any floating dtype.
        experts: `[N, k]` integers. Weights of experts that no token chose are not read.
        plan: `moe_plan(experts, E)`, where several calls share it; computed if None. A CPU checks that it is that plan.
        activation: "relu2" `relu(u)²`, "silu_gated" `SiLU(g)·u` or "gelu_gated" `gelu(g)·u` with the tanh form.
        shared_up, shared_down: `[J, H]` (gated: `[2J, H]`) and `[H, J]`, the expert that every token passes,
            unweighted; or both None.

    Under autocast, x and the matrices are cast as by `F.linear`, and the weights are not.

    Returns:
        `[N, H]` in the dtype of `x`. Not differentiable.

    Raises:
        ValueError: wrong shape or device, an unknown activation, one shared matrix without the other, an argument that
            requires grad; on a CPU experts outside `[0, E)` and another plan. A GPU does not wait to look at them: a
            token with such an expert becomes NaN. TypeError: wrong dtype. NotImplementedError: float64 on a GPU.
    """
    x, w_up, w_down, shared_up, shared_down = lowered(x, w_up, w_down, shared_up, shared_down)
    refuse_gradients(
        "moe_experts", x=x, w_up=w_up, w_down=w_down, shared_up=shared_up, shared_down=shared_down, weights=weights
    )
    counts, offsets, pairs = plan or (None, None, None)
    return call(
        "moe_experts",
        x,
        w_up,
        w_down,
        weights,
        as_index(experts),
        counts,
        offsets,
        pairs,
        shared_up,
        shared_down,
        activation,
    )


def _choice(
    top_k: int,
    score: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
) -> tuple[int, bool, int, int, bool, float]:
    """The options of `moe_route` as the operators take them."""
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    top_k, n_group = whole("top_k", top_k), whole("n_group", n_group)
    topk_group, scaling = whole("topk_group", topk_group), real("scaling", scaling)
    return top_k, score == "softmax", n_group, topk_group, renormalize, scaling


# --- what the operators accept ---------------------------------------------------------------------------------------


def _check_gate(x: Tensor, gate_weight: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, H], got {list(x.shape)}")
    if gate_weight.ndim != 2 or gate_weight.shape[1] != x.shape[1]:
        raise ValueError(f"gate_weight: expected [E, {x.shape[1]}], got {list(gate_weight.shape)}")
    check_floats(x, x=x, gate_weight=gate_weight)


def _check_choice(
    e: int, correction_bias: Tensor | None, top_k: int, softmax: bool, n_group: int, topk_group: int, *_: Any
) -> None:
    if n_group < 1 or e % n_group:
        raise ValueError(f"n_group: expected a divisor of {e} experts, got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: expected 1..{n_group} for {n_group} groups, got {topk_group}")
    if not 1 <= top_k <= e:
        raise ValueError(f"top_k: expected 1..{e} for {e} experts, got {top_k}")
    if correction_bias is not None and correction_bias.shape != (e,):
        raise ValueError(f"correction_bias: expected shape {[e]}, got {list(correction_bias.shape)}")
    check_float(correction_bias=correction_bias)


def _check_route(logits: Tensor, correction_bias: Tensor | None, *options: Any) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [N, E], got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits: expected float32 or float64, got {logits.dtype}")
    _check_choice(logits.shape[1], correction_bias, *options)
    same_device(logits, correction_bias=correction_bias)


def _check_router(x: Tensor, gate_weight: Tensor, correction_bias: Tensor | None, *options: Any) -> None:
    _check_gate(x, gate_weight)
    _check_choice(gate_weight.shape[0], correction_bias, *options)
    same_device(x, correction_bias=correction_bias)


def _check_experts(experts: Tensor) -> None:
    if experts.ndim != 2:
        raise ValueError(f"experts: expected [N, k], got {list(experts.shape)}")
    check_index(experts=experts)


def _check_number(experts: Tensor, num_experts: int) -> None:
    _check_experts(experts)
    if num_experts < 0:
        raise ValueError(f"num_experts: expected 0 or more, got {num_experts}")


def _check_matrices(up: tuple[str, Tensor], down: tuple[str, Tensor], stack: str, h: int, activation: str) -> None:
    """`up` is `[..., I or 2I, H]` and `down` `[..., H, I]`, stacked over experts or single."""
    (up_name, w_up), (down_name, w_down) = up, down
    factor = 1 if activation == "relu2" else 2
    ndim = 3 if stack else 2
    if w_up.ndim != ndim or w_up.shape[-1] != h:
        raise ValueError(f"{up_name}: expected [{stack}{'I' if factor == 1 else '2I'}, {h}], got {list(w_up.shape)}")
    if w_down.ndim != ndim or w_down.shape[-2] != h:
        raise ValueError(f"{down_name}: expected [{stack}{h}, I], got {list(w_down.shape)}")
    if w_up.shape[:-1] != (*w_down.shape[:-2], factor * w_down.shape[-1]):
        fits = [*w_down.shape[:-2], factor * w_down.shape[-1], h]
        raise ValueError(f"{up_name}: expected {fits} for {down_name} {list(w_down.shape)}, got {list(w_up.shape)}")


def _check_plan(counts: Tensor | None, offsets: Tensor | None, pairs: Tensor | None, e: int, experts: Tensor) -> None:
    sizes = {"counts": (counts, e), "offsets": (offsets, e + 1), "pairs": (pairs, experts.numel())}
    if counts is None and offsets is None and pairs is None:
        return
    for name, (tensor, size) in sizes.items():
        if tensor is None:
            raise ValueError(f"plan.{name}: expected all three tensors of a plan or none, got None")
        if tensor.shape != (size,):
            raise ValueError(f"plan.{name}: expected shape {[size]}, got {list(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise TypeError(f"plan.{name}: expected torch.int64, got {tensor.dtype}")
    same_device(experts, counts=counts, offsets=offsets, pairs=pairs)


def _check_mixture(*arguments: Any) -> None:
    """Arguments in the order of the schema, here and in the kernels."""
    x, w_up, w_down, weights, experts, counts, offsets, pairs, shared_up, shared_down, activation = arguments
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, H], got {list(x.shape)}")
    _check_experts(experts)
    if experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts: expected [{x.shape[0]}, k] for {x.shape[0]} tokens, got {list(experts.shape)}")
    if weights.shape != experts.shape:
        raise ValueError(f"weights: expected the experts' shape {list(experts.shape)}, got {list(weights.shape)}")
    _check_matrices(("w_up", w_up), ("w_down", w_down), "E, ", x.shape[1], activation)
    if (shared_up is None) != (shared_down is None):
        raise ValueError("shared_up and shared_down: expected both or neither, got one")
    if shared_up is not None and shared_down is not None:
        _check_matrices(("shared_up", shared_up), ("shared_down", shared_down), "", x.shape[1], activation)
    check_alike("x", x, w_up=w_up, w_down=w_down, shared_up=shared_up, shared_down=shared_down)
    check_floats(x, weights=weights)
    _check_plan(counts, offsets, pairs, w_up.shape[0], experts)
    same_device(x, experts=experts)


# --- registration ---------------------------------------------------------------------------------------------------


def empty_logits(x: Tensor, gate_weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], gate_weight.shape[0]), dtype=torch.float64)


def _gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    logits = empty_logits(x, gate_weight)
    cpu.call("moe_gate", x, gate_weight, logits)
    return logits


def empty_choice(tokens: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (tokens.shape[0], top_k)
    return tokens.new_empty(shape, dtype=torch.float32), tokens.new_empty(shape, dtype=torch.int32)


def _route(logits: Tensor, correction_bias: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, Tensor]:
    weights, experts = empty_choice(logits, top_k)
    cpu.call("moe_route", logits, correction_bias, weights, experts, *options)
    return weights, experts


def empty_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    new, pairs = experts.new_empty, experts.shape[0] * experts.shape[1]
    return new(num_experts, dtype=torch.int64), new(num_experts + 1, dtype=torch.int64), new(pairs, dtype=torch.int64)


def _plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if experts.numel():
        low, high = (int(bound) for bound in experts.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"experts: expected 0..{num_experts - 1} for {num_experts} experts, got {low}..{high}")
    return _plan_in_bounds(experts, num_experts)


def _plan_in_bounds(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    plan = empty_plan(experts, num_experts)
    cpu.call("moe_plan", experts, *plan)
    return plan


def _router(x: Tensor, gate_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, experts = _route(_gate(x, gate_weight), *arguments)
    return weights, experts, *_plan_in_bounds(experts, len(gate_weight))


def _empty_router(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor | None, top_k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, experts = empty_choice(x, top_k)
    return weights, experts, *empty_plan(experts, gate_weight.shape[0])


def _experts(*arguments: Any) -> Tensor:
    x, w_up, w_down, weights, experts, counts, offsets, pairs, shared_up, shared_down, activation = arguments
    if counts is None or offsets is None or pairs is None:
        counts, offsets, pairs = _plan(experts, w_up.shape[0])
    elif not cpu.call("moe_plan_holds", experts, counts, offsets, pairs):
        # A plan of other experts, or one with numbers out of bounds, is an error here and not a wrong result.
        raise ValueError("plan: expected moe_plan(experts, E) of these experts, got another")
    out = x.new_empty(x.shape)
    total = out if x.dtype in (torch.float32, torch.float64) else x.new_empty(x.shape, dtype=torch.float32)
    number = ACTIVATIONS.index(activation)
    cpu.call("moe_experts", x, w_up, w_down, weights, offsets, pairs, shared_up, shared_down, total, out, number)
    return out


def _lowered_experts(x: Tensor, w_up: Tensor, w_down: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *choice, shared_up, shared_down, activation = arguments
    x, w_up, w_down, shared_up, shared_down = lowered(x, w_up, w_down, shared_up, shared_down)
    return x, w_up, w_down, *choice, shared_up, shared_down, activation


define(
    "moe_gate(Tensor x, Tensor gate_weight) -> Tensor",
    check=_check_gate,
    cpu=_gate,
    cuda="cuda.moe:moe_gate",
    fake=empty_logits,
)
define(
    "moe_route(Tensor logits, Tensor? correction_bias, SymInt top_k, bool softmax, SymInt n_group, SymInt topk_group, "
    "bool renormalize, float scaling) -> (Tensor, Tensor)",
    check=_check_route,
    cpu=_route,
    cuda="cuda.moe:moe_route",
    fake=lambda logits, correction_bias, top_k, *_: empty_choice(logits, top_k),
    autocast=lambda logits, *choice: (*cast_to(torch.float32, logits), *choice),
)
define(
    "moe_plan(Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)",
    check=_check_number,
    cpu=_plan,
    cuda="cuda.moe:moe_plan",
    fake=empty_plan,
)
define(
    "moe_router(Tensor x, Tensor gate_weight, Tensor? correction_bias, SymInt top_k, bool softmax, SymInt n_group, "
    "SymInt topk_group, bool renormalize, float scaling) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_router,
    cpu=_router,
    cuda="cuda.moe:moe_router",
    fake=_empty_router,
)
define(
    "moe_experts(Tensor x, Tensor w_up, Tensor w_down, Tensor weights, Tensor experts, Tensor? counts, "
    "Tensor? offsets, Tensor? pairs, Tensor? shared_up, Tensor? shared_down, str activation) -> Tensor",
    check=_check_mixture,
    cpu=_experts,
    cuda="triton.moe:moe_experts",
    fake=lambda x, *_: x.new_empty(x.shape),
    autocast=_lowered_experts,
)
