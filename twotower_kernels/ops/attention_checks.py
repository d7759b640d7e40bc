"""What the attention ops demand of their arguments: shapes and dtypes of every kernel and of the fake, values of the
kernels on the host."""

import math
from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import as_index, check_alike, check_float, check_floats, check_index, same_device
from twotower_kernels.options.arguments import real, whole

Lengths = int | Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and of the log-sum-exp."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- what the public functions resolve ------------------------------------------------------------------------------


def check_axes(**tensors: Tensor | None) -> None:
    """All are [batch, tokens, heads, head_dim]."""
    for name, x in tensors.items():
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes [batch, tokens, heads, head_dim], got shape {list(x.shape)}")


def check_no_gradient(out: Tensor, *inputs: Tensor | None) -> None:
    """No gradient is wanted of a result written in place."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (out, *inputs)):
        raise ValueError("out: expected no tensor that requires grad, results written in place carry no gradient")


def softmax_numbers(window: Any, scale: Any, softcap: Any) -> tuple[int | None, float | None, float]:
    """The numbers that shape the softmax as Python's, in any range."""
    if window is not None:
        try:
            window = whole("window", window)
        except TypeError:
            raise ValueError(f"window: expected None or an integer >= 0, got {window!r}") from None
    return window, None if scale is None else real("scale", scale, "None or a number"), real("softcap", softcap)


def as_flag(name: str, value: Any) -> int:
    """1 or 0 for True or False."""
    if value is not True and value is not False and value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return int(value)


def as_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """Sinks of any floating dtype in that of the statistics; what floats not is refused by the operators."""
    return sinks.to(statistics_dtype(q)) if sinks is not None and sinks.is_floating_point() else sinks


def check_no_past(starts: Any, context_index: Tensor | None, block_table: Tensor | None) -> None:
    """Nothing but a length is said of a context where there is none."""
    if starts is not None or context_index is not None or block_table is not None:
        raise ValueError("context_starts, context_index, block_table: expected none without a context")


def room(k_context: Tensor, block_table: Tensor | None) -> int:
    """Tokens of a context row that there is storage for."""
    if block_table is None:
        return k_context.shape[1]
    if block_table.ndim != 2:
        raise ValueError(f"block_table: expected [context rows, pages], got {list(block_table.shape)}")
    return block_table.shape[1] * k_context.shape[1]


def as_lengths(name: str, lens: Lengths | None, limit: int, q: Tensor) -> Tensor | None:
    """Lengths of the rows of `q` as the operators take them, a tensor [batch]; None if they are all that there is room
    for."""
    if isinstance(lens, Tensor):
        lens = as_index(lens)
        return lens.expand(q.shape[0]) if lens.ndim == 0 else lens
    if lens is None:
        return None
    number = whole(name, lens, "an integer or an integer tensor")
    if not 0 <= number <= limit:
        raise ValueError(f"{name}: expected values in [0, {limit}], got {number}")
    return torch.full((q.shape[0],), number, dtype=torch.int64, device=q.device)


# --- meaning: shapes, dtypes, devices; no tensor's value is read ---------------------------------------------------


def check_block(
    q: Tensor, k: Tensor, v: Tensor, k_context: Tensor | None, v_context: Tensor | None, context_lens: Tensor | None,
    context_starts: Tensor | None, context_index: Tensor | None, block_table: Tensor | None,
    block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float,
) -> None:  # fmt: skip
    """What `block_attention` takes."""
    _check_tokens("q", q, k=k, v=v)
    batch, length, _, dim = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        expected = f"[{batch}, {length}, Hkv, {dim}] and [{batch}, {length}, Hkv, Dv]"
        raise ValueError(f"k, v: expected {expected}, got {list(k.shape)}, {list(v.shape)}")
    _check_heads(q, k, v, "k")
    if k_context is not None and v_context is not None:
        if k_context.ndim == 4 and k_context.shape[2] != k.shape[2]:
            raise ValueError(f"k_context: expected {k.shape[2]} key heads as in k, got {k_context.shape[2]}")
        if v_context.ndim == 4 and v_context.shape[3] != v.shape[3]:
            raise ValueError(f"v_context: expected head_dim {v.shape[3]} as in v, got {v_context.shape[3]}")
        _check_past(q, k_context, v_context, context_lens, context_starts, context_index, block_table)
    elif k_context is not None or v_context is not None:
        raise ValueError("k_context and v_context: expected both or neither, got one")
    else:
        check_no_past(context_starts, context_index, block_table)
        _check_lens("context_lens", context_lens, q)
    _check_options(q, block_lens, sinks, causal, window, scale, softcap)


def check_context(
    q: Tensor, k_context: Tensor, v_context: Tensor, context_lens: Tensor | None, context_starts: Tensor | None,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float,
) -> None:  # fmt: skip
    """What `context_attention` takes."""
    _check_past(q, k_context, v_context, context_lens, context_starts, context_index, block_table)
    _check_options(q, block_lens, sinks, causal, window, scale, softcap)


def check_out(q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """They can take the results."""
    shapes = torch.Size((*q.shape[:3], v.shape[3])), q.shape[:3]
    for name, x, shape, dtype in (("out", out, shapes[0], q.dtype), ("lse", lse, shapes[1], statistics_dtype(q))):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            expected, got = f"{list(shape)} {dtype} on {q.device}", f"{list(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"{name}: expected {expected} as q, got {got}")


def check_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    k_context: Tensor | None, v_context: Tensor | None, *arguments: Any,
) -> None:  # fmt: skip
    """What `attention_backward` takes: gradients of the results of `block_attention` or, without k and v, of
    `context_attention`, and what that took."""
    if k is not None and v is not None:
        check_block(q, k, v, k_context, v_context, *arguments)
    elif k is not None or v is not None:
        raise ValueError("k and v: expected both or neither, got one")
    elif k_context is None or v_context is None:
        raise ValueError("k_context, v_context: expected a context where there are no k and v, got None")
    else:
        check_context(q, k_context, v_context, *arguments)
    values = v if v is not None else v_context
    shapes = torch.Size((*q.shape[:3], values.shape[3])), q.shape[:3]  # type: ignore[union-attr]
    for name, x, shape in (("grad_out", grad_out, shapes[0]), ("grad_lse", grad_lse, shapes[1])):
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} as q, got {list(x.shape)}")
    check_floats(q, grad_out=grad_out, grad_lse=grad_lse)


def check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """What `merge_attention` takes."""
    check_float(out_a=out_a)
    for name, x, like in (("out_b", out_b, out_a), ("lse_b", lse_b, lse_a)):
        if x.shape != like.shape or x.dtype != like.dtype:
            expected, got = f"{list(like.shape)} {like.dtype}", f"{list(x.shape)} {x.dtype}"
            raise ValueError(f"{name}: expected {expected} as its partner, got {got}")
    if out_a.ndim == 0 or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(f"lse_a: expected {list(out_a.shape[:-1])} as out_a, got {list(lse_a.shape)}")
    if lse_a.dtype != statistics_dtype(out_a):
        raise TypeError(f"lse_a: expected {statistics_dtype(out_a)} with {out_a.dtype} outputs, got {lse_a.dtype}")
    same_device(out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def check_append(
    k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Tensor,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None,
) -> None:  # fmt: skip
    """What `append_kv` takes."""
    _check_tokens("k", k, v=v, k_context=k_context, v_context=v_context)
    _check_storage(k.shape[3], k_context, v_context)
    if k.shape[:3] != v.shape[:3] or k.shape[2:] != k_context.shape[2:] or v.shape[3] != v_context.shape[3]:
        expected = f"{['B', 'S', *k_context.shape[2:]]}, {['B', 'S', *v_context.shape[2:]]}"
        raise ValueError(f"k, v: expected {expected} as in the context, got {list(k.shape)}, {list(v.shape)}")
    for name, storage in (("k_context", k_context), ("v_context", v_context)):
        if storage.stride(3) != 1 and storage.shape[3] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension to write to, got stride {storage.stride(3)}"
            )
    _check_rows(k.shape[0], k_context, context_index, block_table)
    _check_lens("context_lens", context_lens, k)
    _check_lens("block_lens", block_lens, k)


def _check_past(
    q: Tensor, k_context: Tensor, v_context: Tensor, context_lens: Tensor | None, context_starts: Tensor | None,
    context_index: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    _check_tokens("q", q, k_context=k_context, v_context=v_context)
    _check_storage(q.shape[3], k_context, v_context)
    _check_heads(q, k_context, v_context, "k_context")
    _check_rows(q.shape[0], k_context, context_index, block_table)
    _check_lens("context_lens", context_lens, q)
    _check_lens("context_starts", context_starts, q)


def _check_tokens(first_name: str, first: Tensor, /, **others: Tensor) -> None:
    """All are [batch, tokens, heads, head_dim] of one floating dtype on one device."""
    check_axes(**{first_name: first}, **others)
    check_alike(first_name, first, **others)


def _check_options(
    q: Tensor, block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float,
) -> None:  # fmt: skip
    """What shapes the softmax; numbers by comparisons, which a trace can follow; NaN fails."""
    _check_lens(_lens_of(causal), block_lens, q)
    if sinks is not None:
        if sinks.shape != q.shape[2:3]:
            raise ValueError(f"sinks: expected [{q.shape[2]}], one per head of q, got {list(sinks.shape)}")
        if sinks.dtype != statistics_dtype(q):
            raise TypeError(f"sinks: expected {statistics_dtype(q)} with {q.dtype} queries, got {sinks.dtype}")
        same_device(q, sinks=sinks)
    if causal < 0:
        raise ValueError(f"causal: expected 0 or more, tokens that see each other, got {causal}")
    if window is not None and window < 0:
        raise ValueError(f"window: expected None or an integer >= 0, got {window!r}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, name: str) -> None:
    """q and v have a head_dim, and the heads of q divide among those of the keys."""
    for of, x in (("q", q), ("v", v)):
        if x.shape[3] == 0:
            raise ValueError(f"{of}: expected head_dim of at least 1, got shape {list(x.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q: expected a multiple of the {k.shape[2]} heads of {name}, got {q.shape[2]} heads")


def _check_storage(dim: int, k_context: Tensor, v_context: Tensor) -> None:
    """Keys and values of the context fit each other and the head dimension."""
    if k_context.shape[:3] != v_context.shape[:3] or k_context.shape[3] != dim:
        got = f"{list(k_context.shape)}, {list(v_context.shape)}"
        raise ValueError(f"k_context, v_context: expected equal shapes with head_dim {dim}, got {got}")


def _check_rows(batch: int, k_context: Tensor, context_index: Tensor | None, block_table: Tensor | None) -> None:
    """Every batch row has a context row."""
    rows = k_context.shape[0]
    if block_table is not None:
        check_index(block_table=block_table)
        same_device(k_context, block_table=block_table)
        room(k_context, block_table)
        rows = block_table.shape[0]
    if context_index is not None:
        check_index(context_index=context_index)
        same_device(k_context, context_index=context_index)
        if context_index.shape != (batch,):
            raise ValueError(f"context_index: expected [{batch}], got {list(context_index.shape)}")
    elif rows != batch:
        raise ValueError(f"context: expected {batch} rows, one per block, or a context_index, got {rows}")


def _lens_of(causal: int) -> str:
    """What the rows' lengths are called where they are given: those of blocks, or of sequences of blocks."""
    return "seq_lens" if causal > 1 else "block_lens"


def _check_lens(name: str, lens: Tensor | None, q: Tensor) -> None:
    if lens is None:
        return
    check_index(**{name: lens})
    same_device(q, **{name: lens})
    if lens.shape != q.shape[:1]:
        raise ValueError(f"{name}: expected a scalar or [{q.shape[0]}], got {list(lens.shape)}")


# --- values: read where the tensors are on the host, before the kernel runs ------------------------------------------


def check_values(
    q: Tensor, k_context: Tensor | None, context_lens: Tensor | None, context_starts: Tensor | None,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None, causal: int,
) -> None:  # fmt: skip
    """Lengths, context rows and pages of an attention op exist. In a recording who replays it answers for that."""
    if cpu.is_recording():
        return
    _check_lengths(_lens_of(causal), block_lens, q.shape[1])
    if k_context is not None:
        _check_lengths("context_starts", context_starts, room(k_context, block_table))
        _check_places(k_context, context_lens, context_index, block_table)
    else:
        _check_lengths("context_lens", context_lens, 0)


def _check_lengths(name: str, lens: Tensor | None, limit: int) -> None:
    """All within [0, limit]."""
    values = [] if lens is None else lens.tolist()
    if values and (min(values) < 0 or max(values) > limit):
        raise ValueError(f"{name}: expected values in [0, {limit}], got {values}")


def _check_places(
    storage: Tensor, lens: Tensor | None, context_index: Tensor | None, block_table: Tensor | None
) -> None:
    """Lengths, context rows and the pages that they need exist. lens: tokens in use per batch row."""
    rows, capacity = storage.shape[:2]
    page = capacity
    if block_table is not None:
        rows, capacity = block_table.shape[0], block_table.shape[1] * page
    _check_lengths("context_lens", lens, capacity)
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


def check_append_places(
    k: Tensor,
    storage: Tensor,
    context_lens: Tensor,
    context_index: Tensor | None,
    block_table: Tensor | None,
    block_lens: Tensor | None,
) -> None:
    """What is to be appended has a place of its own. In a recording who replays it answers for that."""
    if cpu.is_recording():
        return
    page = storage.shape[1]
    capacity = page if block_table is None else block_table.shape[1] * page
    _check_lengths("block_lens", block_lens, k.shape[1])
    _check_lengths("context_lens", context_lens, capacity)
    count = torch.full_like(context_lens, k.shape[1]) if block_lens is None else block_lens
    total = context_lens.long() + count
    if (total > capacity).any():
        raise ValueError(
            f"context_lens + block_lens: expected at most {capacity}, the context's storage, got {total.tolist()}"
        )
    if context_index is None and block_table is None:
        return  # every row writes to its own context row
    _check_places(storage, None, context_index, None if block_table is None else block_table[:, :0])
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
