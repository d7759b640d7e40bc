"""What surrounds attention: merging of parts, and appending to a context. Formulas: `reference/attention.py`.

All of it moves memory and is short: a denoising step's merge reads a few MB, which the last level of cache still holds.
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

from twotower_kernels.triton.launch import DTYPES, Build, check_dtype, on_device_of, rows_contiguous

COUNTS = ("splits", "length", "kv_heads", "group")  # no kernel for each divisibility of these


@triton.jit(do_not_specialize=COUNTS)
def merge_splits_kernel(
    partial,  # [splits, B * Hkv * S * group, D], sums of values relative to 2**(top * UNIT)
    stats,  # [2, splits, B * Hkv * S * group]: top, and sums of weights relative to it; 0: there was no key
    out,  # [B, S, Hq, D]
    lse,  # [B, S, Hq] contiguous
    splits,
    length,
    kv_heads,
    group,
    stride_ob,
    stride_ot,
    stride_oh,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a row for one program
    PDL: tl.constexpr,  # launched while the splits are still computed
):
    row, query_rows = tl.program_id(0), tl.num_programs(0)
    split = tl.arange(0, SPLITS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = split * query_rows + row
    there = split < splits
    if PDL:
        tl.extra.cuda.gdc_wait()
    # All loads are on their way before one is looked at: also those of splits without a key, which left no sums.
    where = there[:, None] & (column < DIM)[None, :]
    acc = tl.load(partial + at[:, None] * DIM + column[None, :], mask=where, other=0)
    m_i = tl.load(stats + at, mask=there, other=float("-inf"))
    l_i = tl.load(stats + splits * query_rows + at, mask=there, other=0)
    m_i = tl.where(l_i != 0, m_i, float("-inf"))  # NaN is no 0
    acc = tl.where((l_i != 0)[:, None], acc, 0.0)
    m = tl.max(m_i, 0)
    alpha = tl.exp2((m_i - tl.where(m == float("-inf"), 0.0, m)) * UNIT)
    l_i = tl.sum(alpha * l_i, 0)
    l_i = tl.where(l_i == 0, 1.0, l_i)
    result = tl.sum(alpha[:, None] * acc, 0) / l_i
    pair, r = row // (length * group), row % (length * group)
    b, head, token = (pair // kv_heads).to(tl.int64), pair % kv_heads * group + r % group, r // group
    to = out + b * stride_ob + token.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh
    tl.store(to + column, result.to(out.dtype.element_ty), mask=column < DIM)
    logarithm = m * (UNIT * 0.6931471805599453) + tl.log2(l_i) * 0.6931471805599453
    tl.store(lse + (b * length + token) * kv_heads * group + head, logarithm, mask=tl.program_id(1) == 0)


def merge_splits(
    partial: Tensor, stats: Tensor, out: Tensor, lse: Tensor, kv_heads: int, unit: float, pdl: bool = False
) -> None:
    """Merges what the splits of the keys have left, into out [B, S, Hq, D] of any strides and lse. pdl: the kernel that
    leaves it lets this one be launched meanwhile."""
    splits, rows, dim = partial.shape
    parts, columns, warps = _tuning(splits, dim)
    merge_splits_kernel[(rows, triton.cdiv(dim, columns))](
        *(partial, stats, out, lse, splits, out.shape[1], kv_heads, out.shape[2] // kv_heads, *out.stride()[:3]),
        UNIT=unit,
        SPLITS=parts,
        DIM=dim,
        COLUMNS=columns,
        num_warps=warps,
        PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )


def _tuning(splits: int, dim: int) -> tuple[int, int, int]:
    """(SPLITS, COLUMNS, num_warps): 32 numbers per thread, all in flight together."""
    parts = triton.next_power_of_2(splits)
    columns = min(triton.next_power_of_2(dim), 64, 8192 // parts)
    return parts, columns, min(max(parts * columns // 1024, 1), 8)


@triton.jit(do_not_specialize=["rows", "dim"])
def merge_attention_kernel(
    out_a,  # [rows, D]
    lse_a,  # [rows]
    out_b,
    lse_b,
    out,  # [rows, D] contiguous
    lse,  # [rows] contiguous
    rows,
    dim,
    stride_a,
    stride_b,
    stride_lse_a,
    stride_lse_b,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = row < rows
    a = tl.load(lse_a + row * stride_lse_a, mask=inside, other=0)
    b = tl.load(lse_b + row * stride_lse_b, mask=inside, other=0)
    # -inf, or +inf as others write it: a side without keys.
    a = tl.where(a == float("inf"), float("-inf"), a)
    b = tl.where(b == float("inf"), float("-inf"), b)
    no_a, no_b = a == float("-inf"), b == float("-inf")
    m = tl.where(a > b, a, b)
    exp_a = tl.where(no_a, 0.0, tl.exp(a - m))
    exp_b = tl.where(no_b, 0.0, tl.exp(b - m))
    total = exp_a + exp_b
    weights = tl.where(no_a & no_b, 1.0, total)
    where = inside[:, None] & (column < dim)[None, :]
    # A side without keys may hold anything, NaN too: it is not read.
    from_a = tl.load(out_a + row[:, None] * stride_a + column[None, :], mask=where & ~no_a[:, None], other=0)
    from_b = tl.load(out_b + row[:, None] * stride_b + column[None, :], mask=where & ~no_b[:, None], other=0)
    result = (exp_a / weights)[:, None] * from_a.to(tl.float32) + (exp_b / weights)[:, None] * from_b.to(tl.float32)
    tl.store(out + row[:, None] * dim + column[None, :], result.to(out.dtype.element_ty), mask=where)
    both = m + tl.log(weights)
    tl.store(lse + row, tl.where(no_a, b, tl.where(no_b, a, both)), mask=inside)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    check_dtype("merge_attention", out_a=out_a)
    out, lse, dim = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape), out_a.shape[-1]
    rows = lse.numel()
    if rows == 0:
        return out, lse
    sides = [rows_contiguous(x.reshape(rows, dim)) for x in (out_a, out_b)]
    sums = [x.reshape(rows) for x in (lse_a, lse_b)]
    depth = triton.next_power_of_2(max(dim, 1))
    block = max(1, 2048 // depth)
    strides = [x.stride(0) for x in (*sides, *sums)]  # type: ignore[union-attr]
    with on_device_of(out):
        merge_attention_kernel[(triton.cdiv(rows, block),)](
            *(sides[0], sums[0], sides[1], sums[1], out, lse, rows, dim, *strides), BLOCK_ROWS=block, BLOCK_D=depth
        )
    return out, lse


APPENDED = ("length", "heads", "dim", "value_dim", "capacity", "context_rows", "pages", "page")


@triton.jit(do_not_specialize=APPENDED)
def append_kv_kernel(
    k_context,  # [rows, T, Hkv, D], or pages [P, page, Hkv, D]
    v_context,  # the same with Dv
    k,  # [B, S, Hkv, D]
    v,  # [B, S, Hkv, Dv]
    context_lens,  # [B]
    context_index,  # [B] or None
    block_table,  # [rows, n] or None
    block_lens,  # [B] or None
    length,
    heads,
    dim,
    value_dim,
    capacity,
    context_rows,
    pages,
    page,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_context_lens,
    stride_context_index,
    stride_table_row,
    stride_table_page,
    stride_block_lens,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, s = tl.program_id(0).to(tl.int64) // length, tl.program_id(0).to(tl.int64) % length
    start = tl.load(context_lens + b * stride_context_lens).to(tl.int64)
    position = start + s
    # What has no place is not written: neither lengths nor pages are known on the host.
    writes = (start >= 0) & (position < capacity)
    if block_lens is not None:
        writes = writes & (s < tl.load(block_lens + b * stride_block_lens))
    row = b
    if context_index is not None:
        row = tl.load(context_index + b * stride_context_index).to(tl.int64)
        writes = writes & (row >= 0) & (row < context_rows)
    if block_table is not None:
        row = tl.load(
            block_table + row * stride_table_row + position // page * stride_table_page, mask=writes, other=-1
        ).to(tl.int64)
        writes = writes & (row >= 0) & (row < pages)
        position = position % page
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    writes = writes & (head < heads)
    of_key, of_value = writes & (column < dim), writes & (column < value_dim)
    key = tl.load(k + b * stride_kb + s * stride_kt + head * stride_kh + column, mask=of_key)
    value = tl.load(v + b * stride_vb + s * stride_vt + head * stride_vh + column, mask=of_value)
    tl.store(k_context + row * stride_kcb + position * stride_kct + head * stride_kch + column, key, mask=of_key)
    tl.store(v_context + row * stride_vcb + position * stride_vct + head * stride_vch + column, value, mask=of_value)


def append_kv(
    k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Tensor,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None,
) -> None:  # fmt: skip
    check_dtype("append_kv", k=k)
    k, v = map(rows_contiguous, (k, v))  # type: ignore[assignment]
    (batch, length, heads, dim), value_dim = k.shape, v.shape[3]
    if max(k.numel(), v.numel()) == 0 or max(k_context.numel(), v_context.numel()) == 0:
        return
    (rows, capacity), pages, page = k_context.shape[:2], 1, 1
    if block_table is not None:
        pages, page = rows, capacity
        rows, capacity = block_table.shape[0], block_table.shape[1] * page
    depth = triton.next_power_of_2(max(dim, value_dim))
    block = max(1, min(triton.next_power_of_2(heads), 2048 // depth))
    strides = [n for x in (k_context, v_context, k, v) for n in x.stride()[:3]]
    strides += [0 if x is None else x.stride(0) for x in (context_lens, context_index)]
    strides += (0, 0) if block_table is None else block_table.stride()
    strides += [0 if block_lens is None else block_lens.stride(0)]
    with on_device_of(k):
        append_kv_kernel[(batch * length, triton.cdiv(heads, block))](
            *(k_context, v_context, k, v, context_lens, context_index, block_table, block_lens),
            *(length, heads, dim, value_dim, capacity, rows, pages, page, *strides),
            BLOCK_H=block,
            BLOCK_D=depth,
        )


def builds(arch: int) -> Iterator[Build]:
    """What the launchers ask for in every dtype, at the released head_dim and the widest; with `launch.PDL`, too."""
    for dtype, name in DTYPES.items():
        for dim, splits in ((128, 33), (512, 129)):
            unit = math.log2(math.e) if dtype == torch.float32 else 1.0
            parts, columns, warps = _tuning(splits, dim)
            constants: dict[str, object] = {"UNIT": unit, "SPLITS": parts, "DIM": dim, "COLUMNS": columns, "PDL": False}
            types = {"partial": "*fp32", "stats": "*fp32", "out": f"*{name}", "lse": "*fp32"}
            types |= _integers(merge_splits_kernel, types, constants)
            merge = Build(merge_splits_kernel, types, constants, num_warps=warps, odd=frozenset(COUNTS))
            yield merge
            if arch >= 90:
                yield replace(merge, constants=constants | {"PDL": True}, needs=("griddepcontrol",))

            constants = {"BLOCK_ROWS": 2048 // dim, "BLOCK_D": dim}
            types = {x: f"*{name}" for x in ("out_a", "out_b", "out")} | {x: "*fp32" for x in ("lse_a", "lse_b", "lse")}
            types |= _integers(merge_attention_kernel, types, constants)
            odd = frozenset(("rows", "dim", "stride_lse_a", "stride_lse_b"))
            yield Build(merge_attention_kernel, types, constants, odd=odd)

            constants = {"context_index": None, "BLOCK_H": 2, "BLOCK_D": dim}
            types = {x: f"*{name}" for x in ("k_context", "v_context", "k", "v")}
            types |= {"context_lens": "*i64", "block_table": "*i32", "block_lens": "*i64"}
            types |= _integers(append_kv_kernel, types, constants)
            yield Build(
                append_kv_kernel, types, constants, odd=frozenset((*APPENDED, "stride_table_row", "stride_table_page"))
            )


def _integers(kernel: Any, *others: dict[str, Any]) -> dict[str, str]:
    """All arguments that are neither pointers nor constants."""
    return {name: "i32" for name in kernel.arg_names if not any(name in x for x in others)}
