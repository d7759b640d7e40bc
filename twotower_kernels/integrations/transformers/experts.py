"""Mixtures of experts as `ExpertsInterface` asks for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from twotower_kernels.ops.moe import moe_experts

# By exact type: a subclass may compute something else.
_PLAIN: dict[type, str] = {
    activations.ReLUSquaredActivation: "relu2",
    activations.SiLUActivation: "silu",
    torch.nn.SiLU: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}
_FUNCTIONS: dict[Any, str] = {torch.nn.functional.silu: "silu", torch.nn.functional.gelu: "gelu"}  # with their defaults
_GATED = {"silu": "silu_gated", "gelu": "gelu_erf_gated", "gelu_tanh": "gelu_gated"}

# Classes whose own `_apply_gate` is the clamped one, `g·sigmoid(alpha·g)·(u + 1)`, and the names of alpha and limit.
_CLAMPED = {
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": ("alpha", "limit"),
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": ("swiglu_alpha", "swiglu_limit"),
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": (
        "alpha",
        "limit",
    ),
}


def experts(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`moe_experts` for a module of transformers; nothing is packed or copied.

    Args:
        self: the module, with `gate_up_proj` `[E, 2I, H]`, gate rows first, or without a gate `up_proj` `[E, I, H]`,
            `down_proj` `[E, H, I]`, biases where `has_bias`, and an activation that `moe_experts` has.
        hidden_states: `[N, H]`.
        top_k_index: `[N, k]`. Those outside [0, E) add nothing, as where another process has them.
        top_k_weights: `[N, k]`.

    Returns:
        `[N, H]`.

    Raises:
        NotImplementedError: another layout, activation or gate, a norm of the experts' results, quantized weights.
    """
    _refuse(self)
    activation, alpha, limit = _activation(self)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w_up, w_down = _weight(self, up), _weight(self, "down_proj")
    up_bias = _weight(self, f"{up}_bias") if self.has_bias else None
    down_bias = _weight(self, "down_proj_bias") if self.has_bias else None
    return moe_experts(
        hidden_states,
        w_up,
        w_down,
        top_k_weights,
        top_k_index,
        activation=activation,
        up_bias=up_bias,
        down_bias=down_bias,
        alpha=alpha,
        limit=limit,
    )


def _refuse(module: torch.nn.Module) -> None:
    """What would have to be packed first, or is computed otherwise."""
    kind = type(module).__name__
    for flag, served in (("is_transposed", False), ("is_concatenated", True), ("has_post_expert_norm", False)):
        if getattr(module, flag) != served:
            hint = "" if flag == "has_post_expert_norm" else "; replace(model) packs them"
            raise NotImplementedError(f"twotower experts: {flag}={not served} of {kind} is not served{hint}")


def _activation(module: torch.nn.Module) -> tuple[str, float | None, float | None]:
    """The activation of `moe_experts`, with the alpha and limit of the clamped one."""
    kind: Any = type(module)
    act = getattr(module, "act_fn", None)
    plain = _FUNCTIONS.get(act) or _PLAIN.get(type(act))
    if not module.has_gate:
        if plain is not None:
            return plain, None, None
    elif kind._apply_gate is not _default_apply_gate:
        if (names := _CLAMPED.get(f"{kind.__module__}.{kind.__qualname__}")) is None:
            raise NotImplementedError(f"twotower experts: {kind.__name__}._apply_gate is not served")
        return "clamped_gated", getattr(module, names[0]), getattr(module, names[1])
    elif plain in _GATED:
        return _GATED[plain], None, None
    raise NotImplementedError(f"twotower experts: act_fn {type(act).__name__} of {kind.__name__} is not served")


def _weight(module: torch.nn.Module, name: str) -> Tensor:
    weight = getattr(module, name)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = f"{type(module).__name__}.{name}"
        raise NotImplementedError(f"twotower experts: {kind}: expected a floating tensor, got {type(weight).__name__}")
    return weight
