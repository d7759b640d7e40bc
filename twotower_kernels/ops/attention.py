"""Attention of a block over a context and over itself. Formulas: `reference/attention.py`; kernel:
`csrc/cpu/attention.cpp`; gradients: `attention_gradient.py`."""

from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops import attention_gradient as gradient
from twotower_kernels.ops._library import check_float, define, refuse_gradients, same_device
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import Rule, cast_to, lowered
from twotower_kernels.ops.attention_checks import (
    Lengths,
    as_lengths,
    check_alike,
    check_append,
    check_heads,
    check_lengths,
    check_options,
    check_out,
    check_places,
    check_rows,
    check_storage,
    statistics_dtype,
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
    """Softmax attention of each block over its context and over itself, the context read in place.

    Source: scaled dot-product attention (arXiv 1706.03762, eq. 1) with grouped heads (arXiv 2305.13245), computed
    online (arXiv 2205.14135); pages as in arXiv 2309.06180. A query without any key gives 0 and a log-sum-exp of -inf.

    Args:
        q: `[B, S, Hq, D]`; float64, float32, bfloat16 or float16; any strides.
        k, v: `[B, S, Hkv, D]`, the block's own keys and values; Hq is a multiple of Hkv.
        k_context, v_context: `[Bc, T, Hkv, D]`; or with `block_table`, pages `[P, page, Hkv, D]`. None: no context.
        context_lens: tokens of context that a row sees, an integer or int32/int64 `[B]` or `[]`; default all.
        context_index: int32/int64 `[B]`, the context row that a batch row reads; default its own number.
        block_table: int32/int64 `[Bc, n]`, a context row's pages in order; entries beyond a length are not read.
        block_lens: tokens of the block that are real, like `context_lens`; default S.
        causal: query i sees the block's keys 0..i only.
        window: only the last `window` tokens of the context are seen; None: all.
        scale: of the logits; default 1/√D.
        softcap: logits become `softcap · tanh(logit / softcap)`; 0: they stay.
        return_lse: also return the log-sum-exp.
        out: takes the result, which is then without gradient; any strides.

    Under autocast, q, k, v and the context are cast as by `F.scaled_dot_product_attention`; with `out`, nothing is.

    Returns:
        `[B, S, Hq, D]` in the dtype of `q`; with `return_lse` also the natural logarithm of the sum of exponentials,
        `[B, S, Hq]`, float32 (float64 for float64). Differentiable in q, k and v; the context is frozen.

    Raises:
        ValueError: wrong shape, length, index or page, or a context that requires grad. TypeError: wrong dtype.
    """
    if out is None:
        q, k, v, k_context, v_context = lowered(q, k, v, k_context, v_context)
    check_alike("q", q, k=k, v=v)
    batch, length, _, dim = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        raise ValueError(f"k, v: expected [{batch}, {length}, Hkv, {dim}], got {list(k.shape)}, {list(v.shape)}")
    check_heads(q, k, "k")
    check_out(q, out, k, v)
    if k_context is not None and v_context is not None:
        if k_context.ndim == 4 and k_context.shape[2] != k.shape[2]:
            raise ValueError(f"k_context: expected {k.shape[2]} key heads as in k, got {k_context.shape[2]}")
        context = _context(q, k_context, v_context, context_lens, context_index, block_table)
    elif k_context is not None or v_context is not None:
        raise ValueError("k_context and v_context: expected both or neither, got one")
    elif context_lens is not None or context_index is not None or block_table is not None:
        raise ValueError("context_lens, context_index, block_table: expected none without a context")
    else:
        context = (None,) * 5
    window, scale, softcap = check_options(window, scale, softcap)
    lens = as_lengths("block_lens", block_lens, length, batch, q)
    arguments = q, k, v, *context, lens, causal, window, scale, softcap
    if out is None:
        result, lse = call("block_attention", *arguments)
    else:
        result, lse = out, out.new_empty(q.shape[:3], dtype=statistics_dtype(q))
        call("block_attention_out", *arguments, out, lse)
    return (result, lse) if return_lse else result


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
    """The context's part of `block_attention`, to be merged with another by `merge_attention`.

    Arguments, results and errors as there, without the block's own keys. Differentiable in q.
    """
    if out is None:
        q, k_context, v_context = lowered(q, k_context, v_context)
    check_alike("q", q)
    context = _context(q, k_context, v_context, context_lens, context_index, block_table)
    check_out(q, out)
    window, scale, softcap = check_options(window, scale, softcap)
    lens = as_lengths("block_lens", block_lens, q.shape[1], q.shape[0], q)
    arguments = q, *context, lens, window, scale, softcap
    if out is None:
        result, lse = call("context_attention", *arguments)
    else:
        result, lse = out, out.new_empty(q.shape[:3], dtype=statistics_dtype(q))
        call("context_attention_out", *arguments, out, lse)
    return (result, lse) if return_lse else result


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Source: FlashAttention-2 (arXiv 2307.08691, section 3.1): both sides weighted by the exponentials of their
    log-sum-exp. A side whose log-sum-exp is -inf contributes nothing, whatever its output holds.

    Args:
        out_a, out_b: `[..., D]`; float64, float32, bfloat16 or float16; any strides.
        lse_a, lse_b: `[...]`, float32 (float64 for float64 outputs).

    Under autocast, out_a and out_b are cast as the arguments of `block_attention` are.

    Returns:
        `(out, lse)`, shaped and typed as the inputs; 0 and -inf where both sides are empty. Differentiable in all four.

    Raises:
        ValueError: shapes, dtypes or devices that differ. TypeError: wrong dtype.
    """
    out_a, out_b = lowered(out_a, out_b)
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
    return torch.ops.twotower.merge_attention.default(out_a, lse_a, out_b, lse_b)


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
    """Writes a block's keys and values behind its context, in place; the lengths are the caller's to advance.

    Args:
        k_context, v_context: storage as in `block_attention`, last dimension contiguous.
        k, v: `[B, S, Hkv, D]` in the dtype of the storage, to which autocast casts them; any strides.
        context_lens: tokens that are there already, an integer or int32/int64 `[B]` or `[]`.
        context_index, block_table: as in `block_attention`.
        block_lens: how many tokens of each row are appended, like `context_lens`; default S.

    Raises:
        ValueError: wrong shape, length, index or page, no room, two rows that write to one place, storage whose last
            dimension is not contiguous, an argument that requires grad. TypeError: wrong dtype. Nothing is written
            then.
    """
    k, v = cast_to(k_context.dtype, k, v)
    check_alike("k", k, v=v, k_context=k_context, v_context=v_context)
    check_storage(k.shape[3], k_context, v_context)
    refuse_gradients("append_kv", k=k, v=v)
    if k.shape != v.shape or k.shape[2:] != k_context.shape[2:]:
        expected = ["B", "S", *k_context.shape[2:]]
        raise ValueError(f"k, v: expected {expected} as in the context, got {list(k.shape)}, {list(v.shape)}")
    for name, storage in (("k_context", k_context), ("v_context", v_context)):
        if storage.stride(3) != 1 and storage.shape[3] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension to write to, got stride {storage.stride(3)}"
            )
    batch, length = k.shape[:2]
    capacity = check_rows(batch, k_context, context_index, block_table)
    if context_lens is None:
        raise TypeError("context_lens: expected an integer or an integer tensor, got None")
    start = as_lengths("context_lens", context_lens, capacity, batch, k)
    count = as_lengths("block_lens", block_lens, length, batch, k)
    torch.ops.twotower.append_kv.default(k_context, v_context, k, v, start, context_index, block_table, count)


def _context(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    context_lens: Lengths | None,
    context_index: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The context's arguments, checked, as the ops take them."""
    check_alike("q", q, k_context=k_context, v_context=v_context)
    check_storage(q.shape[3], k_context, v_context)
    check_heads(q, k_context, "k_context")
    capacity = check_rows(q.shape[0], k_context, context_index, block_table)
    lens = as_lengths("context_lens", context_lens, capacity, q.shape[0], q)
    return k_context, v_context, lens, context_index, block_table


# --- registration ---------------------------------------------------------------------------------------------------


def _attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_context: Tensor | None, v_context: Tensor | None,
    context_lens: Tensor | None, context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None,
    causal: bool, window: int | None, scale: float | None, softcap: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Into results whose last dimension is contiguous."""
    check_lengths("block_lens", block_lens, q.shape[1])
    if k_context is not None:
        check_places(k_context, context_lens, context_index, block_table)
    tensors = q, k, v, k_context, v_context, context_lens, context_index, block_table, block_lens, out, lse
    scale = q.shape[3] ** -0.5 if scale is None else scale
    cpu.call("block_attention", *tensors, scale, softcap, -1 if window is None else window, causal)


def _attend_into(q: Tensor, *arguments: Any) -> None:
    *others, out, lse = arguments
    results = [x if cpu.rows_contiguous(x) is x else x.new_empty(x.shape) for x in (out, lse)]
    _attend(*(q, *others, *results))
    for x, result in zip((out, lse), results, strict=True):
        if result is not x:
            x.copy_(result)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


def _block_attention(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(q)
    _attend(*(q, *arguments, *results))
    return results


def _context_attention_into(q: Tensor, *arguments: Any) -> None:
    *context, window, scale, softcap, out, lse = arguments
    _attend_into(q, None, None, *context, False, window, scale, softcap, out, lse)


def _context_attention(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *context, window, scale, softcap = arguments
    return _block_attention(q, None, None, *context, False, window, scale, softcap)


def _merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, dim = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape), out_a.shape[-1]
    shapes = (lse.numel(), dim), (lse.numel(),)
    rows = [x.reshape(shapes[x is lse_a or x is lse_b or x is lse]) for x in (out_a, lse_a, out_b, lse_b, out, lse)]
    cpu.call("merge_attention", *rows)
    return out, lse


def _append_kv(
    k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, context_lens: Tensor,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None,
) -> None:  # fmt: skip
    check_append(k, k_context, context_lens, context_index, block_table, block_lens)
    cpu.call("append_kv", k_context, v_context, k, v, context_lens, context_index, block_table, block_lens)


_CONTEXT = "Tensor? context_lens, Tensor? context_index, Tensor? block_table, Tensor? block_lens, "
_BLOCK = f"Tensor q, Tensor k, Tensor v, Tensor? k_context, Tensor? v_context, {_CONTEXT}bool causal, "
_PAST = f"Tensor q, Tensor k_context, Tensor v_context, {_CONTEXT}"
_OPTIONS = "SymInt? window, float? scale, float softcap"
_OUT = ", Tensor(a!) out, Tensor(b!) lse"


def _lowered_attention(number: int) -> Rule:
    """The autocast rule of an op whose first arguments, so many, are queries, keys and values."""
    return lambda *arguments: (*lowered(*arguments[:number]), *arguments[number:])


def _lowered_outputs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, ...]:
    out_a, out_b = lowered(out_a, out_b)
    return out_a, lse_a, out_b, lse_b


def _as_storage(k_context: Tensor, v_context: Tensor, k: Tensor, v: Tensor, *places: Tensor | None) -> tuple[Any, ...]:
    return k_context, v_context, *cast_to(k_context.dtype, k, v), *places


define(
    f"block_attention({_BLOCK}{_OPTIONS}) -> (Tensor, Tensor)",
    cpu=_block_attention,
    cuda="triton.attention:block_attention",
    fake=lambda q, *_: _results(q),
    backward=gradient.block_backward,
    setup_context=gradient.save_block,
    autocast=_lowered_attention(5),
)
define(
    f"block_attention_out({_BLOCK}{_OPTIONS}{_OUT}) -> ()",
    cpu=_attend_into,
    cuda="triton.attention:block_attention_out",
    fake=lambda *_: None,
)
define(
    f"context_attention({_PAST}{_OPTIONS}) -> (Tensor, Tensor)",
    cpu=_context_attention,
    cuda="triton.attention:context_attention",
    fake=lambda q, *_: _results(q),
    backward=gradient.context_backward,
    setup_context=gradient.save_context,
    autocast=_lowered_attention(3),
)
define(
    f"context_attention_out({_PAST}{_OPTIONS}{_OUT}) -> ()",
    cpu=_context_attention_into,
    cuda="triton.attention:context_attention_out",
    fake=lambda *_: None,
)
define(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    cpu=_merge_attention,
    cuda="triton.attention_merge:merge_attention",
    fake=lambda out_a, lse_a, *_: (out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)),
    backward=gradient.merge_backward,
    setup_context=gradient.save_merge,
    autocast=_lowered_outputs,
)
define(
    "append_kv(Tensor(a!) k_context, Tensor(b!) v_context, Tensor k, Tensor v, Tensor context_lens, "
    "Tensor? context_index, Tensor? block_table, Tensor? block_lens) -> ()",
    cpu=_append_kv,
    cuda="triton.attention_merge:append_kv",
    fake=lambda *_: None,
    autocast=_as_storage,
)
