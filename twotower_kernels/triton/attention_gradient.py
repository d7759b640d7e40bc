"""Gradients of attention in q, in the block's own keys and values, and in sinks. Formulas: `reference/attention.py`.

The context gets none, so nobody but a block's own queries looks at its keys: every sum is taken by one program, in one
order, without atomics. Three launches: the forward kernel once more, which leaves each row's sums, largest logit and
weight in float32 (what a log-sum-exp would round away where logits are large); then one program per tile of query rows,
over all the keys that it sees; then one per tile of own keys, over all the rows that see it.

With the logits' weights p, `delta` the product of a row's output and its gradient, and g the gradient of its
log-sum-exp: ds = p * (grad_out . v - delta + g), grad_q = scale * ds k, grad_k = scale * ds^T q, grad_v = p^T grad_out.
A sink is one more logit, whose grad_out . v is 0.

Where a head is wide, programs share a tile as in the forward kernel: each makes both products of whole heads and sums
its own columns of the gradients. Tried, by compiling, for queries at head_dim 256 on sm_90: 64 rows and 32 keys fit
whole (227 registers), but 64 rows are one warp group's, and the other makes the same products. 128 rows, 32 keys and
halves of 128 columns take 254 registers without a spill, and every group its own rows; likewise 128 keys and
32 rows for the gradients of keys (240). At 512, 64 rows leave room for 16 keys and a quarter of the columns, which
reads shared memory more than 32 rows and 32 keys, whole, in products of single warps: no wgmma there.
float32: operands in shared memory are read into registers early, but not past a barrier, and one for this step's tile
came later. So they stayed: 230 registers at head_dim 64, kilobytes of spills at 256. With the barrier first (`settled`)
it is 80, and 156 at 256. The compiler spills a few to make room for one more block per processor (32 rows and keys in
eight warps at head_dim 64 on sm_100): tiles and warps are those with which it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton import attention
from twotower_kernels.triton.attention import COUNTS, INDEX_STRIDES, STRIDES, block_of
from twotower_kernels.triton.attention_tile import capped, last_seen, page_and_slot, tile_of, within
from twotower_kernels.triton.attention_tuning import Tuning, gradient_tuning, tuning, unit
from twotower_kernels.triton.launch import DTYPES, Build, machine, on_device_of, rows_contiguous
from twotower_kernels.triton.rows import length_at, row_at


@triton.jit
def p_and_ds(products, dp, seen, base, inv_l, delta, factor, inner, SOFTCAP: tl.constexpr, UNIT: tl.constexpr):
    """Weights of the softmax and gradients of products (without the scale), from products q k and grad_out v. Of
    queries and keys either may come first: what belongs to a query's row comes with its axis."""
    bounded = capped(products, inner, SOFTCAP)
    p = tl.where(seen, tl.exp2((bounded * factor - base) * UNIT), 0.0) * inv_l
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= 1 - bounded * bounded
    return p, ds


@triton.jit
def settled(tile):
    """The tile, in float32 in shared memory before anything else is read from there: see above. (16-bit tiles have been
    on their way since the step before; nothing may wait for them here.)"""
    if tile.dtype == tl.float32:
        tl.debug_barrier()
    return tile


@triton.jit
def within_both(rows, column, dim: tl.constexpr, other: tl.constexpr):
    """`within`, where programs are as many as the wider of two rows takes: some may lie beyond the narrower."""
    if dim >= other:
        return within(rows, column, dim)
    else:
        return rows[:, None] & (column < dim)[None, :]


@triton.jit(do_not_specialize=COUNTS[:-1])
def query_gradient_kernel(
    q,  # these as in block_attention_kernel
    k,
    v,
    k_context,
    v_context,
    context_lens,
    context_starts,
    context_index,
    block_table,
    block_lens,
    grad_out,  # [B, S, Hq, Dv]
    grad_lse,  # [B, S, Hq] contiguous
    acc,  # [B * Hkv * S * group, Dv], what the forward pass left of its values
    stats,  # [2, B * Hkv * S * group], and of its largest logits and weights
    delta,  # [B * Hkv * S * group] out: grad_out . out - grad_lse
    grad_q,  # [B, S, Hq, D] contiguous, out
    length,
    kv_heads,
    group,
    capacity,
    context_rows,
    pages,
    window,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_context_lens,
    stride_context_starts,
    stride_context_index,
    stride_table_row,
    stride_table_page,
    stride_block_lens,
    scale,
    factor,
    inner,
    CAUSAL: tl.constexpr,
    SLIDES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_E: tl.constexpr,  # a power of two, at least DIM_V
    BLOCK_K: tl.constexpr,  # columns of the gradient that a program sums
    BLOCK_V: tl.constexpr,  # of results that it reads at a time
    FAR: tl.constexpr,
):
    query_rows = length * group
    tiles = tl.cdiv(query_rows, BLOCK_M)
    PARTS: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    item, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    pair = item // tiles
    first = (tiles - 1 - item % tiles) * BLOCK_M
    head = pair % kv_heads
    b = (pair // kv_heads).to(tl.int64)
    tokens = length_at(block_lens, b * stride_block_lens, length)
    r = first + tl.arange(0, BLOCK_M)
    token = r // group
    is_real = token < tokens
    q_heads = (head * group + r % group).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    v_column = tl.arange(0, BLOCK_E)
    out_column = part * BLOCK_K + tl.arange(0, BLOCK_K)
    q_at = b * stride_qb + token.to(tl.int64) * stride_qt + q_heads * stride_qh
    out_at = b * stride_ob + token.to(tl.int64) * stride_ot + q_heads * stride_oh

    total_rows = (tl.num_programs(0) // PARTS // tiles).to(tl.int64) * query_rows
    packed = pair.to(tl.int64) * query_rows + r
    m_i = tl.load(stats + packed, mask=is_real, other=float("-inf"))
    l_i = tl.load(stats + total_rows + packed, mask=is_real, other=0)
    some = is_real & (l_i != 0)  # NaN is no 0
    inv_l = 1 / tl.where(l_i == 0, 1.0, l_i)
    base = tl.where(m_i == float("-inf"), 0.0, m_i)
    delta_i = tl.zeros((BLOCK_M,), tl.float32)
    for one in tl.static_range((DIM_V + BLOCK_V - 1) // BLOCK_V):
        columns = one * BLOCK_V + tl.arange(0, BLOCK_V)
        where = within(some, columns, DIM_V)
        result = tl.load(acc + packed[:, None] * DIM_V + columns[None, :], mask=where, other=0)
        do = tl.load(grad_out + out_at[:, None] + columns[None, :], mask=where, other=0)
        delta_i += tl.sum(result * do.to(tl.float32), 1)
    delta_i *= inv_l
    unpacked = (b * length + token) * kv_heads * group + q_heads
    delta_i -= tl.load(grad_lse + unpacked, mask=some, other=0)
    tl.store(delta + packed, delta_i, mask=is_real & (part == 0))

    there = within(is_real, column, DIM)
    queries = tl.load(q + q_at[:, None] + column[None, :], mask=there, other=0)
    do = tl.load(grad_out + out_at[:, None] + v_column[None, :], mask=within(is_real, v_column, DIM_V), other=0)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    live = first < tokens * group
    if k_context is not None:
        end = tl.where(live, length_at(context_lens, b * stride_context_lens, capacity), 0)
        begin = 0 if SLIDES else tl.maximum(end - window, 0)
        if context_starts is not None:
            begin = tl.maximum(begin, length_at(context_starts, b * stride_context_starts, capacity))
        if CAUSAL > 0 and k is None:
            origin = end - tokens
            last = tl.minimum((first + BLOCK_M - 1) // group, tokens - 1)
            end = tl.where(live, tl.minimum(end, origin + last_seen(last, CAUSAL) + 1), 0)
        if SLIDES:
            begin = tl.maximum(begin, origin + first // group - window + 1)
        context_row = row_at(context_index, b, stride_context_index, context_rows)
        k_past = k_context + head.to(tl.int64) * stride_kch
        v_past = v_context + head.to(tl.int64) * stride_vch
        entry = block_table
        if PAGE == 0:
            k_past += context_row * stride_kcb
            v_past += context_row * stride_vcb
        else:
            entry += context_row * stride_table_row
        for t in range(begin // BLOCK_N, tl.cdiv(end, BLOCK_N)):
            start = t * BLOCK_N
            position = start + tl.arange(0, BLOCK_N)
            seen = (position >= begin) & (position < end)
            page, slot = page_and_slot(start, seen, entry, stride_table_page, pages, PAGE, BLOCK_N, FAR)
            inside = within(seen, column, DIM)
            k_at = tile_of(k_past, page, slot, stride_kcb, stride_kct, column, BLOCK_N)
            v_at = tile_of(v_past, page, slot, stride_vcb, stride_vct, v_column, BLOCK_N)
            keys = settled(tl.load(k_at, mask=inside, other=0))
            products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            values = settled(tl.load(v_at, mask=within(seen, v_column, DIM_V), other=0))
            dp = tl.dot(do, tl.trans(values), input_precision="ieee")
            visible = seen[None, :]
            if CAUSAL > 0 and k is None:
                visible = visible & (position[None, :] <= origin + last_seen(token, CAUSAL)[:, None])
            if SLIDES:
                visible = visible & (position[None, :] > (origin + token - window)[:, None])
            _, ds = p_and_ds(
                products, dp, visible, base[:, None], inv_l[:, None], delta_i[:, None],
                factor, inner, SOFTCAP, UNIT,
            )  # fmt: skip
            if PARTS > 1:
                k_at = tile_of(k_past, page, slot, stride_kcb, stride_kct, out_column, BLOCK_N)
                keys = tl.load(k_at, mask=within(seen, out_column, DIM), other=0)
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")

    if k is not None:
        own_keys = tl.minimum(tokens, last_seen((first + BLOCK_M - 1) // group, CAUSAL) + 1) if CAUSAL else tokens
        own_keys = tl.where(live, own_keys, 0)
        k_own = k + b * stride_kb + head.to(tl.int64) * stride_kh
        v_own = v + b * stride_vb + head.to(tl.int64) * stride_vh
        for t in range(0, tl.cdiv(own_keys, BLOCK_N)):
            position = t * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = within(position < own_keys, column, DIM)
            _, slot = page_and_slot(t * BLOCK_N, None, None, 0, 0, 0, BLOCK_N, FAR)
            keys = settled(tl.load(tile_of(k_own, 0, slot, 0, stride_kt, column, BLOCK_N), mask=inside, other=0))
            products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            inside = within(position < own_keys, v_column, DIM_V)
            values = settled(tl.load(tile_of(v_own, 0, slot, 0, stride_vt, v_column, BLOCK_N), mask=inside, other=0))
            dp = tl.dot(do, tl.trans(values), input_precision="ieee")
            seen = (position < own_keys)[None, :]
            if CAUSAL:
                seen = seen & (position[None, :] <= last_seen(token, CAUSAL)[:, None])
            _, ds = p_and_ds(
                products, dp, seen, base[:, None], inv_l[:, None], delta_i[:, None], factor, inner, SOFTCAP, UNIT
            )
            if PARTS > 1:
                inside = within(position < own_keys, out_column, DIM)
                keys = tl.load(tile_of(k_own, 0, slot, 0, stride_kt, out_column, BLOCK_N), mask=inside, other=0)
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")

    dq = tl.where(is_real[:, None], dq * scale, 0.0)
    where = within(r < query_rows, out_column, DIM)
    to = grad_q + unpacked[:, None] * DIM + out_column[None, :]
    tl.store(to, dq.to(grad_q.dtype.element_ty), mask=where)


@triton.jit(do_not_specialize=("length", "kv_heads", "group"))
def key_gradient_kernel(
    q,  # these as in block_attention_kernel
    k,
    v,
    block_lens,
    grad_out,
    stats,  # these as query_gradient_kernel took and left them
    delta,
    grad_k,  # [B, S, Hkv, D] contiguous, out
    grad_v,
    length,
    kv_heads,
    group,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_block_lens,
    scale,
    factor,
    inner,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns of the gradients that a program sums: of keys,
    BLOCK_V: tl.constexpr,  # and of values
):
    query_rows = length * group
    tiles = tl.cdiv(length, BLOCK_N)
    PARTS: tl.constexpr = max((DIM + BLOCK_K - 1) // BLOCK_K, (DIM_V + BLOCK_V - 1) // BLOCK_V)
    item, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    pair = item // tiles
    start = item % tiles * BLOCK_N  # under a causal mask the first keys are seen by the most
    head = pair % kv_heads
    b = (pair // kv_heads).to(tl.int64)
    tokens = length_at(block_lens, b * stride_block_lens, length)
    position = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    v_column = tl.arange(0, BLOCK_E)
    k_out, v_out = part * BLOCK_K + tl.arange(0, BLOCK_K), part * BLOCK_V + tl.arange(0, BLOCK_V)
    there = within(position < tokens, column, DIM)
    position_64 = position.to(tl.int64)
    at = b * stride_kb + position_64 * stride_kt + head.to(tl.int64) * stride_kh
    keys = tl.load(k + at[:, None] + column[None, :], mask=there, other=0)
    at = b * stride_vb + position_64 * stride_vt + head.to(tl.int64) * stride_vh
    values = tl.load(v + at[:, None] + v_column[None, :], mask=within(position < tokens, v_column, DIM_V), other=0)

    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    total_rows = (tl.num_programs(0) // PARTS // tiles).to(tl.int64) * query_rows
    begin = start // CAUSAL * CAUSAL * group // BLOCK_M if CAUSAL else 0
    end = tl.where(start < tokens, tl.cdiv(tokens * group, BLOCK_M), 0)
    for t in range(begin, end):
        r = t * BLOCK_M + tl.arange(0, BLOCK_M)
        token = r // group
        is_real = token < tokens
        q_heads = (head * group + r % group).to(tl.int64)
        inside = within(is_real, column, DIM)
        q_at = b * stride_qb + token.to(tl.int64) * stride_qt + q_heads * stride_qh
        out_at = b * stride_ob + token.to(tl.int64) * stride_ot + q_heads * stride_oh
        packed = pair.to(tl.int64) * query_rows + r
        m_i = tl.load(stats + packed, mask=is_real, other=float("-inf"))
        l_i = tl.load(stats + total_rows + packed, mask=is_real, other=0)
        delta_i = tl.load(delta + packed, mask=is_real, other=0)
        inv_l = 1 / tl.where(l_i == 0, 1.0, l_i)
        base = tl.where(m_i == float("-inf"), 0.0, m_i)
        queries = settled(tl.load(q + q_at[:, None] + column[None, :], mask=inside, other=0))
        products = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        inside = within(is_real, v_column, DIM_V)
        do = settled(tl.load(grad_out + out_at[:, None] + v_column[None, :], mask=inside, other=0))
        dp = tl.dot(values, tl.trans(do), input_precision="ieee")
        seen = is_real[None, :] & (position < tokens)[:, None]
        if CAUSAL:
            seen = seen & (position[:, None] <= last_seen(token, CAUSAL)[None, :])
        p, ds = p_and_ds(
            products, dp, seen, base[None, :], inv_l[None, :], delta_i[None, :], factor, inner, SOFTCAP, UNIT
        )
        if PARTS > 1:
            inside = within_both(is_real, k_out, DIM, DIM_V)
            queries = tl.load(q + q_at[:, None] + k_out[None, :], mask=inside, other=0)
            inside = within_both(is_real, v_out, DIM_V, DIM)
            do = tl.load(grad_out + out_at[:, None] + v_out[None, :], mask=inside, other=0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")

    row = ((b * length + position_64) * kv_heads + head)[:, None]
    where = within_both(position < length, k_out, DIM, DIM_V)
    tl.store(grad_k + row * DIM + k_out[None, :], (dk * scale).to(grad_k.dtype.element_ty), mask=where)
    where = within_both(position < length, v_out, DIM_V, DIM)
    tl.store(grad_v + row * DIM_V + v_out[None, :], dv.to(grad_v.dtype.element_ty), mask=where)


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q = q.new_zeros(q.shape)
    sinks, scale = arguments[7], arguments[-2]
    grad_k, grad_v, grad_sinks = (q.new_zeros(()) if x is None else x.new_zeros(x.shape) for x in (k, v, sinks))
    grad_out, grad_lse = rows_contiguous(grad_out), grad_lse.contiguous()  # type: ignore[assignment]
    given = attention.arguments_of("attention_backward", *(q, k, v, *arguments, grad_out))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v, grad_sinks
    (batch, length, heads, dim), value_dim = q.shape, grad_out.shape[3]
    arch, _ = machine(q.device)
    query_rows, pairs = length * given["group"], batch * given["kv_heads"]
    scale = dim**-0.5 if scale is None else scale
    acc = q.new_empty((batch * length * heads, value_dim), dtype=torch.float32)
    stats = q.new_empty((2, batch * length * heads), dtype=torch.float32)
    delta = q.new_empty(batch * length * heads, dtype=torch.float32)
    wide = max(dim, value_dim)
    tune = tuning(q.dtype, query_rows, wide, arch)
    dq_tuning, dkv_tuning = gradient_tuning(q.dtype, wide, arch)
    with on_device_of(q):
        attention.block_attention_kernel[(pairs * -(-query_rows // tune.block_m) * tune.parts(value_dim), 1)](
            **attention.forward(given, arch),
            **{"out": None, "lse": None, "partial": acc, "stats": stats, "splits": 1, "PDL": False},
            **tune.launch(block_of(value_dim)),
        )
        del given["sinks"]
        given |= {"grad_out": grad_out, "stats": stats, "delta": delta, "scale": scale}
        query_gradient_kernel[(pairs * -(-query_rows // dq_tuning.block_m) * dq_tuning.parts(dim),)](
            **given, **_launch(dq_tuning, dim, value_dim), grad_lse=grad_lse, acc=acc, grad_q=grad_q
        )
        if k is not None:
            names = key_gradient_kernel.arg_names
            given |= {"grad_k": grad_k, "grad_v": grad_v}
            key_gradient_kernel[(pairs * -(-length // dkv_tuning.block_n) * dkv_tuning.parts(wide),)](
                **{name: x for name, x in given.items() if name in names}, **_launch(dkv_tuning, dim, value_dim)
            )
    if sinks is not None:
        logits = sinks.unflatten(0, (given["kv_heads"], 1, -1)) * (math.log2(math.e) / given["UNIT"])  # [Hkv,1,group]
        m_i, l_i, each = (x.view(batch, *logits.shape[:1], length, -1) for x in (*stats, delta))  # [B,Hkv,S,group]
        grads = torch.where(l_i != 0, -torch.exp2((logits - m_i) * given["UNIT"]) / l_i * each, 0.0)
        grad_sinks = grads.sum((0, 2)).flatten()
    return grad_q, grad_k, grad_v, grad_sinks


def _launch(tune: Tuning, dim: int, value_dim: int) -> dict[str, int]:
    """What a kernel of gradients and its launch are given by name."""
    depths = block_of(dim), block_of(value_dim)
    columns = (min(depth, tune.columns) for depth in depths)
    return tune.launch(depths[1]) | {"BLOCK_E": depths[1]} | dict(zip(("BLOCK_K", "BLOCK_V"), columns, strict=True))


def builds(arch: int) -> Iterator[Build]:
    """What the launcher asks for: a block in training, with and without a context, and a causal one; of wide heads one
    build each that has it all. Of the others: blocks in a sequence, a sliding context, values narrower than keys."""
    for dtype in DTYPES:
        for dim in (64, 128) if dtype != torch.float32 else (64,):
            yield from _builds(dtype, dim, arch, causal=0, context=True)
            yield from _builds(dtype, dim, arch, causal=1, context=False)
    for dtype, dim in ((torch.float32, 128), *((x, n) for x in (torch.float32, torch.bfloat16) for n in (256, 512))):
        yield from _builds(dtype, dim, arch, causal=1, context=True)
    yield from _builds(torch.bfloat16, 128, arch, causal=32, context=False)
    yield from _builds(torch.bfloat16, 192, arch, causal=1, context=True, value_dim=128)
    yield from _builds(torch.bfloat16, 128, arch, causal=1, context=True, own=False)


def _builds(
    dtype: torch.dtype,
    dim: int,
    arch: int,
    *,
    causal: int,
    context: bool,
    own: bool = True,
    value_dim: int | None = None,
) -> Iterator[Build]:
    """The gradient of keys, then of queries. own: with keys of the block; else the context slides."""
    values = value_dim or dim
    dq_tuning, dkv_tuning = gradient_tuning(dtype, max(dim, values), arch)
    name = f"*{DTYPES[dtype]}"
    constants: dict[str, Any] = {"CAUSAL": causal, "SOFTCAP": False, "UNIT": unit(dtype)}
    constants |= {"DIM": dim, "BLOCK_D": block_of(dim), "DIM_V": values}
    types = {x: name for x in ("q", "k", "v", "grad_out")} | {"block_lens": "*i64"}
    types |= {x: "*fp32" for x in ("stats", "delta")} | {x: "fp32" for x in ("scale", "factor", "inner")}
    if own:
        yield _build(key_gradient_kernel, types | {x: name for x in ("grad_k", "grad_v")}, constants, dkv_tuning, dtype)

    types |= {"grad_q": name, "acc": "*fp32", "grad_lse": "*fp32"}
    types = types if own else {x: t for x, t in types.items() if x not in ("k", "v")}
    past = {"k_context": name, "v_context": name, "context_lens": "*i64", "context_index": "*i64"}
    past |= {} if own else {"context_starts": "*i64"}
    types |= past if context else {}
    pointers = query_gradient_kernel.arg_names[:10]
    constants |= {"PAGE": 0, "FAR": False, "SLIDES": not own} | {x: None for x in pointers if x not in types}
    yield _build(query_gradient_kernel, types, constants, dq_tuning, dtype)


def _build(kernel: Any, types: dict[str, str], constants: dict[str, Any], tune: Tuning, dtype: torch.dtype) -> Build:
    launch = _launch(tune, constants["DIM"], constants["DIM_V"])
    constants = constants | {name: x for name, x in launch.items() if name.startswith("BLOCK")}
    integers = {x: "i32" for x in (*COUNTS, *STRIDES) if x in kernel.arg_names}
    odd = frozenset(COUNTS + INDEX_STRIDES)
    fewest = tune.block_m if kernel is query_gradient_kernel else tune.block_n  # rows of the products' first side
    needs = ("wgmma",) if dtype != torch.float32 and fewest >= 64 else ()
    return Build(kernel, types | integers, constants, tune.num_warps, tune.num_stages, odd, needs)
