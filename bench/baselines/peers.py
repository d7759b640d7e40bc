"""Baselines that nobody here wrote: modules of transformers, mamba_ssm's programs, kernels of PyTorch and others.

A function here takes an operation's arguments and returns a program without arguments, so that a module is made once
and holds the case's own tensors. That happens when the program is first called: what is not installed raises
ImportError there, and is listed as skipped. Those of `ON_GPU` have not been run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Program = Callable[[], Any]


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# --- attention --------------------------------------------------------------------------------------------------------


def _together(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor | None, v_context: Tensor | None
) -> tuple[Tensor, ...]:
    """q, k, v [B, heads, tokens, head_dim], the block appended to its context by a copy, as the model needs it."""
    if k_context is not None and v_context is not None:
        k, v = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def transformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    causal: bool = False,
) -> Program:
    """What `attn_implementation="sdpa"` computes."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], is_causal=causal)
    return lambda: sdpa_attention_forward(layer, *_together(q, k, v, k_context, v_context), attention_mask=None)[0]


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    causal: bool = False,
) -> Program:
    """FlexAttention (arXiv 2412.05496), compiled for these sizes."""
    from torch.nn.attention import flex_attention as flex

    if q.is_cuda and len(q) > 1:
        raise NotImplementedError("FlexAttention is compiled at batch 1 alone: every shape takes ten seconds")
    mask = None
    if causal:
        seen = lambda batch, head, query, key: query >= key  # noqa: E731
        mask = flex.create_block_mask(seen, None, None, q.shape[1], k.shape[1], device=q.device)
    torch.compiler.reset()  # what was compiled for other sizes counts against a limit, past which it is not compiled
    attend = torch.compile(flex.flex_attention, dynamic=False)
    options = dict(block_mask=mask, enable_gqa=True)
    return lambda: attend(*_together(q, k, v, k_context, v_context), **options).transpose(1, 2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    causal: bool = False,
) -> Program:
    """FlashAttention-2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    def call() -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in _together(q, k, v, k_context, v_context)), causal=causal)

    return call


# --- Mamba-2 ----------------------------------------------------------------------------------------------------------


def transformers_gated_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Program:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    norm = NemotronHRMSNormGated(len(weight), len(weight) // n_groups, eps=eps)
    norm.weight = _parameter(weight)
    return lambda: norm(y, z)


def mamba_ssm_gated_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Program:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return lambda: rmsnorm_fn(y, weight, None, z, eps, len(weight) // n_groups, norm_before_gate=False)


def _convolved(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, L, heads, head_dim], B and C [B, L, groups, state], by PyTorch's convolution; the last inputs."""
    inner = a.dt.shape[-1] * a.head_dim
    state = (a.xbc.shape[-1] - inner) // 2
    columns = torch.cat([a.conv_state, a.xbc.transpose(1, 2)], -1)
    u = F.silu(F.conv1d(columns, a.conv_weight[:, None], a.conv_bias, groups=a.xbc.shape[-1])).transpose(1, 2)
    x, b, c = u.split([inner, state, state], -1)
    b, c = (m.unflatten(-1, (a.n_groups, -1)) for m in (b, c))
    return x.unflatten(-1, (-1, a.head_dim)), b, c, columns[..., a.xbc.shape[1] :]


def mamba_ssm_scan(**inputs: Any) -> Program:
    """mamba_ssm's chunked scan."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    a = SimpleNamespace(**inputs)
    options: dict[str, Any] = dict(chunk_size=256, D=a.d, dt_bias=a.dt_bias, dt_softplus=True)
    options |= dict(dt_limit=a.time_step_limit, initial_states=a.ssm_state, return_final_states=a.return_states)

    def call() -> Any:
        x, b, c, last = _convolved(a)
        found = mamba_chunk_scan_combined(x, a.dt, -a.a_log.exp(), b, c, **options)
        return (found[0].flatten(2), last, found[1]) if a.return_states else found.flatten(2)

    return call


def mamba_ssm_minimal(**inputs: Any) -> Program:
    """Mamba-2's listing 1 (arXiv 2405.21060), as mamba_ssm keeps it, in chunks of 64 tokens where they divide them."""
    from twotower_kernels.bench.baselines.foreign import mamba_ssm  # imported without its CUDA extension

    a = SimpleNamespace(**inputs)
    chunk = a.xbc.shape[1] if a.xbc.shape[1] % 64 else 64

    def call() -> Any:
        x, b, c, last = _convolved(a)
        x, delta = x.float(), F.softplus(a.dt.float() + a.dt_bias).clamp(*a.time_step_limit)
        b, c = (m.float().repeat_interleave(a.dt.shape[-1] // a.n_groups, 2) for m in (b, c))
        steps = x * delta[..., None], -a.a_log.exp() * delta, b, c
        y, state = mamba_ssm.ssd_minimal(*steps, chunk, initial_states=a.ssm_state[:, None])
        y = (y + a.d[:, None] * x).flatten(2).to(a.xbc.dtype)
        return (y, last, state) if a.return_states else y

    return call


# --- mixture of experts -----------------------------------------------------------------------------------------------


def transformers_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    implementation: str,
) -> Program:
    """NemotronHExperts, and NemotronHMLP for the shared expert."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts, NemotronHMLP

    sizes: dict[str, int] = dict(
        hidden_size=x.shape[1], n_routed_experts=len(w_up), moe_intermediate_size=w_up.shape[1]
    )
    config = NemotronHConfig(**sizes, mlp_hidden_act="relu2", experts_implementation=implementation)
    with torch.device("meta"):
        routed, shared = NemotronHExperts(config), NemotronHMLP(config, intermediate_size=len(shared_up))
    routed.up_proj, routed.down_proj = _parameter(w_up), _parameter(w_down)
    shared.up_proj.weight, shared.down_proj.weight = _parameter(shared_up), _parameter(shared_down)
    chosen = experts.long()
    return lambda: routed(x, chosen, weights) + shared(x)


def grouped_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Program:
    """Pairs sorted by expert, and one grouped product over all experts each way."""

    def call() -> Tensor:
        order = experts.flatten().argsort(stable=True)
        tokens = order // experts.shape[1]
        ends = experts.flatten().bincount(minlength=len(w_up)).cumsum(0).int()
        hidden = F.grouped_mm(x[tokens], w_up.mT, offs=ends).relu().square()
        y = F.grouped_mm(hidden, w_down.mT, offs=ends).float() * weights.flatten()[order, None]
        out = torch.zeros(x.shape, device=x.device).index_add_(0, tokens, y)
        return out.to(x.dtype) + F.linear(F.linear(x, shared_up).relu().square(), shared_down)

    return call


ANYWHERE: Mapping[str, Mapping[str, Callable[..., Program]]] = {
    "block_attention": {
        "PyTorch: FlexAttention": flex_attention,
        "transformers: sdpa": transformers_attention,
    },
    "gated_rms_norm": {"transformers: NemotronHRMSNormGated": transformers_gated_norm},
    "mamba2_scan": {"mamba_ssm: ssd_minimal_discrete": mamba_ssm_minimal},
    "moe_experts": {
        "PyTorch: grouped_mm": grouped_experts,
        "transformers: NemotronHExperts, eager": partial(transformers_experts, implementation="eager"),
        "transformers: NemotronHExperts, grouped_mm": partial(transformers_experts, implementation="grouped_mm"),
    },
}
ON_GPU: Mapping[str, Mapping[str, Callable[..., Program]]] = {
    "block_attention": {"flash_attn: FlashAttention-2": flash_attention},
    "gated_rms_norm": {"mamba_ssm: rmsnorm_fn": mamba_ssm_gated_norm},
    "mamba2_scan": {"mamba_ssm: mamba_chunk_scan_combined": mamba_ssm_scan},
}


def _made_once(make: Callable[..., Program], inputs: Mapping[str, Any]) -> Program:
    program = cache(partial(make, **inputs))
    return lambda: program()()


def of(op: str, inputs: Mapping[str, Any], device: str) -> dict[str, Program]:
    """The programs for an operation's arguments on this device."""
    found = {**ANYWHERE.get(op, {}), **(ON_GPU.get(op, {}) if device == "cuda" else {})}
    return {name: _made_once(make, inputs) for name, make in found.items()}
