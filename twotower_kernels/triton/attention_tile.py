"""A tile of keys and the query rows that attend to it: what attention's kernels are made of (`attention.py`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(x, inner, SOFTCAP: tl.constexpr):
    """tanh(x * inner), or x as it is without a softcap."""
    if SOFTCAP:
        x *= inner
        square = x * x
        near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        far = 1 - 2 / (tl.exp(2 * x) + 1)  # digits of a small x would be lost in the difference
        x = tl.where(square < 0.0625, near, far)
    return x


@triton.jit
def products_of(q, keys, inner, SOFTCAP: tl.constexpr):
    """What `factor` makes logits [M, N] of queries [M, D] and keys [N, D]."""
    return capped(tl.dot(q, tl.trans(keys), input_precision="ieee"), inner, SOFTCAP)


@triton.jit
def add_keys(qk, values, acc, m_i, l_i, factor, UNIT: tl.constexpr):
    """Takes keys of logits x * factor [M, N] and values [N, D] into the softmax so far: sums of values [M, D] and of
    weights [M], both relative to 2**(top * UNIT). factor > 0: so the largest is known before all are multiplied by it,
    which then takes no instruction of its own."""
    m_new = tl.maximum(m_i, tl.max(qk, 1) * factor)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf less -inf would be NaN
    alpha = tl.exp2((m_i - base) * UNIT)
    p = tl.exp2((qk * factor - base[:, None]) * UNIT)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit
def page_and_slot(
    start, seen, entry, stride_table_page, pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, FAR: tl.constexpr
):
    """Where the tile of keys that begins at `start` lies: page and slot of its first key if the others follow there, as
    they do in dense storage, which is one page; else of each key."""
    wide: tl.constexpr = tl.int64 if FAR else tl.int32
    if PAGE == 0:
        return 0, tl.cast(start, wide)
    else:
        if PAGE % BLOCK_N == 0:
            position = start
            page = tl.load(entry + position // PAGE * stride_table_page)
        else:
            position = start + tl.arange(0, BLOCK_N)
            page = tl.load(entry + position // PAGE * stride_table_page, mask=seen, other=0)
        return tl.minimum(tl.maximum(page.to(tl.int64), 0), pages - 1), tl.cast(position % PAGE, wide)


@triton.jit
def tile_of(base, page, slot, stride_page, stride_slot, column, BLOCK_N: tl.constexpr):
    """Pointers to a tile [N, columns]. Where its keys follow each other, one address moves from tile to tile; what is
    added to it for a key stays the same."""
    if len(slot.shape) == 0:
        key = tl.arange(0, BLOCK_N).to(slot.dtype)
        return base + page * stride_page + slot * stride_slot + (key[:, None] * stride_slot + column[None, :])
    else:
        return base + ((page * stride_page + slot * stride_slot)[:, None] + column[None, :])


@triton.jit
def within(rows, column, dim: tl.constexpr):
    """Mask of a tile: its rows that are there, and columns below dim. Without columns to hide, loads stay wide: then
    as many columns as there are, or a program's share of them, divide dim."""
    if dim // column.shape[0] * column.shape[0] == dim:
        return rows[:, None]
    else:
        return rows[:, None] & (column < dim)[None, :]


@triton.jit
def load_tile(pointers, rows, column, DIM: tl.constexpr):
    """The tile, with 0 for the rows that are not there. rows None: all are."""
    if rows is not None:
        return tl.load(pointers, mask=within(rows, column, DIM), other=0)
    elif DIM // column.shape[0] * column.shape[0] == DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0)


@triton.jit
def last_seen(token, CAUSAL: tl.constexpr):
    """The last token that a token sees: itself, or the last of its block of CAUSAL tokens."""
    if CAUSAL == 1:
        return token
    else:
        return token // CAUSAL * CAUSAL + (CAUSAL - 1)
