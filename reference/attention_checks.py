"""What the attention ops demand of their arguments, and lengths and indices in the form the formulas use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Lengths = int | Tensor


def context_rows(
    batch: int, k_context: Tensor, context_index: Tensor | None, block_table: Tensor | None, *, shared: bool
) -> tuple[Tensor, Tensor | None, int]:
    """(context row of each batch row [B], block table as int64 or None, tokens of storage per row).
    shared: one context row may be that of all."""
    device = k_context.device
    table, capacity = None, k_context.shape[1]
    if block_table is not None:
        check_integers("block_table", block_table, device)
        if block_table.ndim != 2:
            raise ValueError(f"block_table: expected [context rows, pages], got {list(block_table.shape)}")
        table, capacity = block_table.long(), block_table.shape[1] * k_context.shape[1]
    available = k_context.shape[0] if table is None else table.shape[0]
    if context_index is None:
        if shared and available == 1:
            return torch.zeros(batch, dtype=torch.int64, device=device), table, capacity
        if available != batch:
            expected = f"{batch} rows, one per block, {'1 row for all, ' if shared else ''}or a context_index"
            raise ValueError(f"context: expected {expected}, got {available}")
        return torch.arange(batch, device=device), table, capacity
    check_integers("context_index", context_index, device)
    if context_index.shape != (batch,):
        raise ValueError(f"context_index: expected [{batch}], got {list(context_index.shape)}")
    if bool(((context_index < 0) | (context_index >= available)).any()):
        raise ValueError(f"context_index: expected rows in [0, {available}), got {context_index.tolist()}")
    return context_index.long(), table, capacity


def as_lengths(lens: Lengths | None, default: int, batch: int, limit: int, name: str, device: torch.device) -> Tensor:
    """Lengths as int64 [B], from a scalar, a tensor or None, all within [0, limit]."""
    if lens is None:
        lens = default
    if isinstance(lens, Tensor):
        check_integers(name, lens, device)
    elif not isinstance(lens, int):
        raise TypeError(f"{name}: expected an integer or an integer tensor, got {type(lens).__name__}")
    result = torch.as_tensor(lens, device=device).long()
    if result.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected a scalar or [{batch}], got {list(result.shape)}")
    if bool(((result < 0) | (result > limit)).any()):
        raise ValueError(f"{name}: expected values in [0, {limit}], got {result.tolist()}")
    return result.expand(batch)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_rank(name: str, x: Tensor) -> None:
    """x is [batch, tokens, heads, head_dim] of a supported dtype."""
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 axes [batch, tokens, heads, head_dim], got shape {list(x.shape)}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def check_like_queries(q: Tensor, **tensors: Tensor) -> None:
    """Every tensor has q's rank, dtype and device."""
    for name, x in tensors.items():
        check_rank(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} as its partners, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as its partners, got {x.device}")


def check_queries(
    q: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    softcap: float,
    out: Tensor | None,
    others: Sequence[Tensor | None],
) -> None:
    """q, the numbers and `out`; `others` are the further differentiable tensors, none of which may meet an `out`."""
    check_rank("q", q)
    check_rank("v", v)
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] == 0:
            raise ValueError(f"{name}: expected head_dim of at least 1, got shape {list(x.shape)}")
    if window is not None and (not isinstance(window, int) or window < 0):
        raise ValueError(f"window: expected None or an integer >= 0, got {window!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")
    if out is None:
        return
    shape = [*q.shape[:3], v.shape[3]]
    if list(out.shape) != shape or out.dtype != q.dtype or out.device != q.device:
        expected = f"{shape} {q.dtype} on {q.device}"
        raise ValueError(f"out: expected {expected}, as q, got {list(out.shape)} {out.dtype} on {out.device}")
    needed = any(x is not None and x.requires_grad for x in (q, *others))
    if out.requires_grad or (torch.is_grad_enabled() and needed):
        raise ValueError("out: expected no tensor that requires grad, results written in place carry no gradient")


def check_context(q: Tensor, k_context: Tensor, v_context: Tensor) -> None:
    """Keys and values of the context match each other and q's head_dim."""
    if k_context.shape[:3] != v_context.shape[:3] or k_context.shape[3] != q.shape[3]:
        shapes = f"{list(k_context.shape)}, {list(v_context.shape)}"
        raise ValueError(f"k_context, v_context: expected equal shapes with head_dim {q.shape[3]}, got {shapes}")


def check_sinks(q: Tensor, sinks: Tensor) -> None:
    """One logit per head of queries."""
    if sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks: expected [{q.shape[2]}], one per head of q, got {list(sinks.shape)}")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected device {q.device}, got {sinks.device}")


def check_heads(q: Tensor, k: Tensor, name: str) -> None:
    """The query heads divide evenly among the key heads."""
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"q: expected a multiple of the {k.shape[2]} heads of {name}, got {q.shape[2]} heads")


def check_integers(name: str, x: Tensor, device: torch.device) -> None:
    """x is int32 or int64 on the queries' device."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_pages(page: Tensor, pool: Tensor) -> None:
    """All page numbers exist in the pool."""
    if bool(((page < 0) | (page >= pool.shape[0])).any()):
        raise ValueError(f"block_table: expected pages in [0, {pool.shape[0]}), got {page.tolist()}")
