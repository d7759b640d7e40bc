"""Right attention: by PyTorch's own, by FlexAttention, tile by tile, and at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from tests.testing.plain.attention import Append, Attention, BlockCausalAttention, ContextAttention, Merge
from tests.testing.right.collection import right


def lengths(given: Any, rows: int, most: int) -> Tensor:
    """[B, 1]."""
    return torch.as_tensor(most if given is None else given).reshape(-1, 1).expand(rows, 1)


def kept(x: Tensor, inside: Tensor) -> Tensor:
    """x [B, T, H, D], 0 where inside [B, T] is False, whatever is there."""
    return x.masked_fill(~inside[..., None, None], 0)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    *,
    context_lens: Any = None,
    block_lens: Any = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention of context and block, one behind the other, with a mask."""
    batch, length = q.shape[:2]
    inside = torch.arange(length) < lengths(block_lens, batch, length)
    seen = inside[:, None, :] & inside[:, :, None]
    seen = seen.tril() if causal else seen
    keys, values = kept(k, inside), kept(v, inside)
    if k_context is not None and v_context is not None:
        room = k_context.shape[1]
        written = torch.arange(room) < lengths(context_lens, batch, room)
        seen = torch.cat([written[:, None].expand(-1, length, -1) & inside[:, :, None], seen], 2)
        past = (kept(x.expand(batch, -1, -1, -1), written) for x in (k_context, v_context))
        keys, values = (torch.cat(pair, 1) for pair in zip(past, (keys, values), strict=True))
    heads = (x.transpose(1, 2) for x in (kept(q, inside), keys, values))
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen[:, None], scale=scale, enable_gqa=True).transpose(1, 2)
    return out.masked_fill(~seen.any(2)[..., None, None], 0)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """FlexAttention, not compiled."""

    def score(x: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = softcap * torch.tanh(x / softcap) if softcap else x
        return torch.where(query >= key, x, -torch.inf) if causal else x

    if not q.numel() or not v.numel():
        empty = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return (empty, lse) if return_lse else empty
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = flex_attention(*heads, score_mod=score, scale=scale, enable_gqa=True, return_lse=True)
    lse = lse.to(torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


class Tiles(Attention):
    """The largest logit and the sums of tiles of 32 keys, corrected from tile to tile; weights are rounded to the
    dtype of the values before they multiply them, as on tensor cores."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide, heads = self.wide(q), self.key_heads(q.shape[1], k.shape[1])
        largest = torch.full((q.shape[1], len(q), 1), -torch.inf, dtype=wide)
        total, out = torch.zeros_like(largest), torch.zeros(q.shape[1], len(q), v.shape[2], dtype=wide)
        if sinks is not None:
            largest, total = sinks.to(wide)[:, None, None].expand_as(largest), torch.ones_like(total)
        for t in range(0, len(k), 32):
            keys, values = k[t : t + 32, heads].to(wide), v[t : t + 32, heads].to(wide)
            logits = self.products(q.to(wide), keys) * (self.default_scale(q.shape[2]) if scale is None else scale)
            logits = self.capped(logits, softcap) if softcap else logits
            logits = logits.masked_fill(~seen[None, :, t : t + 32], -torch.inf)
            before, largest = largest, torch.maximum(largest, logits.amax(2, keepdim=True))
            base = largest.masked_fill(largest.isneginf(), 0)
            weights, shrink = (logits - base).exp(), (before - base).exp()
            total = total * shrink + weights.sum(2, keepdim=True)
            out = out * shrink + torch.einsum("hmt,thd->hmd", weights.to(v.dtype).to(wide), values)
        lse = (largest + total.log()).squeeze(2)
        return (out / total.masked_fill(total == 0, 1)).transpose(0, 1).to(q.dtype), lse.T


class Exact(Attention):
    """Everything in float64."""

    def wide(self, q: Tensor) -> torch.dtype:
        return torch.float64

    def __call__(self, *given: Any, return_lse: bool = False, **options: Any) -> Any:
        out, lse = super().__call__(*given, return_lse=True, **options)
        return (out, lse.to(torch.promote_types(out.dtype, torch.float32))) if return_lse else out


def parts_merged(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor, v_context: Tensor, *, context_lens: Any = None
) -> Tensor:
    """Context and block by themselves, merged in float32: split over keys."""
    past = ContextAttention()(
        q.float(), k_context.float(), v_context.float(), context_lens=context_lens, return_lse=True
    )
    own = Attention()(q.float(), k.float(), v.float(), return_lse=True)
    return Merge()(*past, *own)[0].to(q.dtype)


def by_logaddexp(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Of `merge_attention`: PyTorch's logaddexp."""
    lse_a, lse_b = (x.masked_fill(x == torch.inf, -torch.inf) for x in (lse_a, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    total = 0
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part - lse).exp().nan_to_num(0.0)[..., None]
        total = total + (weight * out.to(lse.dtype)).masked_fill(weight == 0, 0)
    return torch.as_tensor(total).to(out_a.dtype), lse


def by_a_mask(
    k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Any, *, block_lens: Any = None
) -> None:
    """Of `append_kv`: the whole storage is rewritten."""
    rows, length = k.shape[:2]
    start, count = lengths(context_lens, rows, 0), lengths(block_lens, rows, length)
    token = torch.arange(k_context.shape[1]) - start  # [B, T]
    new = (token >= 0) & (token < count)
    for storage, block in ((k_context, k), (v_context, v)):
        if length:
            source = token.clamp(0, length - 1)[..., None, None].expand(*token.shape, *block.shape[2:])
            storage.copy_(torch.where(new[..., None, None], block.gather(1, source), storage[:rows]))


PROGRAMS: dict[str, list[Callable[..., Any]]] = {
    "block_attention": [sdpa, flex, parts_merged],
    "merge_attention": [by_logaddexp],
    "append_kv": [by_a_mask],
}
for op, programs in PROGRAMS.items():
    for program in programs:
        right(op, program)
CLASSES: dict[str, list[type]] = {
    "block_attention": [Attention, Tiles, Exact],
    "context_attention": [ContextAttention],
    "block_causal_attention": [BlockCausalAttention],
    "merge_attention": [Merge],
    "append_kv": [Append],
}
for op, classes in CLASSES.items():
    for each in classes:
        right(op, each(), each.__name__)
