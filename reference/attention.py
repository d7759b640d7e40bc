"""Block attention: a block of queries over a frozen context and over its own keys, with a log-sum-exp to merge by.

For batch row b, query i and query head h (key head g = h // (Hq / Hkv)):

    logit_j = cap(scale * q[b,i,h] . key_j)        key_j over the visible context and the visible part of the block
    lse     = log sum_j exp(logit_j)
    out     = sum_j exp(logit_j - lse) * value_j

Visible context: positions t < context_lens[b] of row context_index[b], and t >= context_lens[b] - window if windowed.
Visible block: positions j < block_lens[b], and j <= i if causal. cap(x) is softcap * tanh(x / softcap), or x without.
A query with no visible key, and every query i >= block_lens[b], gives out = 0 and lse = -inf.

Storage beyond a length is never looked at, whatever it holds (NaN included); nor are block-table entries beyond it.
Computation is float64 for float64 inputs, float32 for all others; only `out` is rounded to the input dtype.

Sources: softmax attention: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023; merging by log-sum-exp:
Milakov & Gimelshein 2018, Dao 2023 (FlashAttention-2, section 3.1); pages: Kwon et al. 2023; softcap: Gemma 2, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.reference.attention_checks import (
    Lengths,
    as_lengths,
    check_context,
    check_heads,
    check_like_queries,
    check_pages,
    check_queries,
    check_rank,
    compute_dtype,
    context_rows,
)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    *,
    context_lens: Lengths | None = None,
    context_index: Tensor | None = None,
    block_table: Tensor | None = None,
    block_lens: Lengths | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a block over a context and over itself: the denoiser's layer, and with `causal` prefill and commit.

    q: [B,S,Hq,D]; k, v: [B,S,Hkv,D], Hq a multiple of Hkv; any strides; one dtype: float64, float32, bfloat16, float16.
    k_context, v_context: dense [Bc,T,Hkv,D], or pages [P,page,Hkv,D] with block_table [Bc,n] (then T = n * page).
    context_lens: tokens of context that row b sees, scalar or [B]; default T.
    context_index: [B], the context row (of Bc) that row b reads; default b, and then Bc must be B.
    block_lens: tokens of the block that are real, scalar or [B]; default S.
    causal: query i sees block keys 0..i only (and the context as before).
    window: keep only the last `window` tokens of context_lens[b], the same ones for every query; 0: no context.
    scale: default 1/sqrt(D). softcap: 0 is none.
    out: written in place and returned (no gradient then).

    Returns out [B,S,Hq,D] in q's dtype, and with return_lse also the natural log-sum-exp [B,S,Hq] in float32 (float64).
    Differentiable in q, k, v; the context is frozen. ValueError or TypeError on arguments that do not fit.
    """
    check_queries(q, window, scale, softcap, out, (k, v))
    batch, length, _, dim = q.shape
    check_like_queries(q, k=k, v=v)
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        raise ValueError(f"k, v: expected [{batch}, {length}, Hkv, {dim}], got {list(k.shape)}, {list(v.shape)}")
    check_heads(q, k, "k")
    lens = as_lengths(block_lens, length, batch, length, "block_lens", q.device)
    positions = torch.arange(length, device=q.device)
    real = positions < lens[:, None]  # [B,S]
    visible = real[:, None, :] & real[:, :, None]  # [B,S,S]: queries, keys
    if causal:
        visible = visible & (positions <= positions[:, None])
    parts = [(zero_outside(k, real), zero_outside(v, real), visible)]
    if k_context is not None and v_context is not None:
        if k_context.ndim == 4 and k_context.shape[2] != k.shape[2]:
            raise ValueError(f"k_context: expected {k.shape[2]} key heads as in k, got {k_context.shape[2]}")
        parts.insert(0, read_context(q, k_context, v_context, context_lens, context_index, block_table, window, real))
    elif k_context is not None or v_context is not None:
        raise ValueError("k_context and v_context: expected both or neither, got one")
    elif context_lens is not None or context_index is not None or block_table is not None:
        raise ValueError("context_lens, context_index, block_table: expected none without a context")
    return finish(*attend(zero_outside(q, real), parts, scale, softcap), q.dtype, return_lse, out)


def context_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    context_lens: Lengths | None = None,
    context_index: Tensor | None = None,
    block_table: Tensor | None = None,
    block_lens: Lengths | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The context half of `block_attention`: the same arguments, without the block's own keys. Differentiable in q."""
    check_queries(q, window, scale, softcap, out, ())
    batch, length = q.shape[:2]
    lens = as_lengths(block_lens, length, batch, length, "block_lens", q.device)
    real = torch.arange(length, device=q.device) < lens[:, None]  # [B,S]
    part = read_context(q, k_context, v_context, context_lens, context_index, block_table, window, real)
    return finish(*attend(zero_outside(q, real), [part], scale, softcap), q.dtype, return_lse, out)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

        lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    out_a, out_b: [..., D], same dtype; lse_a, lse_b: [...] in float32 (float64 for float64 outputs).
    A side whose lse is -inf, or +inf as FlashAttention writes it, saw no key: it contributes nothing, whatever its out
    holds; two such sides give 0 and -inf.
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
        raise ValueError("k_context, v_context: the context is frozen, expected no requires_grad; detach them")
    if k.requires_grad or v.requires_grad:
        raise ValueError("k, v: append_kv is not differentiable, expected tensors without requires_grad; detach them")
    if k.shape != v.shape or k.shape[2:] != k_context.shape[2:]:
        expected = ["B", "S", *k_context.shape[2:]]
        raise ValueError(f"k, v: expected {expected} as in the context, got {list(k.shape)}, {list(v.shape)}")
    batch, length = k.shape[:2]
    rows, table, capacity = context_rows(batch, k_context, context_index, block_table)
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
    q: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]], scale: float | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all parts' keys together. A part: (k [B,T,Hkv,D], v, visible [B,S,T]), all finite."""
    batch, length, heads, dim = q.shape
    kv_heads = parts[0][0].shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)  # [B,S,Hkv,R,D]: query heads by their key head
    logits = []
    for k, _, visible in parts:
        logit = torch.einsum("bsgrd,btgd->bsgrt", grouped, k) * (dim**-0.5 if scale is None else scale)
        if softcap:
            logit = softcap * torch.tanh(logit / softcap)
        logits.append(logit.masked_fill(~visible[:, :, None, None, :], -torch.inf))
    weights, lse = softmax_and_lse(torch.cat(logits, dim=-1), dim=-1)  # [B,S,Hkv,R,all T], [B,S,Hkv,R]
    out = torch.zeros_like(grouped)
    for weight, (_, v, _) in zip(weights.split([k.shape[1] for k, _, _ in parts], dim=-1), parts, strict=True):
        out = out + torch.einsum("bsgrt,btgd->bsgrd", weight, v)
    return out.reshape(q.shape), lse.reshape(batch, length, heads)


def read_context(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    context_lens: Lengths | None,
    context_index: Tensor | None,
    block_table: Tensor | None,
    window: int | None,
    real: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each batch row's context as (k [B,T,Hkv,D], v, visible [B,S,T]): gathered, upcast, zero where nobody looks."""
    check_like_queries(q, k_context=k_context, v_context=v_context)
    check_context(q, k_context, v_context)
    check_heads(q, k_context, "k_context")
    rows, table, capacity = context_rows(q.shape[0], k_context, context_index, block_table)
    lens = as_lengths(context_lens, capacity, q.shape[0], capacity, "context_lens", q.device)
    positions = torch.arange(capacity, device=q.device)
    seen = positions < lens[:, None]  # [B,T]
    if window is not None:
        seen = seen & (positions >= lens[:, None] - window)
    if table is not None:
        used = torch.arange(table.shape[1], device=q.device) * k_context.shape[1] < lens[:, None]  # [B,n]
        page = torch.where(used, table[rows], 0)
        check_pages(page, k_context)
        shape = (q.shape[0], capacity, *k_context.shape[2:])
        keys, values = (pool[page].reshape(shape) for pool in (k_context, v_context))  # [B,n,page,Hkv,D] -> [B,T,Hkv,D]
    elif context_index is not None:
        keys, values = k_context[rows], v_context[rows]
    else:
        keys, values = k_context, v_context
    return zero_outside(keys, seen), zero_outside(values, seen), seen[:, None, :] & real[:, :, None]


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


# Sizes not named take the value in DEFAULTS; context None is no context at all, page None dense storage.
DEFAULTS: dict[str, Any] = {
    "batch": 2, "block": 5, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": None, "context_rows": None,
    "context_index": None, "page": None, "context_lens": None, "block_lens": None, "transposed": False,
}  # fmt: skip

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "block_attention": {
        "tiny": dict(context=7, context_lens=[7, 3]),
        "no_context": dict(),
        "whole_context": dict(context=6),
        "zero_context": dict(context=4, context_lens=[0, 0]),
        "zero_storage": dict(context=0),
        "one_token": dict(batch=3, block=1, context=5, context_lens=[0, 1, 5]),
        "no_tokens": dict(block=0, context=5),
        "empty_batch": dict(batch=0, context=5),
        "causal": dict(batch=3, block=7, context=9, context_lens=[9, 0, 4], causal=True),
        "prefill_ragged": dict(batch=4, block=9, block_lens=[9, 0, 1, 6], causal=True),
        "ragged": dict(batch=3, block=5, context=9, context_lens=[9, 0, 2], block_lens=[5, 0, 3]),
        "window": dict(batch=4, context=12, context_lens=[12, 5, 1, 0], window=5),
        "window_zero": dict(context=6, window=0),
        "softcap": dict(context=7, context_lens=[7, 2], softcap=2.0, scale=0.7),
        "multi_query": dict(heads=6, kv_heads=1, context=7, context_lens=[2, 7]),
        "multi_head": dict(heads=3, kv_heads=3, head_dim=5, context=7, context_lens=[2, 7]),
        "group_of_16": dict(heads=32, kv_heads=2, head_dim=16, block=16, context=33, context_lens=[33, 17]),
        "shared_context": dict(
            batch=5, context=8, context_rows=2, context_index=[1, 0, 1, 1, 0], context_lens=[8, 2, 0, 4, 5]
        ),
        "paged": dict(batch=3, context=12, page=4, context_lens=[12, 0, 5]),
        "paged_shared": dict(
            batch=4, context=21, page=7, context_rows=2, context_index=[0, 0, 1, 1], context_lens=[3, 21, 7, 8]
        ),
        "paged_window": dict(batch=3, context=21, page=7, context_lens=[3, 21, 8], window=6, causal=True),
        "transposed": dict(context=9, context_lens=[9, 4], transposed=True),
        "wide_head": dict(head_dim=256, context=5),
        "widest_head": dict(head_dim=512, heads=2, kv_heads=1, context=5),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
        "released_128k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=131072),
        "released_4k_batch_64": dict(batch=64, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
        "released_prefill": dict(batch=1, block=4096, heads=32, kv_heads=2, head_dim=128, causal=True),
    },
    "context_attention": {
        "tiny": dict(context=7, context_lens=[7, 3]),
        "zero_context": dict(context=4, context_lens=[0, 2]),
        "zero_storage": dict(context=0),
        "ragged": dict(batch=3, context=9, context_lens=[9, 0, 2], block_lens=[5, 2, 0]),
        "window_softcap": dict(batch=3, context=12, context_lens=[12, 5, 1], window=4, softcap=3.0),
        "shared_context": dict(
            batch=4, context=8, context_rows=1, context_index=[0, 0, 0, 0], context_lens=[8, 2, 0, 4]
        ),
        "paged": dict(batch=3, context=12, page=4, context_lens=[12, 0, 5]),
        "transposed": dict(context=9, context_lens=[9, 4], transposed=True),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
    },
    "merge_attention": {
        "tiny": dict(),
        "empty_sides": dict(batch=3, empty_a=[0, 1], empty_b=[1, 2]),
        "no_tokens": dict(block=0),
        "released": dict(batch=1, block=16, heads=32, head_dim=128),
    },
    "append_kv": {
        "tiny": dict(context=12, context_lens=[7, 0]),
        "fills_storage": dict(context=5, context_lens=[0, 0]),
        "ragged": dict(batch=3, context=12, context_lens=[7, 12, 0], block_lens=[5, 0, 1]),
        "no_tokens": dict(block=0, context=4, context_lens=[4, 1]),
        "indexed": dict(context=12, context_rows=4, context_index=[3, 1], context_lens=[7, 2]),
        "paged": dict(batch=3, context=12, page=4, context_lens=[7, 3, 0], block_lens=[5, 5, 2]),
        "transposed": dict(context=12, context_lens=[7, 0], transposed=True),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096, context_lens=[4080]),
    },
}  # fmt: skip


def make_inputs(
    op: str,
    case: str | dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for `op`: standard normal, NaN wherever a length says that nobody looks.

    case: a name in CASES[op] or a dict of sizes; keys that are no size (causal, window, ...) pass through. Unused
    block-table entries are -1. A merge case's empty_a, empty_b list batch rows that saw no key (out NaN, lse -inf).
    """
    given = CASES[op][case] if isinstance(case, str) else case
    sizes = DEFAULTS | given
    options = {name: value for name, value in given.items() if name not in DEFAULTS}
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, tokens: int, heads: int) -> Tensor:
        shape = (rows, heads, tokens) if sizes["transposed"] else (rows, tokens, heads)
        x = torch.randn(*shape, sizes["head_dim"], generator=generator, device=device).to(dtype)
        return x.transpose(1, 2) if sizes["transposed"] else x  # [rows, tokens, heads, head_dim]

    batch, block, heads, kv_heads = (sizes[name] for name in ("batch", "block", "heads", "kv_heads"))
    if op == "merge_attention":
        inputs: dict[str, Any] = {}
        for side in ("a", "b"):
            out = draw(batch, block, heads)
            lse = torch.randn(batch, block, heads, generator=generator, device=device)
            lse = lse.double() if dtype == torch.float64 else lse
            rows = options.get(f"empty_{side}", [])
            out[rows], lse[rows] = torch.nan, -torch.inf
            inputs |= {f"out_{side}": out, f"lse_{side}": lse}
        return inputs

    names = {"block_attention": "qkv", "context_attention": "q", "append_kv": "kv"}[op]
    inputs = options | {name: draw(batch, block, heads if name == "q" else kv_heads) for name in names}
    blocks = [inputs[name] for name in names]
    counts = sizes["block_lens"] or [block] * batch
    for x in blocks:
        for row, count in enumerate(counts):
            x[row, count:] = torch.nan
    for name in ("context_lens", "block_lens", "context_index"):
        if sizes[name] is not None:
            inputs[name] = torch.tensor(sizes[name], dtype=torch.int64, device=device)
    if sizes["context"] is None:
        return inputs

    readers = range(batch) if sizes["context_index"] is None else sizes["context_index"]
    tokens, rows = sizes["context"], sizes["context_rows"] or batch
    lens = sizes["context_lens"] or [tokens] * batch
    written, reserved = [0] * rows, [0] * rows
    for row, length, count in zip(readers, lens, counts, strict=True):
        written[row] = max(written[row], length)
        reserved[row] = max(reserved[row], length + (count if op == "append_kv" else 0))
    page = sizes["page"]
    if page is not None:
        table = torch.randperm(rows * (tokens // page) + 1, generator=generator, device=device)  # one page stays unused
        pool_pages, table = len(table), table[1:].view(rows, tokens // page).to(torch.int32)
    for name in ("k_context", "v_context"):
        dense = draw(rows, tokens, kv_heads)
        for row, length in enumerate(written):
            dense[row, length:] = torch.nan
        inputs[name] = dense
        if page is not None:
            pool = torch.full_like(draw(pool_pages, page, kv_heads), torch.nan)
            pool[table.flatten().long()] = dense.reshape(-1, page, *dense.shape[2:])  # [rows * pages, page, Hkv, D]
            inputs[name] = pool
    if page is not None:
        for row, length in enumerate(reserved):
            table[row, -(-length // page) :] = -1
        inputs["block_table"] = table
    return inputs
