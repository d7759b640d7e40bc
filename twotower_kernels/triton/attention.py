"""Attention of a block over a context and over itself. Formulas: `reference/attention.py`.

The S * Hq / Hkv query rows of a key head are packed into tiles, so that keys and values are read once for all of them,
where they lie: dense, paged or shared. Softmax is computed online in base 2 (Milakov & Gimelshein 2018; Dao et al.
2022), with sums in float32; the block's own keys are just more tiles behind those of the context.

A denoising step has few tiles of rows (4 at batch 1), so the keys are cut into splits as long as processors would idle:
how many depends on shapes alone, what each of them takes on the row's length, which only the device knows. Splits leave
their sums in float32, and a second kernel merges them. Merging in the same launch, by the last split to arrive, would
need a counter that somebody sets to zero, for the microsecond that a launch costs in a graph.

Most tiles of keys lie within all bounds: they come in a loop of their own, without masks, where one address moves from
tile to tile and the scale is part of the exponents' multiply-add. Those that cross an end of the context or of the
block, or the diagonal, come behind them. `docs/gpu_kernels.md` counts the instructions, and has predictions.

Tiles of 128 rows and 64 keys in eight warps take 203 registers and 128 KB of shared memory. Tried, by compiling: 64
keys at head_dim 256 spill registers, as does a second loop on sm_80; head_dim as a run-time number hides from the
compiler that rows are whole, and nothing is loaded ahead; queries multiplied by the scale's sign at run time are read
from shared memory again for every tile, so the sign is a constant.

Above head_dim 256 two programs share a tile of rows: each takes the logits of the whole head and sums 256 columns of
the values. Tried, by compiling, 512 columns on sm_90: with 64 rows they fill 128 registers of eight warps, spill some
120 bytes however few keys a tile has, and 64 rows are one warp group's, so that the other makes the same logits, 16
keys at a time. Halves let 128 rows and 32 keys do, in 251 registers and 224 KB; four warps with 64 rows spill. On
sm_100 that takes all registers and spills with a softcap, as do 64 rows and 64 keys: there it is 64 rows and 32 keys.
Warps that make products alone (sm_80, sm_120) read all rows of queries each, and make the same logits as others when a
tile has fewer than 8 keys per warp: hence 64 keys for eight warps, or 32 for four, where memory is short.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.triton import launch
from twotower_kernels.triton.attention_merge import merge_splits
from twotower_kernels.triton.attention_tile import (
    add_keys,
    last_seen,
    load_tile,
    page_and_slot,
    products_of,
    tile_of,
    within,
)
from twotower_kernels.triton.attention_tuning import PEELING, WIDEST, splits_for, tuning, unit
from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, machine, on_device_of, rows_contiguous
from twotower_kernels.triton.rows import length_at, row_at

COUNTS = ("length", "kv_heads", "group", "capacity", "context_rows", "pages", "window", "splits")
# Of tensors: b batch, cb row of the context or page, t token (kct: among those of a row or page), h head, last 1.
TENSORS = ("qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh")
CONTEXT_AND_OUT = ("kcb", "kct", "kch", "vcb", "vct", "vch", "ob", "ot", "oh")
INDICES = ("context_lens", "context_starts", "context_index", "table_row", "table_page", "block_lens")
INDEX_STRIDES = tuple(f"stride_{x}" for x in INDICES)
STRIDES = (*(f"stride_{x}" for x in (*TENSORS, *CONTEXT_AND_OUT)), *INDEX_STRIDES)


@triton.jit(do_not_specialize=COUNTS)
def block_attention_kernel(
    q,  # [B, S, Hq, D]
    k,  # [B, S, Hkv, D] or None, the block's own
    v,  # [B, S, Hkv, Dv]
    k_context,  # [rows, T, Hkv, D], or pages [P, PAGE, Hkv, D], or None
    v_context,
    context_lens,  # [B] or None
    context_starts,  # [B] or None
    context_index,  # [B] or None
    block_table,  # [rows, n] or None
    block_lens,  # [B] or None
    sinks,  # [Hq] contiguous or None
    out,  # [B, S, Hq, Dv]
    lse,  # [B, S, Hq] contiguous
    partial,  # [splits, B * Hkv * S * group, Dv] contiguous, or None: one split, which writes out and lse
    stats,  # [2, splits, B * Hkv * S * group] contiguous or None: largest logits, sums of weights
    length,
    kv_heads,
    group,  # query heads per key head
    capacity,  # T, or n * PAGE
    context_rows,
    pages,
    window,
    splits,
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
    factor,  # from products, or their tanh, to logits; to those of base 2 unless float32, see unit; above 0
    inner,  # from products to the argument of tanh
    CAUSAL: tl.constexpr,  # tokens that see each other and none behind them: 1, or of a block; 0: no such mask
    SLIDES: tl.constexpr,  # the window is of each query's last keys, under a causal mask on the context
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    PAGE: tl.constexpr,  # tokens of a page, 0: dense
    BLOCK_M: tl.constexpr,  # query rows of a tile
    BLOCK_N: tl.constexpr,  # keys of a tile
    DIM: tl.constexpr,  # D
    BLOCK_D: tl.constexpr,  # a power of two, at least D
    DIM_V: tl.constexpr,  # Dv
    BLOCK_V: tl.constexpr,  # columns of values and results of a program: a power of two, all of Dv or a part
    SIGN: tl.constexpr,  # of the factor as it was, -1, 0 or 1: the queries take it
    FAR: tl.constexpr,  # offsets within a row of the context, a page or a block need 64 bits
    PEEL: tl.constexpr,  # tiles that lie within all bounds come in a loop of their own, without masks
    PDL: tl.constexpr,  # the merge may be launched as soon as all programs run: it waits for them by itself
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    query_rows = length * group
    tiles = tl.cdiv(query_rows, BLOCK_M)
    PARTS: tl.constexpr = (DIM_V + BLOCK_V - 1) // BLOCK_V
    PAST_CAUSAL: tl.constexpr = CAUSAL > 0 and k is None  # the context's last keys are the block's own
    PEEL_PAST: tl.constexpr = PEEL and not SLIDES  # a window's edge crosses as many tiles as the diagonal
    item, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    pair = item // tiles
    first = (tiles - 1 - item % tiles) * BLOCK_M  # under a causal mask the last rows see the most
    split = tl.program_id(1)
    head = pair % kv_heads
    b = (pair // kv_heads).to(tl.int64)
    tokens = length_at(block_lens, b * stride_block_lens, length)
    r = first + tl.arange(0, BLOCK_M)
    token = r // group
    is_real = token < tokens
    q_heads = head * group + r % group
    column = tl.arange(0, BLOCK_D)
    v_column = part * BLOCK_V + tl.arange(0, BLOCK_V)

    # Tiles of keys: the context's, then the block's own. Every split takes its share of what there is.
    begin, end, own_keys = 0, 0, 0
    if k_context is not None:
        end = length_at(context_lens, b * stride_context_lens, capacity)
        common = end  # every row sees the keys up to here
        begin = 0 if SLIDES else tl.maximum(end - window, 0)
        if context_starts is not None:
            begin = tl.maximum(begin, length_at(context_starts, b * stride_context_starts, capacity))
        if PAST_CAUSAL:
            origin = end - tokens
            last = tl.minimum((first + BLOCK_M - 1) // group, tokens - 1)
            common = tl.minimum(end, origin + last_seen(first // group, CAUSAL) + 1)
            end = tl.minimum(end, origin + last_seen(last, CAUSAL) + 1)
        if SLIDES:
            begin = tl.maximum(begin, origin + first // group - window + 1)
    if k is not None:
        own_keys = tl.minimum(tokens, last_seen((first + BLOCK_M - 1) // group, CAUSAL) + 1) if CAUSAL else tokens
    context_tiles = tl.cdiv(end, BLOCK_N) - begin // BLOCK_N
    context_tiles = tl.where(end > begin, context_tiles, 0)
    count = tl.where(first < tokens * group, context_tiles + tl.cdiv(own_keys, BLOCK_N), 0).to(tl.int64)
    low, high = (count * split // splits).to(tl.int32), (count * (split + 1) // splits).to(tl.int32)

    at = b * stride_qb + token.to(tl.int64) * stride_qt + q_heads.to(tl.int64) * stride_qh
    here = is_real & (low < high)
    queries = tl.load(q + at[:, None] + column[None, :], mask=within(here, column, DIM), other=0)
    if SIGN != 1:
        queries *= SIGN
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks is not None:  # a logit before all others, without a value
        l_i += tl.where(split == 0, 1.0, 0.0)
        sink = tl.load(sinks + q_heads) * (1.4426950408889634 / UNIT)
        m_i = tl.where(split == 0, sink, m_i)

    if k_context is not None:
        context_row = row_at(context_index, b, stride_context_index, context_rows)
        k_past = k_context + head.to(tl.int64) * stride_kch
        v_past = v_context + head.to(tl.int64) * stride_vch
        entry = block_table
        if PAGE == 0:
            k_past += context_row * stride_kcb
            v_past += context_row * stride_vcb
        else:
            entry += context_row * stride_table_row
        # Tiles [whole, rest) lie between begin and end. The first and the last may not: they come by themselves, and no
        # other is masked.
        skipped = begin // BLOCK_N
        whole = tl.cdiv(begin, BLOCK_N) - skipped
        rest = tl.maximum(common // BLOCK_N - skipped, whole)
        for CROSSING in tl.static_range(1 - PEEL_PAST, 2):
            if not PEEL_PAST:
                since, until, step = low, tl.minimum(high, context_tiles), 1
            elif CROSSING:
                since = tl.where(low < whole, low, tl.maximum(low, rest))
                until, step = tl.minimum(high, context_tiles), tl.maximum(rest - since, 1)
            else:
                since, until, step = tl.maximum(low, whole), tl.minimum(high, rest), 1
            for t in range(since, until, step):
                start = (skipped + t) * BLOCK_N
                position = start + tl.arange(0, BLOCK_N)
                seen = (position >= begin) & (position < end)
                there = seen if CROSSING else None
                page, slot = page_and_slot(start, seen, entry, stride_table_page, pages, PAGE, BLOCK_N, FAR)
                keys = load_tile(
                    tile_of(k_past, page, slot, stride_kcb, stride_kct, column, BLOCK_N), there, column, DIM
                )
                qk = products_of(queries, keys, inner, SOFTCAP)
                if CROSSING and PAST_CAUSAL:
                    visible = seen[None, :] & (position[None, :] <= origin + last_seen(token, CAUSAL)[:, None])
                    if SLIDES:
                        visible = visible & (position[None, :] > (origin + token - window)[:, None])
                    qk = tl.where(visible, qk, float("-inf"))
                elif CROSSING:
                    qk += tl.where(seen, 0.0, float("-inf"))[None, :]
                values = load_tile(
                    tile_of(v_past, page, slot, stride_vcb, stride_vct, v_column, BLOCK_N), there, v_column, DIM_V
                )
                acc, m_i, l_i = add_keys(qk, values, acc, m_i, l_i, factor, UNIT)

    if k is not None:
        k_own = k + b * stride_kb + head.to(tl.int64) * stride_kh
        v_own = v + b * stride_vb + head.to(tl.int64) * stride_vh
        whole = (
            tl.minimum(own_keys, last_seen(first // group, CAUSAL) + 1) if CAUSAL else own_keys
        ) // BLOCK_N  # tiles that every row sees all of
        for CROSSING in tl.static_range(1 - PEEL, 2):
            since, until = tl.maximum(low - context_tiles, 0), high - context_tiles
            if not CROSSING:
                until = tl.minimum(until, whole)
            elif PEEL:
                since = tl.maximum(since, whole)
            for t in range(since, until):
                _, start = page_and_slot(t * BLOCK_N, None, None, 0, 0, 0, BLOCK_N, FAR)
                position = t * BLOCK_N + tl.arange(0, BLOCK_N)
                seen = position < own_keys
                there = seen if CROSSING else None
                keys = load_tile(tile_of(k_own, 0, start, 0, stride_kt, column, BLOCK_N), there, column, DIM)
                qk = products_of(queries, keys, inner, SOFTCAP)
                if CROSSING:
                    if CAUSAL:
                        visible = position[None, :] <= last_seen(token, CAUSAL)[:, None]
                        qk = tl.where(visible & seen[None, :], qk, float("-inf"))
                    else:
                        qk += tl.where(seen, 0.0, float("-inf"))[None, :]
                values = load_tile(tile_of(v_own, 0, start, 0, stride_vt, v_column, BLOCK_N), there, v_column, DIM_V)
                acc, m_i, l_i = add_keys(qk, values, acc, m_i, l_i, factor, UNIT)

    inside = r < query_rows
    if partial is None:
        l_safe = tl.where(l_i == 0, 1.0, l_i)
        result = tl.where(is_real[:, None], acc / l_safe[:, None], 0.0)
        at = b * stride_ob + token.to(tl.int64) * stride_ot + q_heads.to(tl.int64) * stride_oh
        where = within(inside, v_column, DIM_V)
        tl.store(out + at[:, None] + v_column[None, :], result.to(out.dtype.element_ty), mask=where)
        at = (b * length + token) * kv_heads * group + q_heads
        logarithm = m_i * (UNIT * 0.6931471805599453) + tl.log2(l_safe) * 0.6931471805599453
        tl.store(lse + at, tl.where(is_real, logarithm, float("-inf")), mask=inside & (part == 0))
    else:
        l_i = tl.where(is_real, l_i, 0.0)
        total_rows = (tl.num_programs(0) // PARTS // tiles).to(tl.int64) * query_rows
        at = split * total_rows + pair.to(tl.int64) * query_rows + r
        tl.store(stats + at, m_i, mask=inside & (part == 0))
        tl.store(stats + splits * total_rows + at, l_i, mask=inside & (part == 0))
        where = within(inside & (l_i != 0), v_column, DIM_V)  # NaN is no 0
        tl.store(partial + at[:, None] * DIM_V + v_column[None, :], acc, mask=where)


def arguments_of(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, k_context: Tensor | None, v_context: Tensor | None,
    context_lens: Tensor | None, context_starts: Tensor | None, context_index: Tensor | None,
    block_table: Tensor | None, block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float, out: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What all of attention's kernels are given, by name. A context without room for a token is none."""
    check_dtype(op, q=q)
    dim, value_dim = q.shape[3], out.shape[3]
    if max(dim, value_dim) > WIDEST:
        got = max(dim, value_dim)
        raise NotImplementedError(f"{op} on {q.device.type}: expected head_dim up to {WIDEST}, got {got}")
    kv_heads = (k if k is not None else k_context).shape[2]  # type: ignore[union-attr]
    slides = causal > 0 and k is None and window is not None
    page, rows, capacity, pages = 0, 0, 0, 0
    if k_context is not None:
        rows, capacity = k_context.shape[:2]
        if block_table is not None:
            pages, page = rows, capacity
            rows, capacity = block_table.shape[0], block_table.shape[1] * page
        if 0 in (rows, capacity) or (page and not pages) or window == 0:
            k_context = v_context = context_index = block_table = None
            capacity = page = 0
    if k_context is None:
        context_lens = context_starts = None
        slides = False
    tensors = {"q": q, "k": k, "v": v, "k_context": k_context, "v_context": v_context}
    tensors = {name: rows_contiguous(x) for name, x in tensors.items()}
    # Whether a row of the context, a page or a block is so long that 32 bits do not hold every offset in it.
    own_and_past = [x for name, x in tensors.items() if name != "q" and x is not None]
    far = any(x.shape[1] * x.stride(1) + max(dim, value_dim) >= 2**31 for x in own_and_past)
    strides = [n for x in (*tensors.values(), out) for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    strides += [0 if x is None else x.stride(0) for x in (context_lens, context_starts, context_index)]
    strides += (0, 0) if block_table is None else block_table.stride()
    strides += [0 if block_lens is None else block_lens.stride(0)]
    tensors |= {"context_lens": context_lens, "context_starts": context_starts, "context_index": context_index}
    tensors |= {"block_table": block_table, "block_lens": block_lens}
    tensors |= {"sinks": None if sinks is None else sinks.contiguous()}
    most = capacity + q.shape[1] if slides else capacity
    seen = most if window is None else min(window, most)
    counts = q.shape[1], kv_heads, q.shape[2] // kv_heads, capacity, rows, pages, seen
    scale = dim**-0.5 if scale is None else scale
    return (
        tensors
        | dict(zip(COUNTS[:-1], counts, strict=True))
        | dict(zip(STRIDES, strides, strict=True))
        | {"factor": (softcap or scale) * math.log2(math.e) / unit(q.dtype)}
        | {"inner": scale / softcap if softcap else 0.0}
        | {"CAUSAL": min(causal, max(q.shape[1], 1)), "SLIDES": slides, "SOFTCAP": softcap > 0, "UNIT": unit(q.dtype)}
        | {"PAGE": page, "DIM": dim, "BLOCK_D": block_of(dim), "DIM_V": value_dim, "FAR": far}
    )


def block_of(dim: int) -> int:
    """Columns of a tile that holds whole rows."""
    return max(16, triton.next_power_of_2(dim))


def forward(given: dict[str, Any], arch: int) -> dict[str, Any]:
    """What the forward kernel takes: a factor above 0, and its sign by itself."""
    factor = given["factor"]
    sign = (factor > 0) - (factor < 0)
    return given | {"factor": abs(factor) or 1.0, "SIGN": sign, "PEEL": arch in PEELING}


def block_attention_out(q: Tensor, k: Tensor | None, *arguments: Any) -> None:
    out, lse = arguments[-2:]
    written: list[Any] = [
        out if rows_contiguous(out) is out else out.new_empty(out.shape),
        lse if lse.is_contiguous() else lse.new_empty(lse.shape),
    ]
    given = arguments_of("block_attention", *(q, k, *arguments[:-2], written[0]))
    if out.numel() == 0:
        return
    (batch, length, heads, dim), value_dim = q.shape, out.shape[3]
    arch, processors = machine(q.device)
    query_rows = length * given["group"]
    tune = tuning(q.dtype, query_rows, max(dim, value_dim), arch)
    items = batch * given["kv_heads"] * -(-query_rows // tune.block_m) * tune.parts(value_dim)
    past = given["capacity"] if given["SLIDES"] else given["window"]
    tiles = -(-past // tune.block_n) + (0 if k is None else -(-length // tune.block_n))
    splits = splits_for(items, tiles, processors)
    partial = stats = None
    pdl = splits > 1 and launch.PDL and q.is_cuda and arch >= 90
    if splits > 1:
        partial = q.new_empty((splits, batch * length * heads, value_dim), dtype=torch.float32)
        stats = q.new_empty((2, splits, batch * length * heads), dtype=torch.float32)
    with on_device_of(q):
        block_attention_kernel[(items, splits)](
            **forward(given, arch),
            out=written[0],
            lse=written[1],
            partial=partial,
            stats=stats,
            splits=splits,
            PDL=pdl,
            **tune.launch(block_of(value_dim)),
        )
        if partial is not None and stats is not None:
            merge_splits(partial, stats, written[0], written[1], given["kv_heads"], given["UNIT"], pdl)
    for x, result in zip((out, lse), written, strict=True):
        if result is not x:
            x.copy_(result)


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def block_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(q, v)
    block_attention_out(*(q, k, v, *arguments, *results))
    return results


def context_attention_out(q: Tensor, *arguments: Any) -> None:
    block_attention_out(*(q, None, None, *arguments))


def context_attention(q: Tensor, k_context: Tensor, v_context: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(q, v_context)
    context_attention_out(*(q, k_context, v_context, *arguments, *results))
    return results


def builds(arch: int) -> Iterator[Build]:
    """What the launchers ask for at head_dim 64, 128 and 256: denoising over a dense and a paged context, commit and
    prefill, cut into splits and whole. At 512 one kind of tiles serves all numbers of rows. At the released size also
    what they ask for with `launch.PDL`, a context of far strides, and a scale below 0; a causal context, sliding and
    not, with left padding; blocks in a sequence; sinks; and values narrower than keys."""
    for dim in (64, 128, 256):
        for dtype in DTYPES:
            yield _build(dtype, dim, 256, arch, causal=0, split=True)
            yield _build(dtype, dim, 256, arch, causal=1, split=False, paged=True)
        yield _build(torch.bfloat16, dim, 16, arch, causal=1, split=True, paged=True)
        yield _build(torch.bfloat16, dim, 65536, arch, causal=1, split=False, context=False)
        for dtype in (torch.bfloat16, torch.float32):
            yield _build(dtype, dim, 65536, arch, causal=1, split=False, own=False, slides=True, starts=True)
            yield _build(dtype, dim, 65536, arch, causal=32, split=False, context=False, sinks=True)
    yield _build(torch.bfloat16, 128, 65536, arch, causal=1, split=False, own=False, starts=True, sinks=True)
    yield _build(torch.bfloat16, 192, 65536, arch, causal=1, split=True, own=False, paged=True, value_dim=128)
    yield _build(torch.bfloat16, 192, 256, arch, causal=0, split=True, value_dim=128, sinks=True)
    dense = _build(torch.bfloat16, 128, 256, arch, causal=0, split=True)
    yield replace(dense, constants={**dense.constants, "FAR": True, "SIGN": -1})
    if arch >= 90:
        yield replace(dense, constants={**dense.constants, "PDL": True}, needs=(*dense.needs, "griddepcontrol"))
    yield _build(torch.bfloat16, WIDEST, 256, arch, causal=0, split=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield _build(dtype, WIDEST, 256, arch, causal=1, split=False, paged=True)
        yield _build(dtype, WIDEST, 65536, arch, causal=1, split=False, own=False, slides=True, starts=True, sinks=True)


def _build(
    dtype: torch.dtype, dim: int, rows: int, arch: int, *, causal: int, split: bool, own: bool = True,
    context: bool = True, paged: bool = False, slides: bool = False, starts: bool = False, sinks: bool = False,
    value_dim: int | None = None,
) -> Build:  # fmt: skip
    values = value_dim or dim
    tune, name = tuning(dtype, rows, max(dim, values), arch), f"*{DTYPES[dtype]}"
    types = {x: name for x in ("q", "out")} | {"lse": "*fp32"} | ({"block_lens": "*i64"} if causal else {})
    types |= {"k": name, "v": name} if own else {}
    types |= {"k_context": name, "v_context": name, "context_lens": "*i64"} if context else {}
    types |= {"block_table": "*i32", "context_index": "*i64"} if context and paged else {}
    types |= {"context_starts": "*i64"} if starts else {}
    types |= {"sinks": "*fp32"} if sinks else {}
    types |= {"partial": "*fp32", "stats": "*fp32"} if split else {}
    pointers = block_attention_kernel.arg_names[:15]
    types |= {x: "i32" for x in COUNTS + STRIDES} | {"factor": "fp32", "inner": "fp32"}
    constants: dict[str, Any] = {x: None for x in pointers if x not in types}
    constants |= {"CAUSAL": causal, "SLIDES": slides, "SOFTCAP": False, "UNIT": unit(dtype)}
    constants |= {"PAGE": 64 if context and paged else 0, "DIM": dim, "BLOCK_D": block_of(dim), "DIM_V": values}
    constants |= {"FAR": False, "SIGN": 1, "PEEL": arch in PEELING, "PDL": False}
    constants |= {name: x for name, x in tune.launch(block_of(values)).items() if name.startswith("BLOCK")}
    needs = ("wgmma",) if dtype != torch.float32 else ()
    odd = frozenset(COUNTS + INDEX_STRIDES)
    return Build(block_attention_kernel, types, constants, tune.num_warps, tune.num_stages, odd, needs)
