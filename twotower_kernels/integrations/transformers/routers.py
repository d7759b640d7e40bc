"""Routers of transformers over `moe_gate` and `moe_route`, each with the results that its model expects."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twotower_kernels.integrations.transformers.stand_in import near, run, stand_in
from twotower_kernels.integrations.transformers.swap import NotServed
from twotower_kernels.ops._transforms import autocasts
from twotower_kernels.ops.moe import moe_gate, moe_route

Routed = tuple[Tensor, Tensor, Tensor]  # logits [N, E], weights [N, k], experts int64 [N, k]
_PROBED, _EXACT = 40, 1e-5  # tokens; share of the largest number, in float32


# --- the routers ----------------------------------------------------------------------------------------------------
#
# Logits are those of `moe_gate`, faithful to float64, in the dtype that the original returns. The choice is made from
# the former, so it is the original's wherever rounding did not decide there.


def _softmax(self: Any, hidden_states: Tensor) -> Routed:
    """Softmax, the best, renormalized: Qwen3-MoE, OLMoE, Mixtral, Jamba and their like."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    form = _SOFTMAX[type(self).__name__]
    renormalize = getattr(self, "norm_topk_prob", form.renormalize)
    return _routed(moe_gate(x, self.weight), _dtype_of(x), form.narrow, self, score="softmax", renormalize=renormalize)


def _softmax_of_the_chosen(self: Any, hidden_states: Tensor) -> Routed:
    """The best, softmax over them alone, which is a renormalized softmax over all: gpt-oss, Granite, Aria."""
    wide = type(self).__name__ in _FLOAT_LOGITS
    logits = moe_gate(hidden_states, self.weight)
    if (bias := getattr(self, "bias", None)) is not None:
        logits = logits + bias
    scaling = 1 / self.top_k if type(self).__name__ == "OpenAIPrivacyFilterTopKRouter" else 1.0
    dtype = torch.float32 if wide else _dtype_of(hidden_states)
    logits, weights, experts = _routed(logits, dtype, not wide, self, score="softmax", scaling=scaling)
    return logits, weights.to(hidden_states.dtype) if "Granite" in type(self).__name__ else weights, experts


def _sigmoid_of_groups(self: Any, hidden_states: Tensor) -> Routed:
    """Sigmoid, chosen by score and bias within the best groups: DeepSeek-V3, GLM-4.5, Nemotron-H and their like."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    return _routed(
        moe_gate(x, self.weight),
        torch.float32,
        False,
        self,
        self.e_score_correction_bias,
        n_group=self.num_group,
        topk_group=self.topk_group,
        dropped="-inf",
        renormalize=self.norm_topk_prob,
        scaling=getattr(self, "routed_scaling_factor", 1.0),
    )


def _sigmoid_given_bias(self: Any, hidden_states: Tensor, e_score_correction_bias: Tensor) -> Routed:
    """As Hunyuan 3 has it: the layer owns the bias."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scaling = self.router_scaling_factor
    return _routed(moe_gate(x, self.weight), torch.float32, False, self, e_score_correction_bias, scaling=scaling)


def _sigmoid(self: Any, hidden_states: Tensor, e_score_correction_bias: Tensor | None = None) -> Routed:
    """Sigmoid, chosen by score and bias, divided by the sum: MiniMax M2 and M3, Step 3.7. A layer may own the bias."""
    bias = self.e_score_correction_bias if e_score_correction_bias is None else e_score_correction_bias
    x = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self.weight.dtype)
    logits, weights, experts = _routed(moe_gate(x, self.weight), _dtype_of(x), False, self, bias, renormalize=False)
    return logits, weights / weights.sum(-1, keepdim=True), experts


def _softmax_of_groups(self: Any, hidden_states: Tensor) -> Routed:
    """Softmax within the best groups, the others' choices being 0: Mistral 4 and Mistral Large 4."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    dtype = torch.float32 if type(self).__name__ in _FLOAT_LOGITS else _dtype_of(x)
    return _routed(
        moe_gate(x, self.weight),
        dtype,
        dtype != torch.float32,
        self,
        score="softmax",
        n_group=self.num_group,
        topk_group=self.topk_group,
        renormalize=getattr(self, "norm_topk_prob", True),
        scaling=self.routed_scaling_factor,
    )


def _ernie(self: Any, hidden_states: Tensor) -> Routed:
    """Softmax, chosen by score and bias, divided by a sum of at least `norm_min`: Ernie 4.5."""
    bias = self.moe_statics.e_score_correction_bias.squeeze(0)
    logits = moe_gate(hidden_states, self.weight)
    options = {"score": "softmax", "renormalize": False}
    logits, weights, experts = _routed(logits, torch.float32, False, self, bias, **options)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.norm_min)
    return logits, weights.to(hidden_states.dtype), experts


def _gemma(self: Any, hidden_states: Tensor) -> Routed:
    """A norm and a scale before the product, a scale per expert after it: Gemma 4, DiffusionGemma. What it returns for
    logits are the probabilities."""
    x = self.norm(hidden_states) * self.scale * self.scalar_root_size
    logits = moe_gate(x, self.proj.weight)
    options = {"score": "softmax", "per_expert_scale": self.per_expert_scale}
    weights, experts = moe_route(logits, top_k=self.config.top_k_experts, **options)
    return logits.softmax(-1).float(), weights, experts.long()


class _Softmax(NamedTuple):
    renormalize: bool = True
    narrow: bool = True  # weights in the dtype of the logits, not float32


_FLOAT_LOGITS = {
    *("GraniteMoeTopKRouter", "GraniteMoeSWATopKRouter", "GraniteMoeHybridTopKRouter", "GraniteMoeSharedTopKRouter"),
    *("OpenAIPrivacyFilterTopKRouter", "MistralLarge4TextTopkRouter"),
}
_SOFTMAX = {
    "FlexOlmoTopKRouter": _Softmax(),
    "JambaTopKRouter": _Softmax(renormalize=False),
    "MellumTopKRouter": _Softmax(),
    "MiniMaxTopKRouter": _Softmax(narrow=False),
    "MixtralTopKRouter": _Softmax(narrow=False),
    "OlmoeTopKRouter": _Softmax(),
    "Qwen2MoeTopKRouter": _Softmax(),
    "Qwen3MoeTopKRouter": _Softmax(),
    "Qwen3NextTopKRouter": _Softmax(),
    "Qwen3OmniMoeTalkerTextTopKRouter": _Softmax(),
    "Qwen3OmniMoeTextTopKRouter": _Softmax(),
    "Qwen3OmniMoeThinkerTextTopKRouter": _Softmax(),
    "Qwen3VLMoeTextTopKRouter": _Softmax(),
    "Qwen3_5MoeTopKRouter": _Softmax(),
    "Qwen4ExpTextTopKRouter": _Softmax(),
}
KNOWN: dict[str, Callable[..., Routed]] = {
    **dict.fromkeys(_SOFTMAX, _softmax),
    "AXK1TopkRouter": _sigmoid_of_groups,
    "AriaTextTopKRouter": _softmax_of_the_chosen,
    "BailingHybridTopkRouter": _sigmoid_of_groups,
    "BeamTopKRouter": _sigmoid_of_groups,
    "DeepseekV32TopkRouter": _sigmoid_of_groups,
    "DeepseekV3TopkRouter": _sigmoid_of_groups,
    "DiffusionGemmaTextRouter": _gemma,
    "Dots1TopkRouter": _sigmoid_of_groups,
    "Dots3NoteTextTopkRouter": _sigmoid_of_groups,
    "Dots3NoteVisionTopKRouter": _sigmoid_given_bias,
    "Ernie4_5_MoeTopKRouter": _ernie,
    "Ernie4_5_VLMoeMoeTopKRouter": _ernie,
    "ExaoneMoeTopkRouter": _sigmoid_of_groups,
    "Gemma4TextRouter": _gemma,
    "Glm4MoeLiteTopkRouter": _sigmoid_of_groups,
    "Glm4MoeTopkRouter": _sigmoid_of_groups,
    "Glm4vMoeTextTopkRouter": _sigmoid_of_groups,
    "Glm5NextTextTopkRouter": _sigmoid_of_groups,
    "GlmMoeDsaTopkRouter": _sigmoid_of_groups,
    "GptOssTopKRouter": _softmax_of_the_chosen,
    "GraniteMoeHybridTopKRouter": _softmax_of_the_chosen,
    "GraniteMoeSWATopKRouter": _softmax_of_the_chosen,
    "GraniteMoeSharedTopKRouter": _softmax_of_the_chosen,
    "GraniteMoeTopKRouter": _softmax_of_the_chosen,
    "HYV3TopKRouter": _sigmoid_given_bias,
    "HYV4TopkRouter": _sigmoid_of_groups,
    "KimiLinearTopkRouter": _sigmoid_of_groups,
    "MiMoV2FlashTopkRouter": _sigmoid_of_groups,
    "Mistral4TopkRouter": _softmax_of_groups,
    "MistralLarge4TextTopkRouter": _softmax_of_groups,
    "MiniMaxM2TopKRouter": _sigmoid,
    "MiniMaxM3VLTopKRouter": _sigmoid,
    "NemotronHTopkRouter": _sigmoid_of_groups,
    "OpenAIPrivacyFilterTopKRouter": _softmax_of_the_chosen,
    "SolarOpenTopkRouter": _sigmoid_of_groups,
    "Step3p7TopKRouter": _sigmoid,
}


def is_router(module: nn.Module) -> bool:
    return re.search(r"Router$|MoEV1Gate$|TopKGating$", type(module).__name__) is not None


def router_of(module: nn.Module) -> Callable[..., Routed]:
    """What gives the results of the module's own forward: the same dtypes and, in float32, the same numbers.

    Raises:
        NotServed: it is not known, or computes something else here.
    """
    kind = type(module).__name__
    if (forward := KNOWN.get(kind)) is None:
        raise NotServed(f"{kind} is not known")
    for dtype in (torch.float32, torch.bfloat16):
        copy = stand_in(module, dtype)
        inputs = _inputs(copy, dtype)
        wanted, found = run(kind, copy.forward, *inputs), run(kind, forward, copy, *inputs)
        if not _agree(found, wanted, values=dtype == torch.float32):
            raise NotServed(f"{kind} computes something else than the router of that name")
    return forward


# --- parts ----------------------------------------------------------------------------------------------------------


def _dtype_of(x: Tensor) -> torch.dtype:
    """That of `F.linear` of x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _routed(
    logits: Tensor, dtype: torch.dtype, narrow: bool, self: Any, bias: Tensor | None = None, **options: Any
) -> Routed:
    """The choice, with the logits in a dtype, and with `narrow` the weights too."""
    weights, experts = moe_route(logits, bias, top_k=self.top_k, **options)
    return logits.to(dtype), weights.to(dtype) if narrow else weights, experts.long()


def _inputs(copy: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    matrix = next(x for x in copy.parameters() if x.ndim == 2)  # [E, H]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(_PROBED, matrix.shape[1], generator=generator).to(dtype)]
    if len(inspect.signature(type(copy).forward).parameters) > 2:
        inputs.append(torch.rand(matrix.shape[0], generator=generator))
    return inputs


def _agree(found: Any, wanted: Any, *, values: bool) -> bool:
    if not isinstance(wanted, tuple) or len(wanted) != 3:
        return False
    if any(x.dtype != y.dtype or x.shape != y.shape for x, y in zip(found, wanted, strict=True)):
        return False
    if not values:
        return True
    ours, theirs = (
        torch.zeros_like(logits).scatter(1, experts, weights) for logits, weights, experts in (found, wanted)
    )
    return near(found[0], wanted[0], _EXACT) and near(ours, theirs, _EXACT)
