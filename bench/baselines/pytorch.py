"""The operations in plain PyTorch, with the operations' own signatures as far as the model calls them: what ours are
measured against, and what the model's benchmark puts in their place.

`ORIGINAL` is how such models are usually written: context and block concatenated, keys and values repeated for every
query head, a loop over all experts, the recurrence token by token, cloned logits and a loop over rows. `BEST` is what a
careful author writes with the same library: query heads packed into rows of SDPA, only the experts in use, the closed
form of the recurrence as matrix products, no softmax written where a logarithm of a sum will do.

Processors without bfloat16 arithmetic multiply such matrices at a hundredth of their float32 speed, so there `BEST`
widens the operands first; `widen` says whether this one does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def widen() -> bool:
    """Whether products of 16-bit matrices are slow here: no AVX512-BF16, no AMX."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _wide(x: Tensor) -> Tensor:
    return x.float() if widen() and x.device.type == "cpu" else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Widened where the rows are many enough to pay for it."""
    if x.shape[:-1].numel() <= 128:
        return F.linear(x, weight, bias)
    return F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias)).to(x.dtype)


# --- adaLN ----------------------------------------------------------------------------------------------------------


def _eager_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    u = x.float()
    u = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * u).to(x.dtype)


def _best_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def _adaln(rms: Any) -> Any:
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
            return rms(x, weight, eps)
        shift, scale = shift[:, None], scale[:, None]
        if order == "modulate_norm":
            return rms(x * (1 + scale) + shift, weight, eps)
        return rms(x, weight, eps) * (1 + scale) + shift

    return adaln_norm


eager_adaln_norm, best_adaln_norm = _adaln(_eager_rms), _adaln(_best_rms)


def _residual(norm: Any) -> Any:
    def gated_residual_adaln_norm(
        residual: Tensor,
        y: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        *,
        eps: float,
        order: str,
    ) -> tuple[Tensor, Tensor]:
        h = residual + (y if gate is None else gate[:, None] * y)
        return h, norm(h, weight, shift, scale, eps=eps, order=order)

    return gated_residual_adaln_norm


eager_residual_norm, best_residual_norm = _residual(eager_adaln_norm), _residual(best_adaln_norm)


# --- attention ------------------------------------------------------------------------------------------------------


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    *,
    context_lens: Tensor | None = None,
    causal: bool = False,
    **_: Any,
) -> Tensor:
    """Context and block concatenated, keys and values repeated for all query heads, scores in memory."""
    repeats, real = q.shape[2] // k.shape[2], None
    if k_context is not None and v_context is not None:
        positions = torch.arange(k_context.shape[1] + k.shape[1], device=k.device)
        if context_lens is not None:
            real = (positions < context_lens[:, None]) | (positions >= k_context.shape[1])  # [B, T+S]
        k, v = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k).float() * q.shape[-1] ** -0.5
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    if causal:
        queries, keys = scores.shape[-2:]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=k.device).tril(keys - queries)
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1).to(q.dtype), v)


def expanded_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA over keys [B, T, Hkv, D] that hold the block too, repeated for all query heads."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


def packed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA over keys [B, T, Hkv, D] that hold the block too, the query heads of a key head as rows of one head."""
    rows = q.unflatten(2, (k.shape[2], -1)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, S·R, D]
    out = F.scaled_dot_product_attention(_wide(rows), _wide(k.transpose(1, 2)), _wide(v.transpose(1, 2)))
    out = out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return out.reshape(q.shape).to(q.dtype)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """SDPA as it understands grouped heads itself."""
    rows, keys, values = (_wide(x.transpose(1, 2)) for x in (q, k, v))
    out = F.scaled_dot_product_attention(rows, keys, values, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).to(q.dtype)


def best_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    *,
    causal: bool = False,
    **_: Any,
) -> Tensor:
    """As the model needs it: full rows of context, to which the block is appended by a copy."""
    if k_context is not None and v_context is not None and k_context.shape[1] and not causal:
        return packed_attention(q, torch.cat([k_context, k], 1), torch.cat([v_context, v], 1))
    return grouped_attention(q, k, v, causal)


# --- Mamba-2 --------------------------------------------------------------------------------------------------------


def _projected(
    xbc: Tensor, dt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, *, in_float32: bool = False, **options: Any
) -> Any:
    """x [B, L, heads, head_dim], B and C [B, L, heads, state], Δ [B, L, heads], in float32; the last inputs."""
    past, groups, head_dim = options.get("conv_state"), options["n_groups"], options["head_dim"]
    columns = xbc.transpose(1, 2)
    width = weight.shape[-1]
    columns = F.pad(columns, (width - 1, 0)) if past is None else torch.cat([past, columns], -1)
    inputs, weight = columns, weight.view(-1, 1, width)
    if in_float32:
        inputs, weight, bias = inputs.float(), weight.float(), bias.float()
    u = F.silu(F.conv1d(inputs, weight, bias, groups=xbc.shape[-1]).to(xbc.dtype)).transpose(1, 2).float()
    heads = dt.shape[-1]
    inner = heads * head_dim
    x, b, c = u.split([inner, *[(u.shape[-1] - inner) // 2] * 2], -1)
    b, c = (m.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for m in (b, c))
    delta = F.softplus(dt.float() + dt_bias.float()).clamp(*options.get("time_step_limit", (0.0, torch.inf)))
    return x.unflatten(-1, (heads, head_dim)), b, c, delta, columns[..., columns.shape[-1] - width + 1 :]


def _finished(ys: Tensor, dtype: torch.dtype, states: tuple[Tensor, Tensor], **options: Any) -> Any:
    y = ys.flatten(2).to(dtype)
    return (y, *states) if options.get("return_states") else y


def eager_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    **options: Any,
) -> Any:
    """The recurrence, token by token."""
    x, b, c, delta, last = _projected(xbc, dt, conv_weight, conv_bias, dt_bias, **options)
    decay, ys = (-a_log.float().exp() * delta).exp(), []
    state = options.get("ssm_state")
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]) if state is None else state
    for t in range(xbc.shape[1]):
        added = (delta[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = decay[:, t, :, None, None] * state + added
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + d.float()[:, None] * x[:, t])
    return _finished(torch.stack(ys, 1), xbc.dtype, (last, state), **options)


def best_scan(
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    **options: Any,
) -> Any:
    """The closed form over chunks of 64 tokens, as batched matrix products."""
    in_float32 = widen() and xbc.device.type == "cpu"
    *parts, last = _projected(xbc, dt, conv_weight, conv_bias, dt_bias, in_float32=in_float32, **options)
    x, b, c, delta = (m.transpose(1, 2) for m in parts)  # heads before tokens
    state, chunk, ys = options.get("ssm_state"), 64, []
    state = x.new_zeros(*x.shape[:2], x.shape[-1], b.shape[-1]) if state is None else state
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        a = (-a_log.float().exp()[:, None] * delta[:, :, part]).cumsum(-1)  # [B, heads, L]
        within = (a[..., :, None] - a[..., None, :]).tril().exp().tril() * delta[:, :, None, part]
        y = (c[:, :, part] @ b[:, :, part].mT * within) @ x[:, :, part]
        ys.append(y + a.exp()[..., None] * (c[:, :, part] @ state.mT) + d.float()[:, None, None] * x[:, :, part])
        if options.get("return_states") or start + chunk < x.shape[2]:
            added = (x[:, :, part] * within[..., -1, :, None]).mT @ b[:, :, part]
            state = a[..., -1, None, None].exp() * state + added
    return _finished(torch.cat(ys, 2).transpose(1, 2), xbc.dtype, (last, state), **options)


def eager_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    u = (y.float() * F.silu(z.float())).unflatten(-1, (n_groups, -1))
    u = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * u.flatten(-2)).to(y.dtype)


def best_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
    u = (y.float() * F.silu(z.float())).unflatten(-1, (n_groups, -1))
    return (F.rms_norm(u, u.shape[-1:], eps=eps).flatten(-2) * weight.float()).to(y.dtype)


# --- mixture of experts ---------------------------------------------------------------------------------------------


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    return F.linear(x.double(), gate_weight.double())


def eager_moe_route(
    logits: Tensor, bias: Tensor, *, top_k: int, renormalize: bool = True, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """With the restriction to groups as the model's authors write it, though there is one group."""
    scores = logits.sigmoid()
    choice = scores + bias.double()
    groups = choice.unflatten(-1, (1, -1)).topk(2, -1).values.sum(-1)
    chosen = torch.zeros_like(groups).scatter_(1, groups.topk(1, -1).indices, 1)
    open = chosen[..., None].expand(-1, -1, choice.shape[-1]).flatten(1).bool()
    experts = choice.masked_fill(~open, 0.0).topk(top_k, -1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).float(), experts


def best_moe_route(
    logits: Tensor, bias: Tensor, *, top_k: int, renormalize: bool = True, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    experts = (scores + bias.double()).topk(top_k, -1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).float(), experts


def _router(route: Any) -> Any:
    """Product and choice; these programs make no plan."""

    def moe_router(x: Tensor, gate_weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor, None]:
        return *route(moe_gate(x, gate_weight), bias, **options), None

    return moe_router


def _experts(add: Any, linear: Any) -> Any:
    """`add(mlp, out, x, up, down, weights, experts)` adds the routed experts' part to a float32 sum."""

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(linear(x, up).relu().square(), down)

    def moe_experts(
        x: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        weights: Tensor,
        experts: Tensor,
        *,
        plan: None = None,
        shared_up: Tensor,
        shared_down: Tensor,
    ) -> Tensor:
        out = torch.zeros(x.shape, device=x.device)
        add(mlp, out, x, w_up, w_down, weights, experts)
        return out.to(x.dtype) + mlp(x, shared_up, shared_down)

    return moe_experts


def _expert_by_expert(
    mlp: Any, out: Tensor, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor
) -> None:
    """For every expert: which tokens chose it?"""
    chosen = F.one_hot(experts.long(), len(up)).permute(2, 0, 1)  # [E, N, k]
    for e in range(len(up)):
        token, choice = chosen[e].nonzero(as_tuple=True)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]).float() * weights[token, choice, None])


def _only_those_chosen(
    mlp: Any, out: Tensor, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor
) -> None:
    """Pairs sorted once, only the experts that were chosen, one gather and one sum over all."""
    order = experts.flatten().argsort(stable=True)
    used, counts = torch.unique_consecutive(experts.flatten()[order], return_counts=True)
    tokens = order // experts.shape[1]
    parts = x[tokens].split(counts.tolist())
    y = torch.cat([mlp(part, up[e], down[e]) for e, part in zip(used.tolist(), parts, strict=True)])
    out.index_add_(0, tokens, y.float() * weights.flatten()[order, None])


eager_experts, best_experts = _experts(_expert_by_expert, F.linear), _experts(_only_those_chosen, linear)


ORIGINAL = {
    "adaln_norm": eager_adaln_norm,
    "gated_residual_adaln_norm": eager_residual_norm,
    "gated_rms_norm": eager_gated_rms_norm,
    "moe_router": _router(eager_moe_route),
    "block_attention": eager_attention,
    "mamba2_scan": eager_scan,
    "moe_experts": eager_experts,
    "linear": F.linear,
}
BEST = {
    "adaln_norm": best_adaln_norm,
    "gated_residual_adaln_norm": best_residual_norm,
    "gated_rms_norm": best_gated_rms_norm,
    "moe_router": _router(best_moe_route),
    "block_attention": best_attention,
    "mamba2_scan": best_scan,
    "moe_experts": best_experts,
    "linear": linear,
}
