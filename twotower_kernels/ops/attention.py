"""Attention of a block over a context and over itself. Formulas: `reference/attention.py`; kernel:
`csrc/cpu/attention.cpp`; gradients: `attention_gradient.py`."""

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from twotower_kernels import cpu
from twotower_kernels.ops import attention_gradient as gradient
from twotower_kernels.ops._direct import entries
from twotower_kernels.ops._library import as_index, define, refuse_gradients
from twotower_kernels.ops._traced import call
from twotower_kernels.ops._transforms import Rule, cast_to, lowered
from twotower_kernels.ops.attention_checks import (
    Lengths,
    as_flag,
    as_lengths,
    as_sinks,
    check_append,
    check_append_places,
    check_axes,
    check_block,
    check_context,
    check_merge,
    check_no_gradient,
    check_no_past,
    check_out,
    check_values,
    room,
    softmax_numbers,
    statistics_dtype,
)
from twotower_kernels.options.arguments import whole


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
    """Softmax attention of each block over its context and itself; `[B, S, H, D]`: tokens before heads, as everywhere.

    Source: scaled dot-product attention (arXiv 1706.03762, eq. 1) with grouped heads (arXiv 2305.13245), computed
    online (arXiv 2205.14135); pages as in arXiv 2309.06180; sinks as learned logits (gpt-oss; arXiv 2309.17453). The
    context is read in place. A query without any key gives 0 and a log-sum-exp of -inf, or its sink.

    Args:
        q: `[B, S, Hq, D]`; float64, float32, bfloat16 or float16; any strides. Of a tensor `[B, H, S, D]`, pass
            `x.transpose(1, 2)`, which copies nothing.
        k, v: `[B, S, Hkv, D]` and `[B, S, Hkv, Dv]`, the block's own keys and values; Hq is a multiple of Hkv.
        k_context, v_context: `[Bc, T, Hkv, D]` and `[Bc, T, Hkv, Dv]`; or with `block_table`, pages
            `[P, page, Hkv, ...]`. Bc is B, or 1: one context for all rows. None: no context.
        context_lens: tokens of context that a row sees, an integer or integers `[B]` or `[]`; default all. Without a
            context, 0.
        context_starts: those of them, in front, that it does not see (left padding), like `context_lens`; default 0.
        context_index: integers `[B]`, the context row that a batch row reads; then Bc is any.
        block_table: integers `[Bc, n]`, a context row's pages in order; entries beyond a length are not read.
        block_lens: tokens of the block that are real, like `context_lens`; default S.
        causal: query i sees the block's keys 0..i only.
        window: only the last `window` tokens of the context are seen, the same ones by every query, also by a causal
            one; None: all. For a window that slides with the query: `context_attention`.
        scale: of the logits; default 1/√D.
        softcap: logits become `softcap · tanh(logit / softcap)`; 0: they stay.
        sinks: `[Hq]`, any floating dtype: one more logit per head in the sum of exponentials, without a value; neither
            scaled nor capped.
        return_lse: also return the log-sum-exp.
        out: takes the result, which is then without gradient; any strides. It may lie in the memory of what is read.

    Under autocast, q, k, v and the context are cast as by `F.scaled_dot_product_attention`; with `out`, nothing is.

    Returns:
        `[B, S, Hq, Dv]` in the dtype of `q`; with `return_lse` also the natural logarithm of the sum of exponentials,
        sinks included, `[B, S, Hq]`, float32 (float64 for float64). Differentiable in q, k, v and sinks.

    Raises:
        ValueError: wrong shape, length, index or page, an `out` two of whose elements share a place. TypeError: wrong
            dtype. MemoryError: on a CPU, no room for scratch; `out` may then be written in part.
        NotImplementedError: in backward, a gradient of the context.
    """
    if not is_dynamo_compiling() and out is None and block_table is None:
        past = k_context, v_context, context_lens, context_starts, context_index
        others = block_lens, sinks, causal, window, scale, softcap
        if (found := entries().block_attention(q, k, v, *past, *others)) is not None:
            return found if return_lse else found[0]
    if out is None:
        q, k, v, k_context, v_context = lowered(q, k, v, k_context, v_context)
    check_axes(q=q, k=k, v=v)
    context = _context(q, k_context, v_context, context_lens, context_starts, context_index, block_table)
    lens, step = as_lengths("block_lens", block_lens, q.shape[1], q), as_flag("causal", causal)
    return _of_block(q, k, v, context, lens, sinks, step, window, scale, softcap, return_lse, out)


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
    """Softmax attention of a sequence of blocks, each over itself and those before it; `[B, S, H, D]`.

    The prefill of a block-causal model, in one call: token i sees token j if `j // block_size <= i // block_size`. What
    `block_attention` makes of the blocks one after the other, over a context that grows. Source: block diffusion
    (arXiv 2503.09573).

    Args:
        q, k, v: `[B, S, Hq, D]`, `[B, S, Hkv, D]` and `[B, S, Hkv, Dv]`, as in `block_attention`.
        block_size: tokens of a block, 1 or more; the last block of a sequence may be short. 1: a causal mask.
        seq_lens: tokens of each row that are real, an integer or integers `[B]` or `[]`; default S.
        scale, softcap, sinks, return_lse, out: as in `block_attention`.

    Returns:
        As `block_attention`. Differentiable in q, k, v and sinks.

    Raises:
        ValueError, TypeError, MemoryError: as `block_attention`.
    """
    if out is None:
        q, k, v = lowered(q, k, v)
    check_axes(q=q, k=k, v=v)
    step, lens = whole("block_size", block_size), as_lengths("seq_lens", seq_lens, q.shape[1], q)
    if step < 1:
        raise ValueError(f"block_size: expected at least 1, got {step}")
    return _of_block(q, k, v, (None,) * 6, lens, sinks, step, None, scale, softcap, return_lse, out)


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
    """Softmax attention of each block over its context alone; `[B, S, H, D]`: tokens before heads, as everywhere.

    The context's part of `block_attention`, to be merged with another by `merge_attention`; or, where the block's keys
    have been appended already, all of it. Arguments, results and errors as there, without the block's own keys, but:

    Args:
        causal: the last `block_lens[b]` of the `context_lens[b]` tokens are the block's own, and query i sees those up
            to its own: the mask is aligned bottom-right. Queries of a context shorter than the block may see nothing.
        window: with `causal`, each query sees the last `window` of what it would see, its own token included, as the
            sliding layers of transformers do (distances below `window`). Without, as in `block_attention`.

    Differentiable in q and sinks. Without lengths, `context_attention(q, k, v)` is attention of all to all, with
    `causal` and `window` the prefill of a sliding layer.
    """
    if not is_dynamo_compiling() and out is None and block_table is None:
        past = k_context, v_context, context_lens, context_starts, context_index
        others = block_lens, sinks, causal, window, scale, softcap
        if (found := entries().block_attention(q, None, None, *past, *others)) is not None:
            return found if return_lse else found[0]
    if out is None:
        q, k_context, v_context = lowered(q, k_context, v_context)
    check_axes(q=q)
    window, scale, softcap = softmax_numbers(window, scale, softcap)
    context = _context(q, k_context, v_context, context_lens, context_starts, context_index, block_table)
    lens = as_lengths("block_lens", block_lens, q.shape[1], q)
    arguments = q, *context, lens, as_sinks(sinks, q), as_flag("causal", causal), window, scale, softcap
    if out is None:
        result, lse = call("context_attention", *arguments)
    else:
        check_no_gradient(out, q, k_context, v_context, sinks)
        result, lse = out, out.new_empty(q.shape[:3], dtype=statistics_dtype(q))
        call("context_attention_out", *arguments, out, lse)
    return (result, lse) if return_lse else result


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each; `[..., D]`.

    Source: FlashAttention-2 (arXiv 2307.08691, section 3.1): both sides weighted by the exponentials of their
    log-sum-exp. A side whose log-sum-exp is -inf, or +inf as FlashAttention writes it, saw no key: it contributes
    nothing, whatever its output holds. Sinks are given to one of the two sides: a log-sum-exp includes them.

    Args:
        out_a, out_b: `[..., D]`; float64, float32, bfloat16 or float16; any strides.
        lse_a, lse_b: `[...]`, float32 (float64 for float64 outputs).

    Under autocast, out_a and out_b are cast as the arguments of `block_attention` are.

    Returns:
        `(out, lse)`, shaped and typed as the inputs; 0 and -inf where both sides are empty. Differentiable in all four.

    Raises:
        ValueError: shapes, dtypes or devices that differ. TypeError: wrong dtype.
    """
    if not is_dynamo_compiling() and (merged := entries().merge_attention(out_a, lse_a, out_b, lse_b)) is not None:
        return merged
    out_a, out_b = lowered(out_a, out_b)
    return call("merge_attention", out_a, lse_a, out_b, lse_b)


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
    """Writes a block's keys and values, `[B, S, H, D]`, behind its context, in place.

    The lengths are the caller's to advance.

    Args:
        k_context, v_context: storage as in `block_attention`, last dimension contiguous.
        k, v: `[B, S, Hkv, D]` and `[B, S, Hkv, Dv]` in the dtype of the storage, to which autocast casts them; any
            strides. They may lie in the storage themselves.
        context_lens: tokens that are there already, an integer or integers `[B]` or `[]`.
        context_index, block_table: as in `block_attention`.
        block_lens: how many tokens of each row are appended, like `context_lens`; default S.

    Raises:
        ValueError: wrong shape, length, index or page, no room, two rows that write to one place, storage whose last
            dimension is not contiguous, whose elements share a place or that overlaps the other's, an argument that
            requires grad. TypeError: wrong dtype. Nothing is written then.
    """
    here = context_index is None and block_table is None and not is_dynamo_compiling()
    if here and entries().append_kv(k_context, v_context, k, v, context_lens, block_lens):
        return
    k, v = cast_to(k_context.dtype, k, v)
    check_axes(k=k, v=v, k_context=k_context, v_context=v_context)
    refuse_gradients("append_kv", k_context=k_context, v_context=v_context, k=k, v=v)
    if context_lens is None:
        raise TypeError("context_lens: expected an integer or an integer tensor, got None")
    index, table = as_index(context_index), as_index(block_table)
    start = as_lengths("context_lens", context_lens, room(k_context, table), k)
    count = as_lengths("block_lens", block_lens, k.shape[1], k)
    call("append_kv", k_context, v_context, k, v, start, index, table, count)


def _context(
    q: Tensor,
    k_context: Tensor | None,
    v_context: Tensor | None,
    context_lens: Lengths | None,
    context_starts: Lengths | None,
    context_index: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The context's arguments as the ops take them: a row of context for every row of q, or an index."""
    if k_context is None or v_context is None:
        if k_context is v_context:
            check_no_past(context_starts, context_index, block_table)
        lens = as_lengths("context_lens", context_lens, 0, q)
        return k_context, v_context, lens, None, None, None  # one without the other is refused by the operators
    check_axes(k_context=k_context, v_context=v_context)
    table, batch = as_index(block_table), q.shape[0]
    tokens = room(k_context, table)
    lens = as_lengths("context_lens", context_lens, tokens, q)
    starts = as_lengths("context_starts", context_starts, tokens, q)
    if context_index is None and batch != 1:
        if table is not None:
            table = table.expand(batch, -1) if table.shape[0] == 1 else table
        elif k_context.shape[0] == 1:
            k_context = k_context.expand(batch, -1, -1, -1)
            v_context = v_context.expand(batch, -1, -1, -1) if v_context.shape[0] == 1 else v_context
    return k_context, v_context, lens, starts, as_index(context_index), table


def _of_block(
    q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor | None, ...], block_lens: Tensor | None,
    sinks: Tensor | None, causal: int, window: int | None, scale: float | None, softcap: float,
    return_lse: bool, out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    window, scale, softcap = softmax_numbers(window, scale, softcap)
    arguments = q, k, v, *context, block_lens, as_sinks(sinks, q), causal, window, scale, softcap
    if out is None:
        result, lse = call("block_attention", *arguments)
    else:
        check_no_gradient(out, q, k, v, *context[:2], sinks)
        result, lse = out, out.new_empty(q.shape[:3], dtype=statistics_dtype(q))
        call("block_attention_out", *arguments, out, lse)
    return (result, lse) if return_lse else result


# --- registration ---------------------------------------------------------------------------------------------------


def _attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_context: Tensor | None, v_context: Tensor | None,
    context_lens: Tensor | None, context_starts: Tensor | None, context_index: Tensor | None,
    block_table: Tensor | None, block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Into results whose last dimension is contiguous."""
    places = context_lens, context_starts, context_index, block_table, block_lens
    check_values(q, k_context, *places, causal)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = q, k, v, k_context, v_context, *places, sinks, out, lse
    cpu.call("block_attention", *tensors, scale, softcap, -1 if window is None else window, causal)


def _attend_into(q: Tensor, *arguments: Any) -> None:
    *others, out, lse = arguments
    results = [x if cpu.rows_contiguous(x) is x else x.new_empty(x.shape) for x in (out, lse)]
    _attend(*(q, *others, *results))
    for x, result in zip((out, lse), results, strict=True):
        if result is not x:
            x.copy_(result)


def _check_block_into(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> None:
    *others, out, lse = arguments
    check_block(q, k, v, *others)
    check_out(q, v, out, lse)


def _check_context_into(q: Tensor, k_context: Tensor, v_context: Tensor, *arguments: Any) -> None:
    *others, out, lse = arguments
    check_context(q, k_context, v_context, *others)
    check_out(q, v_context, out, lse)


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


def _block_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(q, v)
    _attend(*(q, k, v, *arguments, *results))
    return results


def _context_attention_into(q: Tensor, *arguments: Any) -> None:
    _attend_into(q, None, None, *arguments)


def _context_attention(q: Tensor, k_context: Tensor, v_context: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(q, v_context)
    _attend(*(q, None, None, k_context, v_context, *arguments, *results))
    return results


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
    check_append_places(k, k_context, context_lens, context_index, block_table, block_lens)
    cpu.call("append_kv", k_context, v_context, k, v, context_lens, context_index, block_table, block_lens)


_OPTIONS = (
    "Tensor? context_lens, Tensor? context_starts, Tensor? context_index, Tensor? block_table, Tensor? block_lens, "
    "Tensor? sinks, SymInt causal, SymInt? window, float? scale, float softcap"
)
_BLOCK = f"Tensor q, Tensor k, Tensor v, Tensor? k_context, Tensor? v_context, {_OPTIONS}"
_PAST = f"Tensor q, Tensor k_context, Tensor v_context, {_OPTIONS}"
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
    f"block_attention({_BLOCK}) -> (Tensor, Tensor)",
    check=check_block,
    cpu=_block_attention,
    cuda="triton.attention:block_attention",
    fake=lambda q, k, v, *_: _results(q, v),
    backward=gradient.block_backward,
    setup_context=gradient.save_block,
    autocast=_lowered_attention(5),
)
define(
    f"block_attention_out({_BLOCK}{_OUT}) -> ()",
    check=_check_block_into,
    cpu=_attend_into,
    cuda="triton.attention:block_attention_out",
    fake=lambda *_: None,
)
define(
    f"context_attention({_PAST}) -> (Tensor, Tensor)",
    check=check_context,
    cpu=_context_attention,
    cuda="triton.attention:context_attention",
    fake=lambda q, k_context, v_context, *_: _results(q, v_context),
    backward=gradient.context_backward,
    setup_context=gradient.save_context,
    autocast=_lowered_attention(3),
)
define(
    f"context_attention_out({_PAST}{_OUT}) -> ()",
    check=_check_context_into,
    cpu=_context_attention_into,
    cuda="triton.attention:context_attention_out",
    fake=lambda *_: None,
)
define(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=check_merge,
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
    check=check_append,
    cpu=_append_kv,
    cuda="triton.attention_merge:append_kv",
    fake=lambda *_: None,
    autocast=_as_storage,
)
