"""What the attention ops demand of their arguments: shapes and dtypes before the call, values at the kernel's door."""

import math
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.arguments import real, whole
from twotower_kernels.ops._library import check_float, same_device

Lengths = int | Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and of the log-sum-exp."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- meaning: shapes, dtypes, devices; no tensor's value is read ---------------------------------------------------


def check_alike(first_name: str, first: Tensor, /, **others: Tensor) -> None:
    """All are [batch, tokens, heads, head_dim] of one floating dtype on one device."""
    dtype = first.dtype
    for name, x in ((first_name, first), *others.items()):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes [batch, tokens, heads, head_dim], got shape {list(x.shape)}")
        if x is first or x.dtype != dtype:
            check_float(**{name: x})
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as {first_name}, got {x.dtype}")
    same_device(first, **others)


def check_options(window: Any, scale: Any, softcap: Any) -> tuple[int | None, float | None, float]:
    """The numbers that shape the softmax. Returns them as Python's."""
    if window is not None:
        try:
            window = whole("window", window)
        except TypeError:
            raise ValueError(f"window: expected None or an integer >= 0, got {window!r}") from None
        if window < 0:
            raise ValueError(f"window: expected None or an integer >= 0, got {window}")
    if scale is not None:
        scale = real("scale", scale, "None or a number")
        if not -math.inf < scale < math.inf:  # as comparisons, which a trace can follow; NaN fails
            raise ValueError(f"scale: expected a finite number, got {scale}")
    softcap = real("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")
    return window, scale, softcap


def check_out(q: Tensor, out: Tensor | None, *differentiable: Tensor) -> None:
    """`out` can take the result, and no gradient is wanted of it."""
    if out is None:
        return
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
        expected = f"{list(q.shape)} {q.dtype} on {q.device}"
        raise ValueError(f"out: expected {expected} as q, got {list(out.shape)} {out.dtype} on {out.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, q, *differentiable)):
        raise ValueError("out: expected no tensor that requires grad, results written in place carry no gradient")


def check_heads(q: Tensor, k: Tensor, name: str) -> None:
    """q has a head_dim, and its heads divide among those of the keys."""
    if q.shape[3] == 0:
        raise ValueError(f"q: expected head_dim of at least 1, got shape {list(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q: expected a multiple of the {k.shape[2]} heads of {name}, got {q.shape[2]} heads")


def check_storage(dim: int, k_context: Tensor, v_context: Tensor) -> None:
    """Keys and values of the context fit each other and the head dimension, and are frozen."""
    if k_context.shape != v_context.shape or k_context.shape[3] != dim:
        got = f"{list(k_context.shape)}, {list(v_context.shape)}"
        raise ValueError(f"k_context, v_context: expected equal shapes with head_dim {dim}, got {got}")
    if torch.is_grad_enabled() and (k_context.requires_grad or v_context.requires_grad):
        raise ValueError("k_context, v_context: the context is frozen, expected no requires_grad; detach them")


def check_rows(batch: int, k_context: Tensor, context_index: Tensor | None, block_table: Tensor | None) -> int:
    """Every batch row has a context row. Returns the tokens that one has room for."""
    rows, capacity = k_context.shape[:2]
    if block_table is not None:
        check_integers("block_table", block_table, k_context)
        if block_table.ndim != 2:
            raise ValueError(f"block_table: expected [context rows, pages], got {list(block_table.shape)}")
        rows, capacity = block_table.shape[0], block_table.shape[1] * capacity
    if context_index is not None:
        check_integers("context_index", context_index, k_context)
        if context_index.shape != (batch,):
            raise ValueError(f"context_index: expected [{batch}], got {list(context_index.shape)}")
    elif rows != batch:
        raise ValueError(f"context: expected {batch} rows, one per block, or a context_index, got {rows}")
    return capacity


def check_integers(name: str, x: Tensor, like: Tensor) -> None:
    """x holds integers on the device of `like`."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
    same_device(like, **{name: x})


def as_lengths(name: str, lens: Lengths | None, limit: int, batch: int, like: Tensor) -> Tensor | None:
    """Lengths as a tensor [batch], None if they are all that there is room for."""
    if lens is None:
        return None
    if isinstance(lens, Tensor):
        check_integers(name, lens, like)
        if lens.ndim and lens.shape != (batch,):
            raise ValueError(f"{name}: expected a scalar or [{batch}], got {list(lens.shape)}")
        return lens.expand(batch) if lens.ndim == 0 else lens
    number = whole(name, lens, "an integer or an integer tensor")
    if not 0 <= number <= limit:
        raise ValueError(f"{name}: expected values in [0, {limit}], got {number}")
    return torch.full((batch,), number, dtype=torch.int64, device=like.device)


# --- values: read where the tensors are on the host, before the kernel runs ------------------------------------------


def check_lengths(name: str, lens: Tensor | None, limit: int) -> None:
    """All within [0, limit]."""
    values = [] if lens is None else lens.tolist()
    if values and (min(values) < 0 or max(values) > limit):
        raise ValueError(f"{name}: expected values in [0, {limit}], got {values}")


def check_places(
    storage: Tensor, lens: Tensor | None, context_index: Tensor | None, block_table: Tensor | None
) -> None:
    """Lengths, context rows and the pages that they need exist. lens: tokens in use per batch row."""
    rows, capacity = storage.shape[:2]
    page = capacity
    if block_table is not None:
        rows, capacity = block_table.shape[0], block_table.shape[1] * page
    check_lengths("context_lens", lens, capacity)
    values = [] if context_index is None else context_index.tolist()
    if values and (min(values) < 0 or max(values) >= rows):
        raise ValueError(f"context_index: expected rows in [0, {rows}), got {values}")
    if block_table is None:
        return
    table = block_table if context_index is None else block_table[context_index.long()]
    bad = (table < 0) | (table >= storage.shape[0])
    if lens is not None:
        bad &= torch.arange(table.shape[1]) * page < lens[:, None]
    if bad.any():
        raise ValueError(f"block_table: expected pages in [0, {storage.shape[0]}), got {table[bad].tolist()}")


def check_append(
    k: Tensor,
    storage: Tensor,
    context_lens: Tensor,
    context_index: Tensor | None,
    block_table: Tensor | None,
    block_lens: Tensor | None,
) -> None:
    """What is to be appended has a place of its own."""
    page = storage.shape[1]
    capacity = page if block_table is None else block_table.shape[1] * page
    check_lengths("block_lens", block_lens, k.shape[1])
    check_lengths("context_lens", context_lens, capacity)
    count = torch.full_like(context_lens, k.shape[1]) if block_lens is None else block_lens
    total = context_lens.long() + count
    if (total > capacity).any():
        raise ValueError(
            f"context_lens + block_lens: expected at most {capacity}, the context's storage, got {total.tolist()}"
        )
    if context_index is None and block_table is None:
        return  # every row writes to its own context row
    check_places(storage, None, context_index, None if block_table is None else block_table[:, :0])
    position = context_lens.long()[:, None] + torch.arange(k.shape[1])  # [B,S]
    written = position < total[:, None]
    row = torch.arange(len(k)) if context_index is None else context_index.long()
    row, position = row[:, None].expand_as(position)[written], position[written]
    if block_table is not None:
        row, position = block_table[row, position // page].long(), position % page
        if ((row < 0) | (row >= len(storage))).any():
            raise ValueError(f"block_table: expected pages in [0, {len(storage)}), got {row.unique().tolist()}")
    slot = row * page + position
    if slot.unique().numel() != slot.numel():
        raise ValueError("context_index, block_table: expected every row to write elsewhere, got two on the same place")
