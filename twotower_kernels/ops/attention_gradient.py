"""Gradients of the attention ops, in PyTorch. None in the context, so each batch row is a problem of its own."""

from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops._library import define
from twotower_kernels.ops._traced import call_in_graph
from twotower_kernels.ops.attention_checks import check_backward, check_values, statistics_dtype


def _context(storage: Tensor, table: Tensor | None, row: int, begin: int, end: int) -> Tensor:
    """Tokens [begin, end) of a context row, [T,Hkv,D]: a view of dense storage, a copy of pages."""
    if table is None:
        return storage[row, begin:end]
    page = storage.shape[1]
    first = begin // page if page else 0
    pages = storage[table[row, first : -(-end // page) if page else 0].long()].flatten(0, 1)
    return pages[begin - first * page : end - first * page]


def _row(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, keys: list[Tensor], values: list[Tensor],
    hidden: list[Tensor | None], sinks: Tensor | None, scale: float, softcap: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Gradients of q [S,Hkv,R,D] and, for each part of the keys [T,Hkv,D], of keys and values, and of sinks [Hkv,R].
    hidden: [S,T], keys of a part that a query does not see."""
    logits, slopes = [], []
    for k, unseen in zip(keys, hidden, strict=True):
        logit = torch.einsum("sgrd,tgd->sgrt", q, k) * scale
        if softcap:
            tanh = torch.tanh(logit / softcap)
            logit = softcap * tanh
            slopes.append(1 - tanh * tanh)
        logits.append(logit if unseen is None else logit.masked_fill(unseen[:, None, None], -torch.inf))
    logits.append(q.new_empty((*q.shape[:3], 0)) if sinks is None else sinks.expand(*q.shape[:3])[..., None])
    whole = torch.cat(logits, dim=-1)
    empty = whole.isneginf().all(-1, keepdim=True)
    weights = whole.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    parts = [torch.einsum("sgrd,tgd->sgrt", grad_out, v) for v in values]
    towards = torch.cat([*parts, torch.zeros_like(logits[-1])], dim=-1)
    grad = weights * (towards - (weights * towards).sum(-1, keepdim=True) + grad_lse[..., None])
    sizes = [len(k) for k in keys]
    *grads, of_sinks = grad.split([*sizes, logits[-1].shape[-1]], dim=-1)
    if softcap:
        grads = [g * slope for g, slope in zip(grads, slopes, strict=True)]
    grads = [g * scale for g in grads]
    grad_q = sum((torch.einsum("sgrt,tgd->sgrd", g, k) for g, k in zip(grads, keys, strict=True)), torch.zeros_like(q))
    grad_k = [torch.einsum("sgrt,sgrd->tgd", g, q) for g in grads]
    grad_v = [torch.einsum("sgrt,sgrd->tgd", w, grad_out) for w in weights.split([*sizes, of_sinks.shape[-1]], -1)[:-1]]
    return grad_q, grad_k, grad_v, of_sinks.sum((0, 3))


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    k_context: Tensor | None, v_context: Tensor | None, context_lens: Tensor | None, context_starts: Tensor | None,
    context_index: Tensor | None, block_table: Tensor | None, block_lens: Tensor | None, sinks: Tensor | None,
    causal: int, window: int | None, scale: float | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_values(q, k_context, context_lens, context_starts, context_index, block_table, block_lens, causal)
    dtype, (batch, length, heads, dim) = statistics_dtype(q), q.shape
    grad_q, grad_k, grad_v, grad_sinks = _zeros(q, k, v, sinks)
    counts = [length] * batch if block_lens is None else block_lens.tolist()
    rows = list(range(batch)) if context_index is None else context_index.tolist()
    tokens = 0 if k_context is None else k_context.shape[1] * (1 if block_table is None else block_table.shape[1])
    ends = [tokens] * batch if context_lens is None else context_lens.tolist()
    starts = [0] * batch if context_starts is None else context_starts.tolist()
    for b, (count, row, start, end) in enumerate(zip(counts, rows, starts, ends, strict=True)):
        query = torch.arange(count)[:, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        hidden: list[Tensor | None] = []
        slides = k is None and causal  # the context holds the block
        begin = start if window is None or slides else max(start, end - window)
        if k_context is not None and v_context is not None and end > begin:
            keys.append(_context(k_context, block_table, row, begin, end).to(dtype))
            values.append(_context(v_context, block_table, row, begin, end).to(dtype))
            hidden.append(None)
            if slides:
                position, last = torch.arange(begin, end), end - count + query // causal * causal + causal - 1
                hidden[-1] = position > last
                if window is not None:
                    hidden[-1] |= position <= end - count + query - window
        if k is not None and v is not None:
            keys.append(k[b, :count].to(dtype))
            values.append(v[b, :count].to(dtype))
            hidden.append(query.T // causal > query // causal if causal else None)
        if count == 0 or heads == 0 or (not keys and sinks is None):
            continue
        kv_heads = (k if k is not None else k_context).shape[2]  # type: ignore[union-attr]
        grouped, towards = (x[b, :count].to(dtype).unflatten(1, (kv_heads, -1)) for x in (q, grad_out))
        lse = grad_lse[b, :count].to(dtype).unflatten(1, (kv_heads, -1))
        scaled = dim**-0.5 if scale is None else scale
        per_head = None if sinks is None else sinks.unflatten(0, (kv_heads, -1))
        of_q, of_k, of_v, of_sinks = _row(towards, lse, grouped, keys, values, hidden, per_head, scaled, softcap)
        grad_q[b, :count] = of_q.flatten(1, 2)
        if k is not None:
            grad_k[b, :count], grad_v[b, :count] = of_k[-1], of_v[-1]
        if sinks is not None:
            grad_sinks += of_sinks.flatten()
    return grad_q, grad_k, grad_v, grad_sinks


def _zeros(q: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Gradients of q and of others, `[]` of what is not there."""
    return [q.new_zeros(()) if x is None else x.new_zeros(x.shape) for x in (q, *others)]


define(
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor? k, Tensor? v, Tensor? k_context, "
    "Tensor? v_context, Tensor? context_lens, Tensor? context_starts, Tensor? context_index, Tensor? block_table, "
    "Tensor? block_lens, Tensor? sinks, SymInt causal, SymInt? window, float? scale, float softcap) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=check_backward,
    cpu=_attention_backward,
    cuda="triton.attention_gradient:attention_backward",
    fake=lambda grad_out, grad_lse, q, k, v, *arguments: tuple(_zeros(q, k, v, arguments[7])),
)


def save_block(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs of `block_attention`: eleven tensors, then four options."""
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def block_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `block_attention`'s inputs: of q, k, v and sinks."""
    saved = ctx.saved_tensors
    *grads, of_sinks = call_in_graph("attention_backward", grad_out, grad_lse, *saved, *ctx.options)
    return (*grads, *[None] * 7, None if saved[10] is None else of_sinks, *[None] * 4)


def save_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs of `context_attention`: nine tensors, then four options."""
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def context_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `context_attention`'s inputs: of q and sinks."""
    q, *rest = ctx.saved_tensors
    grad_q, _, _, of_sinks = call_in_graph("attention_backward", grad_out, grad_lse, q, None, None, *rest, *ctx.options)
    return (grad_q, *[None] * 7, None if rest[7] is None else of_sinks, *[None] * 4)


def save_merge(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    """Saves the inputs of `merge_attention`."""
    ctx.save_for_backward(*inputs)


def merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `merge_attention`'s four inputs; an empty side has none, whatever it holds."""
    out_a, lse_a, out_b, lse_b = ctx.saved_tensors
    lses = torch.stack([lse_a, lse_b])
    nothing = lses.isinf()
    seen = lses.masked_fill(nothing, -torch.inf).masked_fill(nothing.all(0), 0)
    weights = seen.softmax(0).masked_fill(nothing, 0)  # [2,...]
    outs = torch.stack([out_a, out_b]).to(lses.dtype).masked_fill(nothing[..., None], 0)
    grad = grad_out.to(lses.dtype)
    towards = (outs * grad).sum(-1)
    grad_lses = weights * (towards - (weights * towards).sum(0) + grad_lse)
    grad_lses = grad_lses.masked_fill(nothing, 0)
    grad_outs = (weights[..., None] * grad).to(out_a.dtype)
    return grad_outs[0], grad_lses[0], grad_outs[1], grad_lses[1]
