"""The model's operations in plain PyTorch: the rivals of the model's benchmark. Each has the operation's signature, as
far as the denoiser calls it: a context without index, no ragged blocks.

`eager` is how such models are usually written: context and block concatenated, keys repeated for every query head, a
loop over all experts, the recurrence token by token. `best` is what a careful author writes with the same library:
grouped attention by SDPA, the experts in use only and one matrix product for each projection of them, the closed form
of the recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def adaln_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> Tensor:
    if shift is None or scale is None:
        return _norm(x, weight, eps)
    shift, scale = shift[:, None], scale[:, None]
    if order == "modulate_norm":
        return _norm(x * (1 + scale) + shift, weight, eps)
    return _norm(x, weight, eps) * (1 + scale) + shift


def gated_residual_adaln_norm(
    residual: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, *rest: Tensor | None, eps: float, order: str
) -> tuple[Tensor, Tensor]:
    h = residual + (y if gate is None else gate[:, None] * y)
    return h, adaln_norm(h, weight, *rest, eps=eps, order=order)


def _context(k: Tensor, context: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Context and block in one tensor `[B, T + S, Hkv, D]`, and which of it is real `[B, T + S]`."""
    keys = torch.cat([context, k], 1)
    positions = torch.arange(keys.shape[1], device=k.device)
    return keys, (positions < lens[:, None]) | (positions >= context.shape[1])


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor, v_context: Tensor, *, context_lens: Tensor, **_: Any
) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    keys, real = _context(k, k_context, context_lens)
    values, _real = _context(v, v_context, context_lens)
    keys, values = keys.repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, keys).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bhst,bthd->bshd", weights, values)


def best_attention(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor, v_context: Tensor, *, context_lens: Tensor, **_: Any
) -> Tensor:
    keys, real = _context(k, k_context, context_lens)
    values, _real = _context(v, v_context, context_lens)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=real[:, None, None], enable_gqa=True)
    return out.transpose(1, 2)


def _projected(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    n_groups: int,
    head_dim: int,
    time_step_limit: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `[B, L, heads, head_dim]`, B and C `[B, L, heads, state]`, Δ `[B, L, heads]`; float32."""
    columns = torch.cat([conv_state, xbc.transpose(1, 2)], -1)
    u = F.silu(F.conv1d(columns, conv_weight, conv_bias, groups=xbc.shape[-1])).transpose(1, 2).float()
    heads = dt.shape[-1]
    inner = heads * head_dim
    x, b, c = u.split([inner, *[(u.shape[-1] - inner) // 2] * 2], -1)
    b, c = (m.unflatten(-1, (n_groups, -1)).repeat_interleave(heads // n_groups, 2) for m in (b, c))
    delta = F.softplus(dt.float() + dt_bias.float()).clamp(*time_step_limit)
    return x.unflatten(-1, (heads, head_dim)), b, c, delta


def eager_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    *,
    n_groups: int,
    head_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    time_step_limit: tuple[float, float],
    **_: Any,
) -> Tensor:
    sizes = n_groups, head_dim, time_step_limit
    x, b, c, delta = _projected(xbc, dt, conv_weight, conv_bias, dt_bias, conv_state, *sizes)
    decay, state, ys = (-a_log.float().exp() * delta).exp(), ssm_state, []
    for t in range(xbc.shape[1]):
        added = (delta[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = decay[:, t, :, None, None] * state + added
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + d.float()[:, None] * x[:, t])
    return torch.stack(ys, 1).flatten(2).to(xbc.dtype)


def best_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    *,
    n_groups: int,
    head_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    time_step_limit: tuple[float, float],
    **_: Any,
) -> Tensor:
    sizes = n_groups, head_dim, time_step_limit
    x, b, c, delta = (
        m.transpose(1, 2) for m in _projected(xbc, dt, conv_weight, conv_bias, dt_bias, conv_state, *sizes)
    )  # heads first
    total = (-a_log.float().exp()[:, None] * delta).cumsum(-1)  # [B, heads, L]
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    y = ((c @ b.transpose(2, 3)) * decay * delta[..., None, :]) @ x
    y = y + total.exp()[..., None] * (c @ ssm_state.transpose(2, 3)) + d.float()[:, None, None] * x
    return y.transpose(1, 2).flatten(2).to(xbc.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    u = (y.float() * F.silu(z.float())).unflatten(-1, (n_groups, -1))
    return (F.rms_norm(u, u.shape[-1:], eps=eps).flatten(-2) * weight.float()).to(y.dtype)


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    return F.linear(x.double(), gate_weight.double())


def moe_route(
    logits: Tensor, bias: Tensor, *, top_k: int, renormalize: bool, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    experts = (scores + bias.double()).topk(top_k, -1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).float(), experts


def _ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).relu().square(), down)


def eager_experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, shared_up: Tensor, shared_down: Tensor
) -> Tensor:
    out = torch.zeros(x.shape, device=x.device)
    chosen = F.one_hot(experts, len(up)).permute(2, 0, 1)  # [E, N, k]
    for e in range(len(up)):
        token, choice = chosen[e].nonzero(as_tuple=True)
        out.index_add_(0, token, _ffn(x[token], up[e], down[e]).float() * weights[token, choice, None])
    return out.to(x.dtype) + _ffn(x, shared_up, shared_down)


def best_experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, shared_up: Tensor, shared_down: Tensor
) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    used, counts = torch.unique_consecutive(experts.flatten()[order], return_counts=True)
    tokens = order // experts.shape[1]
    parts = x[tokens].split(counts.tolist())
    y = torch.cat([_ffn(part, up[e], down[e]) for e, part in zip(used.tolist(), parts, strict=True)])
    out = torch.zeros(x.shape, device=x.device)
    out.index_add_(0, tokens, y.float() * weights.flatten()[order, None])
    return out.to(x.dtype) + _ffn(x, shared_up, shared_down)


COMMON = {
    "adaln_norm": adaln_norm,
    "gated_residual_adaln_norm": gated_residual_adaln_norm,
    "gated_rms_norm": gated_rms_norm,
    "moe_gate": moe_gate,
    "moe_route": moe_route,
}
EAGER = COMMON | {"block_attention": eager_attention, "mamba2_scan": eager_scan, "moe_experts": eager_experts}
BEST = COMMON | {"block_attention": best_attention, "mamba2_scan": best_scan, "moe_experts": best_experts}
