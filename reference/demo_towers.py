"""Both towers as their training computes them: the arithmetic of `reference.model` in few, large, compiled operations.

The context tower runs over a whole sequence, in chunks of a block, and leaves its states before every block behind; the
denoiser then computes all blocks of the sequence at once, each from its own state. All experts are one product, whose
result is masked by the router's weights. Products are computed in `Pass.dtype`, bfloat16 or float32, all else in
float32; in float32 both passes give what `forward_ar` and `denoise_all_blocks` give (tests/specification).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.reference.adaln import rms_norm

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate: each [B, L, H]


@dataclass(frozen=True)
class ScanSizes:
    """What a Mamba-2 layer's tensors are cut by."""

    heads: int
    head_dim: int
    groups: int
    state: int
    eps: float


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def normed(h: Tensor, weight: Tensor, modulation: Modulation | None, eps: float, inside: bool) -> Tensor:
    """The layer's norm, modulated before it (`inside`: Mamba-2, attention) or behind it."""
    if modulation is None:
        return rms_norm(h, weight, eps=eps)
    shift, scale, _ = modulation
    if inside:
        return rms_norm(h * (1 + scale) + shift, weight, eps=eps)
    return rms_norm(h, weight, eps=eps) * (1 + scale) + shift


def residual(h: Tensor, y: Tensor, modulation: Modulation | None) -> Tensor:
    return h + (y if modulation is None else modulation[2] * y)


def convolved(columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the causal depthwise convolution: columns `[R, W-1+L, C]` → `[R, L, C]` float32."""
    width = weight.shape[-1]
    length = columns.shape[1] - width + 1
    kernel = weight.reshape(-1, width)
    taps = [kernel[:, w] * columns[:, w : w + length].float() for w in range(width)]
    total = taps[0] + taps[1] if width == 2 else sum(taps[1:], taps[0])
    return F.silu(total if bias is None else total + bias)


def chunks_alone(
    u: Tensor, dt: Tensor, a_log: Tensor, dt_bias: Tensor, sizes: ScanSizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scan of every chunk from a state of zeros: u `[R, S, C]`, dt `[R, S, heads]`.

    Returns:
        y `[R, h, S, p]`; x `[R, h, S, p]`; what the chunk adds to the state `[R, h, p, n]`; c `[R, h, S, n]`; the log
        of the decay up to each token, `[R, h, S]`, and over the chunk `[R, h]`.
    """
    inner, bc = sizes.heads * sizes.head_dim, sizes.groups * sizes.state
    length, repeat = u.shape[1], sizes.heads // sizes.groups
    x, b, c = u.split([inner, bc, bc], -1)
    x = x.unflatten(-1, (sizes.heads, -1)).transpose(1, 2)  # [R, h, S, p]
    b, c = (m.unflatten(-1, (sizes.groups, -1)).transpose(1, 2) for m in (b, c))  # [R, g, S, n]
    delta = F.softplus(dt.float() + dt_bias).transpose(1, 2)  # [R, h, S]
    decay = (-a_log.exp()[:, None] * delta).cumsum(-1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    within = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    scores = (c @ b.transpose(-1, -2)).repeat_interleave(repeat, 1) * within * delta[..., None, :]
    total = decay[..., -1]
    weighted = x * ((total[..., None] - decay).exp() * delta)[..., None]
    added = weighted.transpose(-1, -2) @ b.repeat_interleave(repeat, 1)
    return scores @ x, x, added, c.repeat_interleave(repeat, 1), decay, total


def states_before(added: Tensor, total: Tensor) -> Tensor:
    """The states before every chunk, from zeros: added `[B, N, h, p, n]`, total `[B, N, h]` → `[B, N, h, p, n]`."""
    chunks = total.shape[1]
    until = total.cumsum(1).transpose(1, 2)  # [B, h, N]
    before = F.pad(until, (1, 0))[..., :-1]
    not_before = torch.ones(chunks, chunks, dtype=torch.bool).triu()
    decay = (before[..., :, None] - until[..., None, :]).masked_fill(not_before, float("-inf")).exp()
    states = decay @ added.transpose(1, 2).flatten(3)  # [B, h, N, p·n]
    return states.unflatten(-1, added.shape[3:]).transpose(1, 2)


def gated(y: Tensor, z: Tensor, weight: Tensor, sizes: ScanSizes) -> Tensor:
    """`rms(y · SiLU(z))` within each group, times weight."""
    grouped = (y * F.silu(z.float())).unflatten(-1, (sizes.groups, -1))
    return (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + sizes.eps)).flatten(-2) * weight


def mamba_layer(
    h: Tensor,
    weights: tuple[Tensor, ...],
    modulation: Modulation | None,
    seeds: tuple[Tensor, Tensor] | None,
    sizes: ScanSizes,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """h `[B, L, H]`. Without `seeds` one sequence from zeros, else every block from its own conv and ssm state.

    Returns h, and the conv and ssm states before every block.
    """
    norm, in_proj, conv, conv_bias, a_log, d, dt_bias, gate_norm, out_proj = weights
    batch, length, _ = h.shape
    inner, width = sizes.heads * sizes.head_dim, conv.shape[-1]
    x = product(normed(h, norm, modulation, sizes.eps, True), in_proj, dtype)
    z, xbc, dt = x.split([inner, inner + 2 * sizes.groups * sizes.state, sizes.heads], -1)
    if seeds is None:
        columns = F.pad(xbc, (0, 0, width - 1, 0))
        tails = torch.stack([columns[:, w : w + length : block] for w in range(width - 1)], 2).flatten(0, 1)
    else:
        tails = seeds[0]
        columns = torch.cat([tails, xbc.reshape(-1, block, xbc.shape[-1])], 1)
    u = convolved(columns, conv, conv_bias).reshape(-1, block, xbc.shape[-1])
    y, x, added, c, decay, total = chunks_alone(u, dt.reshape(-1, block, sizes.heads), a_log, dt_bias, sizes)
    if seeds is None:
        ssm = states_before(added.unflatten(0, (batch, -1)), total.unflatten(0, (batch, -1))).flatten(0, 1)
    else:
        ssm = seeds[1]
    y = y + (c * decay.exp()[..., None]) @ ssm.transpose(-1, -2) + d[:, None, None] * x  # [R, h, S, p]
    y = gated(y.transpose(1, 2).reshape(batch, length, inner), z, gate_norm, sizes)
    return residual(h, product(y, out_proj, dtype), modulation), tails, ssm


def projections(
    h: Tensor, weights: tuple[Tensor, ...], modulation: Modulation | None, head_dim: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, Hq, L, D]`, keys and values `[B, L, Hkv, D]`."""
    norm, q_proj, k_proj, v_proj = weights[:4]
    x = normed(h, norm, modulation, eps, True)
    q, k, v = (product(x, w, dtype).unflatten(-1, (-1, head_dim)) for w in (q_proj, k_proj, v_proj))
    return q.transpose(1, 2), k, v


def heads_of(k: Tensor, heads: int) -> Tensor:
    """Keys or values `[B, L, Hkv, D]` for every query head: `[B, Hq, L, D]`."""
    return k.transpose(1, 2).repeat_interleave(heads // k.shape[2], 1)


def attention_layer(
    h: Tensor,
    weights: tuple[Tensor, ...],
    modulation: Modulation | None,
    context: tuple[Tensor, Tensor] | None,
    visible: Tensor | None,
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """h `[B, L, H]`. Causal, or with the context's keys and values in front, of which and of the sequence's own a token
    sees what is `visible [L, 2·L]`. Returns h and the sequence's keys and values."""
    q, k, v = projections(h, weights, modulation, head_dim, eps, dtype)
    keys, values = (
        (k, v) if context is None else (torch.cat([c, own], 1) for c, own in zip(context, (k, v), strict=True))
    )
    keys, values = heads_of(keys, q.shape[1]), heads_of(values, q.shape[1])
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, is_causal=visible is None)
    return residual(h, product(y.transpose(1, 2).flatten(2), weights[4], dtype), modulation), k, v


def moe_layer(
    h: Tensor,
    weights: tuple[Tensor, ...],
    modulation: Modulation | None,
    top_k: int,
    width: int,
    scaling: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h `[B, L, H]` through all experts at once, of `width` I: up `[E·I + shared, H]`, down `[H, E·I + shared]`; and
    how many tokens chose each expert, `[E]`."""
    norm, gate, bias, up, down = weights
    x = normed(h, norm, modulation, eps, False)
    scores = (x @ gate.T).sigmoid()  # float32: selection is sensitive to rounding
    mask = torch.zeros_like(scores).scatter(-1, (scores.detach() + bias).topk(top_k, -1).indices, 1.0)
    picked = scores * mask
    route = picked / (picked.sum(-1, keepdim=True) + 1e-20) * scaling
    shared = len(up) - len(gate) * width
    share = torch.cat([route.repeat_interleave(width, -1), route.new_ones(*route.shape[:-1], shared)], -1)
    y = product(F.relu(product(x, up, dtype)).square() * share, down, dtype)
    return residual(h, y, modulation), mask.flatten(0, -2).sum(0)
