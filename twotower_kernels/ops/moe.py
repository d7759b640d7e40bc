"""Mixture of experts: router, choice, plan, experts. Formulas: `reference/moe.py`; kernels: `csrc/cpu/moe_*.cpp`,
`csrc/cuda/moe_*.cu`, `triton/moe.py`."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from twotower_kernels import cpu
from twotower_kernels.ops import quantized
from twotower_kernels.ops._direct import entries
from twotower_kernels.ops._library import as_index, define
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import lowered
from twotower_kernels.ops.moe_checks import (
    ACTIVATIONS,
    check_gate,
    check_mixture,
    check_route,
    check_router,
)
from twotower_kernels.ops.moe_plans import MoePlan, empty_plan, plan_of, planned
from twotower_kernels.options.arguments import real, whole
from twotower_kernels.quantization import QuantizedTensor

SCORES = ("sigmoid", "softmax")
DROPPED = ("zero", "-inf")
ALPHA, LIMIT = 1.702, 7.0  # of clamped gates in gpt-oss


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    """Router logits `x·Wᵀ`, both factors upcast to float64: which expert is chosen must not hang on rounding.

    Source: the token-to-expert affinities of DeepSeek-V3 (arXiv 2412.19437, eq. 15), before the sigmoid.

    Args:
        x: `[N, H]`; float64, float32, bfloat16 or float16; any strides.
        gate_weight: `[E, H]`, any of these dtypes.

    Returns:
        `[N, E]` float64, under autocast too. Not differentiable.

    Raises:
        ValueError: wrong shape or device. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling() and (out := entries().moe_gate(x, gate_weight)) is not None:
        return out
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
    dropped: str = "zero",
    per_expert_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts per token by score + bias, and weighs them by their scores alone.

    Source: DeepSeek-V3 (arXiv 2412.19437, eq. 13-16 and section 2.1.2). With groups, only the `topk_group` whose two
    best choices sum highest stay. Scores are of all experts, before groups are dropped. Ties take the lowest expert,
    and the lowest group; NaN ranks highest. A softmax over the chosen logits alone, as in gpt-oss, is the softmax over
    all, renormalized.

    Args:
        logits: `[N, E]` float64, float32, bfloat16 or float16. Scores are computed in float32, those of float64 in
            float64.
        correction_bias: `[E]`, any floating dtype, or None. It takes part in the choice only.
        top_k: experts per token, 1 to E.
        score: "sigmoid" or "softmax" of the logits.
        n_group, topk_group: experts lie in `n_group` equal groups, of which `topk_group` survive.
        renormalize: divide the weights by their sum + 1e-20.
        scaling: multiplies the weights, after renormalization.
        dropped: what the choices of the other groups become. "zero": 0, as in the original of TwoTower, so that one may
            be chosen before a negative choice. "-inf": they cannot be chosen, as in transformers and LLaDA2.
        per_expert_scale: `[E]`, any floating dtype, or None. It multiplies the weight of a chosen expert, after
            renormalization and scaling (the routers of Gemma 4 and DiffusionGemma).

    Returns:
        weights `[N, top_k]` float32 and experts `[N, top_k]` int32, in descending order of choice. Not differentiable.

    Raises:
        ValueError: wrong shape or device, `top_k` or groups that do not fit E, fewer experts than `top_k` that can be
            chosen, an unknown score or `dropped`. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling():
        options = top_k, score, n_group, topk_group, renormalize, scaling, dropped
        if (chosen := entries().moe_route(logits, correction_bias, per_expert_scale, *options)) is not None:
            return chosen
    choice = _choice(top_k, score, n_group, topk_group, renormalize, scaling, dropped)
    return call("moe_route", logits, correction_bias, per_expert_scale, *choice)


def moe_router(
    x: Tensor,
    gate_weight: Tensor,
    correction_bias: Tensor | None = None,
    *,
    per_expert_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, MoePlan]:
    """`moe_gate`, `moe_route` with its options, and `moe_plan`; on a GPU the last two in one launch. Not public: it is
    the model's, and saves dispatches.

    Returns:
        weights, experts, plan.
    """
    choice = _choice(**options)
    weights, experts, *plan = call("moe_router", x, gate_weight, correction_bias, per_expert_scale, *choice)
    return weights, experts, MoePlan(*plan)


def moe_experts(
    x: Tensor,
    w_up: Tensor | QuantizedTensor,
    w_down: Tensor | QuantizedTensor,
    weights: Tensor,
    experts: Tensor,
    *,
    plan: MoePlan | None = None,
    activation: str = "relu2",
    shared_up: Tensor | QuantizedTensor | None = None,
    shared_down: Tensor | QuantizedTensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """`Σ_k weight_k · down_k(act(up_k·x))`, plus `down(act(up·x))` of the shared expert.

    Source: DeepSeekMoE (arXiv 2401.06066, eq. 9); squared ReLU: Primer (arXiv 2109.08668); GELU: arXiv 1606.08415;
    gated activations: arXiv 2002.05202; the clamped one: gpt-oss. Sums are float32 (float64 for float64); each product
    with its bias, the activation and each expert's result are rounded to the dtype of `x`, as when such models are
    trained. Experts are added in ascending order, the shared one last. A token's result does not depend on the other
    tokens. (Processors with AVX512-BF16 take subnormal bfloat16 weights for zeros.)

    Args:
        x: `[N, H]`; float64, float32, bfloat16 or float16; any strides.
        w_up: `[E, I, H]` in the dtype of `x`; for gated activations `[E, 2I, H]`, gate rows first. `pack_experts` makes
            it of other layouts; one that is interleaved, or transposed with H = I or 2I, has this shape too, and is
            misread.
        w_down: `[E, H, I]` in the dtype of `x`.
        weights: `[N, k]`, any floating dtype.
        experts: `[N, k]` integers. Those outside [0, E) add nothing, as where another process has them. Weights of
            experts that no token chose are not read.
        plan: `moe_plan(experts, E)`, where several calls share it; computed if None. A CPU checks that it is that plan.
        activation: of one product u: "relu2" `relu(u)²`, "silu", "gelu" (by erf) or "gelu_tanh"; of a gate g and a
            value u: "silu_gated" `SiLU(g)·u`, "gelu_gated" `gelu(g)·u` with the tanh form, "gelu_erf_gated" with erf,
            or "clamped_gated" `g'·sigmoid(alpha·g')·(u' + 1)` with `g' = min(g, limit)`, u' = u within ±limit.
        shared_up, shared_down: `[J, H]` (gated: `[2J, H]`) and `[H, J]`, the expert that every token passes,
            unweighted; or both None.
        up_bias, down_bias: `[E, I]` (gated: `[E, 2I]`) and `[E, H]` in the dtype of `x`, added to the products of the
            routed experts; or None.
        alpha, limit: of "clamped_gated", 1.702 and 7 if None, as in gpt-oss.

    Matrices may be quantized (`tt.quantize`), `w_up` and `w_down` in one format, the shared ones in one: their codes
    are read as they are stored, and what is multiplied is what `dequantize` gives, exactly.

    Under autocast, x, the matrices and the biases are cast as by `F.linear`, and the weights are not.

    Returns:
        `[N, H]` in the dtype of `x`. Not differentiable.

    Raises:
        ValueError: wrong shape or device, an unknown activation, alpha or limit for another one, one shared matrix
            without the other; on a CPU another plan, which a GPU does not wait to look at. TypeError: wrong dtype.
            NotImplementedError: float64 on a GPU, quantized matrices there.
    """
    if activation != "clamped_gated" and not (alpha is None and limit is None):
        raise ValueError(f"alpha and limit: expected None for activation {activation!r}, got {alpha} and {limit}")
    alpha = ALPHA if alpha is None else real("alpha", alpha)
    limit = LIMIT if limit is None else real("limit", limit)
    if any(isinstance(matrix, QuantizedTensor) for matrix in (w_up, w_down, shared_up, shared_down)):
        pairs_of = (shared_up, shared_down, up_bias, down_bias)
        return quantized.moe_experts(x, w_up, w_down, weights, experts, plan, *pairs_of, activation, alpha, limit)
    x, w_up, w_down, *others = lowered(x, w_up, w_down, shared_up, shared_down, up_bias, down_bias)
    counts, offsets, pairs = plan or (None, None, None)
    return call(
        "moe_experts",
        *(x, w_up, w_down, weights, as_index(experts), counts, offsets, pairs, *others, activation, alpha, limit),
    )


def _choice(
    top_k: int,
    score: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
    dropped: str = "zero",
) -> tuple[int, bool, int, int, bool, float, bool]:
    """The options of `moe_route` as the operators take them."""
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    top_k, n_group = whole("top_k", top_k), whole("n_group", n_group)
    topk_group, scaling = whole("topk_group", topk_group), real("scaling", scaling)
    if dropped not in DROPPED:
        raise ValueError(f"dropped: expected one of {DROPPED}, got {dropped!r}")
    return top_k, score == "softmax", n_group, topk_group, renormalize, scaling, dropped == "-inf"


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


def _route(
    logits: Tensor, correction_bias: Tensor | None, per_expert_scale: Tensor | None, top_k: int, *options: Any
) -> tuple[Tensor, Tensor]:
    weights, experts = empty_choice(logits, top_k)
    cpu.call("moe_route", logits, correction_bias, per_expert_scale, weights, experts, *options)
    return weights, experts


def _router(x: Tensor, gate_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, experts = _route(_gate(x, gate_weight), *arguments)
    return weights, experts, *plan_of(experts, len(gate_weight))


def _empty_router(
    x: Tensor,
    gate_weight: Tensor,
    correction_bias: Tensor | None,
    per_expert_scale: Tensor | None,
    top_k: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, experts = empty_choice(x, top_k)
    return weights, experts, *empty_plan(experts, gate_weight.shape[0])


def _experts(*arguments: Any) -> Tensor:
    x, w_up, w_down, weights, experts, counts, offsets, pairs, *others, activation, alpha, limit = arguments
    offsets, pairs = planned(experts, counts, offsets, pairs, w_up.shape[0])
    out = x.new_empty(x.shape)
    total = out if x.dtype in (torch.float32, torch.float64) else x.new_empty(x.shape, dtype=torch.float32)
    options = ACTIVATIONS.index(activation), alpha, limit
    cpu.call("moe_experts", x, w_up, w_down, weights, offsets, pairs, *others, total, out, *options)
    return out


def _lowered_experts(x: Tensor, w_up: Tensor, w_down: Tensor, *arguments: Any) -> tuple[Any, ...]:
    choice, others, options = arguments[:5], arguments[5:9], arguments[9:]
    x, w_up, w_down, *cast = lowered(x, w_up, w_down, *others)
    return x, w_up, w_down, *choice, *cast, *options


define(
    "moe_gate(Tensor x, Tensor gate_weight) -> Tensor",
    check=check_gate,
    cpu=_gate,
    cuda="cuda.moe:moe_gate",
    fake=empty_logits,
)
define(
    "moe_route(Tensor logits, Tensor? correction_bias, Tensor? per_expert_scale, SymInt top_k, bool softmax, "
    "SymInt n_group, SymInt topk_group, bool renormalize, float scaling, bool exclude_dropped) -> (Tensor, Tensor)",
    check=check_route,
    cpu=_route,
    cuda="cuda.moe:moe_route",
    fake=lambda logits, correction_bias, per_expert_scale, top_k, *_: empty_choice(logits, top_k),
)
define(
    "moe_router(Tensor x, Tensor gate_weight, Tensor? correction_bias, Tensor? per_expert_scale, SymInt top_k, "
    "bool softmax, SymInt n_group, SymInt topk_group, bool renormalize, float scaling, bool exclude_dropped) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check_router,
    cpu=_router,
    cuda="cuda.moe:moe_router",
    fake=_empty_router,
)
define(
    "moe_experts(Tensor x, Tensor w_up, Tensor w_down, Tensor weights, Tensor experts, Tensor? counts, "
    "Tensor? offsets, Tensor? pairs, Tensor? shared_up, Tensor? shared_down, Tensor? up_bias, Tensor? down_bias, "
    "str activation, float alpha, float limit) -> Tensor",
    check=check_mixture,
    cpu=_experts,
    cuda="triton.moe:moe_experts",
    fake=lambda x, *_: x.new_empty(x.shape),
    autocast=_lowered_experts,
)
