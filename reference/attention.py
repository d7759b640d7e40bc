"""Block attention: a block of queries over a frozen context and over its own keys, with a log-sum-exp to merge by.

For batch row b, query i and query head h (key head g = h // (Hq / Hkv)):

    logit_j = cap(scale * q[b,i,h] . key_j)        key_j over the visible context and the visible part of the block
    lse     = log sum_j exp(logit_j)
    out     = sum_j exp(logit_j - lse) * value_j

Visible context: positions t of row context_index[b] with context_starts[b] <= t < context_lens[b], and
t >= context_lens[b] - window if windowed. Visible block: positions j < block_lens[b], and j <= i if causal, or
j // block_size <= i // block_size if block-causal. Where the context holds the block's keys already (context_attention,
causal), query i is at position p = context_lens[b] - block_lens[b] + i and sees t <= p, and t > p - window if windowed.
cap(x) is softcap * tanh(x / softcap), or x without. A sink is one more logit of every query of its head, without a
value: it adds exp(sinks[h]) to the sum of exponentials, hence to lse, and nothing to out's numerator.
A query with no visible key gives out = 0 and lse = -inf, or its sink; every query i >= block_lens[b] 0 and -inf.

Storage beyond a length is never looked at, whatever it holds (NaN included); nor are block-table entries beyond it.
Computation is float64 for float64 inputs, float32 for all others; only `out` is rounded to the input dtype.

Sources: softmax attention: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023; merging by log-sum-exp:
Milakov & Gimelshein 2018, Dao 2023 (FlashAttention-2, section 3.1); pages: Kwon et al. 2023; softcap: Gemma 2, 2024;
sinks: Xiao et al. 2023 (arXiv 2309.17453), as learned logits in gpt-oss, 2025; block-causal masks: Arriola et al. 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_kernels.options.arguments import whole
from twotower_kernels.reference.attention_cases import CASES, COMPOSED, make_inputs
from twotower_kernels.reference.attention_checks import (
    Lengths,
    as_lengths,
    check_context,
    check_heads,
    check_like_queries,
    check_pages,
    check_queries,
    check_rank,
    check_sinks,
    compute_dtype,
    context_rows,
)

__all__ = [
    "CASES",
    "COMPOSED",
    "append_kv",
    "block_attention",
    "block_causal_attention",
    "context_attention",
    "make_inputs",
    "merge_attention",
]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    *,
    context_lens: Lengths | None = None,
    context_starts: Lengths | None = None,
    context_index: Tensor | None = None,
    block_table: Tensor | None = None,
    block_lens: Lengths | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a block over a context and over itself: the denoiser's layer, and with `causal` prefill and commit.

    q: [B,S,Hq,D]; k: [B,S,Hkv,D], Hq a multiple of Hkv; v: [B,S,Hkv,Dv]; any strides; one dtype: float64, float32,
        bfloat16, float16.
    k_context, v_context: dense [Bc,T,Hkv,D] and [Bc,T,Hkv,Dv], or pages [P,page,Hkv,D] with block_table [Bc,n] (then
        T = n * page). Bc is B, or 1: one context for all rows; or there is a context_index.
    context_lens: tokens of context that row b sees, scalar or [B]; default T. Without a context, 0.
    context_starts: tokens of them that it does not see, in front (left padding), scalar or [B]; default 0.
    context_index: [B], the context row (of Bc) that row b reads.
    block_lens: tokens of the block that are real, scalar or [B]; default S.
    causal: query i sees block keys 0..i only (and the context as before).
    window: keep only the last `window` tokens of context_lens[b], the same ones for every query; 0: no context.
    scale: default 1/sqrt(D). softcap: 0 is none.
    sinks: [Hq], any floating dtype: a logit of each head, neither scaled nor capped.
    out: written in place and returned (no gradient then).

    Returns out [B,S,Hq,Dv] in q's dtype, and with return_lse also the natural log-sum-exp [B,S,Hq] in float32
    (float64), sinks included. Differentiable in all floating arguments. ValueError or TypeError on arguments that do
    not fit.
    """
    return attend_block(
        q, k, v, k_context, v_context, context_lens, context_starts, context_index, block_table, block_lens,
        int(causal), window, scale, softcap, sinks, return_lse, out,
    )  # fmt: skip


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    seq_lens: Lengths | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence of blocks: token i sees all tokens of its own block and of those before.

    q, k, v, scale, softcap, sinks, out and results as in `block_attention`; any S, the last block may be short.
    block_size: tokens of a block, at least 1. seq_lens: tokens of each row that are real, scalar or [B]; default S.
    """
    if whole("block_size", block_size) < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    lens = as_lengths(seq_lens, q.shape[1], q.shape[0], q.shape[1], "seq_lens", q.device) if q.ndim == 4 else None
    return attend_block(
        q, k, v, None, None, None, None, None, None, lens, block_size, None, scale, softcap, sinks, return_lse, out
    )


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor | None, v_context: Tensor | None,
    context_lens: Lengths | None, context_starts: Lengths | None, context_index: Tensor | None,
    block_table: Tensor | None, block_lens: Lengths | None, causal: int, window: int | None, scale: float | None,
    softcap: float, sinks: Tensor | None, return_lse: bool, out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`block_attention`, block-causal if `causal` is more than 1: the size of a block."""
    check_queries(q, v, window, scale, softcap, out, (k, v, k_context, v_context, sinks))
    batch, length, _, dim = q.shape
    check_like_queries(q, k=k, v=v)
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        expected = f"[{batch}, {length}, Hkv, {dim}] and [{batch}, {length}, Hkv, Dv]"
        raise ValueError(f"k, v: expected {expected}, got {list(k.shape)}, {list(v.shape)}")
    check_heads(q, k, "k")
    lens = as_lengths(block_lens, length, batch, length, "block_lens", q.device)
    positions = torch.arange(length, device=q.device)
    real = positions < lens[:, None]  # [B,S]
    visible = real[:, None, :] & real[:, :, None]  # [B,S,S]: queries, keys
    if causal:
        visible = visible & (positions // causal <= positions[:, None] // causal)
    parts = [(zero_outside(k, real), zero_outside(v, real), visible)]
    if k_context is not None and v_context is not None:
        if k_context.ndim == 4 and k_context.shape[2] != k.shape[2]:
            raise ValueError(f"k_context: expected {k.shape[2]} key heads as in k, got {k_context.shape[2]}")
        if v_context.ndim == 4 and v_context.shape[3] != v.shape[3]:
            raise ValueError(f"v_context: expected head_dim {v.shape[3]} as in v, got {v_context.shape[3]}")
        places = context_lens, context_starts, context_index, block_table
        parts.insert(0, read_context(q, k_context, v_context, *places, lens, False, window))
    elif k_context is not None or v_context is not None:
        raise ValueError("k_context and v_context: expected both or neither, got one")
    elif context_starts is not None or context_index is not None or block_table is not None:
        raise ValueError("context_starts, context_index, block_table: expected none without a context")
    else:
        as_lengths(context_lens, 0, batch, 0, "context_lens", q.device)
    return finish(*attend(zero_outside(q, real), parts, scale, softcap, sinks, real), q.dtype, return_lse, out)


def context_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    context_lens: Lengths | None = None,
    context_starts: Lengths | None = None,
    context_index: Tensor | None = None,
    block_table: Tensor | None = None,
    block_lens: Lengths | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The context half of `block_attention`: the same arguments, without the block's own keys.

    causal: the last block_lens[b] of the context_lens[b] tokens are the block itself, and query i sees them up to its
        own (aligned bottom-right); `window` then keeps, for each query, the last `window` tokens that it sees, its own
        included: distances 0 to window - 1, as sliding layers count. A context shorter than the block: the first
        queries see nothing.
    """
    check_queries(q, v_context, window, scale, softcap, out, (k_context, v_context, sinks))
    batch, length = q.shape[:2]
    lens = as_lengths(block_lens, length, batch, length, "block_lens", q.device)
    real = torch.arange(length, device=q.device) < lens[:, None]  # [B,S]
    places = context_lens, context_starts, context_index, block_table
    part = read_context(q, k_context, v_context, *places, lens, causal, window)
    return finish(*attend(zero_outside(q, real), [part], scale, softcap, sinks, real), q.dtype, return_lse, out)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

        lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    out_a, out_b: [..., D], same dtype; lse_a, lse_b: [...] in float32 (float64 for float64 outputs).
    A side whose lse is -inf, or +inf as FlashAttention writes it, saw no key: it contributes nothing, whatever its out
    holds; two such sides give 0 and -inf. Sinks belong to one side only: both would count them twice.
    Returns (out, lse). Differentiable in all four.
    """
    statistics = compute_dtype(out_a)
    for name, tensor, like in (("out_b", out_b, out_a), ("lse_b", lse_b, lse_a)):
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            expected, got = f"{list(like.shape)} {like.dtype}", f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name}: expected {expected}, as its partner, got {got}")
    if lse_a.shape != out_a.shape[:-1]:
        raise ValueError(f"lse_a: expected {list(out_a.shape[:-1])} as out_a, got {list(lse_a.shape)}")
    if lse_a.dtype != statistics:
        raise TypeError(f"lse_a: expected {statistics} with {out_a.dtype} outputs, got {lse_a.dtype}")
    lse_a, lse_b = (x.masked_fill(x.isposinf(), -torch.inf) for x in (lse_a, lse_b))
    weights, lse = softmax_and_lse(torch.stack([lse_a, lse_b]), dim=0)
    merged = torch.zeros_like(out_a, dtype=statistics)
    for weight, part, part_lse in zip(weights, (out_a, out_b), (lse_a, lse_b), strict=True):
        seen = part.to(statistics).masked_fill(part_lse.isneginf()[..., None], 0)
        merged = merged + weight[..., None] * seen
    return merged.to(out_a.dtype), lse


def append_kv(
    k_context: Tensor,
    v_context: Tensor,
    k: Tensor,
    v: Tensor,
    context_lens: Lengths,
    *,
    context_index: Tensor | None = None,
    block_table: Tensor | None = None,
    block_lens: Lengths | None = None,
) -> None:
    """Write k[b, :block_lens[b]] (and v) behind the first context_lens[b] tokens of row b's context, in place.

    Arguments and shapes as in `block_attention`. Lengths are not changed: the caller's next context_lens are
    context_lens + block_lens. Nothing else in the storage is touched, and nothing at all if an argument does not fit:
    context_lens + block_lens beyond the storage, or two rows that write the same place, are a ValueError.
    Not differentiable.
    """
    check_rank("k", k)
    check_like_queries(k, v=v, k_context=k_context, v_context=v_context)
    check_context(k, k_context, v_context)
    if k_context.requires_grad or v_context.requires_grad:
        raise ValueError("k_context, v_context: written in place, expected no requires_grad; detach them")
    if k.requires_grad or v.requires_grad:
        raise ValueError("k, v: append_kv is not differentiable, expected tensors without requires_grad; detach them")
    if k.shape[:2] != v.shape[:2] or k.shape[2:] != k_context.shape[2:] or v.shape[2:] != v_context.shape[2:]:
        expected = f"{['B', 'S', *k_context.shape[2:]]}, {['B', 'S', *v_context.shape[2:]]}"
        raise ValueError(f"k, v: expected {expected} as in the context, got {list(k.shape)}, {list(v.shape)}")
    batch, length = k.shape[:2]
    rows, table, capacity = context_rows(batch, k_context, context_index, block_table, shared=False)
    start = as_lengths(context_lens, capacity, batch, capacity, "context_lens", k.device)
    count = as_lengths(block_lens, length, batch, length, "block_lens", k.device)
    if bool((start + count > capacity).any()):
        total = (start + count).tolist()
        raise ValueError(f"context_lens + block_lens: expected at most {capacity}, the context's storage, got {total}")
    sequence, offset = torch.nonzero(torch.arange(length, device=k.device) < count[:, None], as_tuple=True)  # [M], [M]
    row, position = rows[sequence], start[sequence] + offset
    if table is not None:
        page = k_context.shape[1]
        row, position = table[row, position // page], position % page
        check_pages(row, k_context)
    slot = row * k_context.shape[1] + position
    if slot.unique().numel() != slot.numel():
        raise ValueError("context_index, block_table: expected every row to write elsewhere, got two on the same place")
    k_context[row, position] = k[sequence, offset]
    v_context[row, position] = v[sequence, offset]


def attend(
    q: Tensor,
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    real: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all parts' keys together. A part: (k [B,T,Hkv,D], v, visible [B,S,T]), all finite.
    real: [B,S], the queries that have a sink."""
    batch, length, heads, dim = q.shape
    kv_heads = parts[0][0].shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)  # [B,S,Hkv,R,D]: query heads by their key head
    logits = []
    for k, _, visible in parts:
        logit = torch.einsum("bsgrd,btgd->bsgrt", grouped, k) * (dim**-0.5 if scale is None else scale)
        if softcap:
            logit = softcap * torch.tanh(logit / softcap)
        logits.append(logit.masked_fill(~visible[:, :, None, None, :], -torch.inf))
    if sinks is not None:
        check_sinks(q, sinks)
        sink = sinks.to(q.dtype).reshape(kv_heads, -1, 1).expand(*grouped.shape[:4], 1)
        logits.append(sink.masked_fill(~real[:, :, None, None, None], -torch.inf))
    weights, lse = softmax_and_lse(torch.cat(logits, dim=-1), dim=-1)  # [B,S,Hkv,R,all T], [B,S,Hkv,R]
    out = grouped.new_zeros(*grouped.shape[:4], parts[0][1].shape[3])
    for weight, (_, v, _) in zip(weights.split([x.shape[-1] for x in logits], dim=-1), parts, strict=False):
        out = out + torch.einsum("bsgrt,btgd->bsgrd", weight, v)
    return out.flatten(2, 3), lse.reshape(batch, length, heads)


def read_context(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    context_lens: Lengths | None,
    context_starts: Lengths | None,
    context_index: Tensor | None,
    block_table: Tensor | None,
    block_lens: Tensor,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each batch row's context as (k [B,T,Hkv,D], v, visible [B,S,T]): gathered, upcast, zero where nobody looks.
    block_lens: as int64 [B]. causal: the last tokens are the block's."""
    check_like_queries(q, k_context=k_context, v_context=v_context)
    check_context(q, k_context, v_context)
    check_heads(q, k_context, "k_context")
    batch, length = q.shape[:2]
    rows, table, capacity = context_rows(batch, k_context, context_index, block_table, shared=True)
    lens = as_lengths(context_lens, capacity, batch, capacity, "context_lens", q.device)
    starts = as_lengths(context_starts, 0, batch, capacity, "context_starts", q.device)
    positions, query = torch.arange(capacity, device=q.device), torch.arange(length, device=q.device)
    visible = ((positions >= starts[:, None]) & (positions < lens[:, None]))[:, None, :]  # [B,1,T]
    visible = visible & (query < block_lens[:, None])[:, :, None]  # [B,S,T]
    last = lens[:, None] - 1  # [B,1] or [B,S], the last token that a query may see
    if causal:
        last = (lens - block_lens)[:, None] + query
        visible = visible & (positions <= last[..., None])
    if window is not None:
        visible = visible & (positions > last[..., None] - window)
    if table is not None:
        used = torch.arange(table.shape[1], device=q.device) * k_context.shape[1] < lens[:, None]  # [B,n]
        page = torch.where(used, table[rows], 0)
        check_pages(page, k_context)
        keys, values = (x[page].reshape(batch, capacity, *x.shape[2:]) for x in (k_context, v_context))  # [B,T,Hkv,D]
    elif context_index is not None:
        keys, values = k_context[rows], v_context[rows]
    else:
        keys, values = (x.expand(batch, -1, -1, -1) for x in (k_context, v_context))
    seen = visible.any(dim=1)  # by any query
    return zero_outside(keys, seen), zero_outside(values, seen), visible


def finish(
    out: Tensor, lse: Tensor, dtype: torch.dtype, return_lse: bool, into: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Round to the input dtype, into the caller's tensor if there is one."""
    result = out.to(dtype) if into is None else into.copy_(out)
    return (result, lse) if return_lse else result


def zero_outside(x: Tensor, keep: Tensor) -> Tensor:
    """x [B,T,H,D] in the compute dtype, 0 where keep [B,T] is false: 0 * NaN is NaN, forward and backward."""
    return x.to(compute_dtype(x)).masked_fill(~keep[:, :, None, None], 0)


def softmax_and_lse(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(softmax, log-sum-exp) along dim; 0 and -inf, with gradient 0, where there is nothing but -inf.

    Not exp(x - lse): rounding lse, which may be large, would scale all weights.
    """
    empty = x.isneginf().all(dim, keepdim=True)
    x = x.masked_fill(empty, 0)
    return x.softmax(dim).masked_fill(empty, 0), x.logsumexp(dim).masked_fill(empty.squeeze(dim), -torch.inf)
