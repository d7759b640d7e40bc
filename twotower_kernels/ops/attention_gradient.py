"""Gradients of the attention ops, in PyTorch. The context is frozen, so each batch row is a problem of its own."""

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
    causal: bool, scale: float, softcap: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of q [S,Hkv,R,D] and, for each part of the keys [T,Hkv,D], of keys and values. The last part is the
    block itself if `causal`."""
    logits, slopes = [], []
    for part, k in enumerate(keys):
        logit = torch.einsum("sgrd,tgd->sgrt", q, k) * scale
        if softcap:
            tanh = torch.tanh(logit / softcap)
            logit = softcap * tanh
            slopes.append(1 - tanh * tanh)
        if causal and part == len(keys) - 1:
            later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
            logit = logit.masked_fill(later[:, None, None], -torch.inf)
        logits.append(logit)
    whole = torch.cat(logits, dim=-1)
    empty = whole.isneginf().all(-1, keepdim=True)
    weights = whole.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    towards = torch.cat([torch.einsum("sgrd,tgd->sgrt", grad_out, v) for v in values], dim=-1)
    grad = weights * (towards - (weights * towards).sum(-1, keepdim=True) + grad_lse[..., None])
    if softcap:
        grad = grad * torch.cat(slopes, dim=-1)
    grad = grad * scale
    sizes = [len(k) for k in keys]
    grads = grad.split(sizes, dim=-1)
    grad_q = sum((torch.einsum("sgrt,tgd->sgrd", g, k) for g, k in zip(grads, keys, strict=True)), torch.zeros_like(q))
    grad_k = [torch.einsum("sgrt,sgrd->tgd", g, q) for g in grads]
    grad_v = [torch.einsum("sgrt,sgrd->tgd", w, grad_out) for w in weights.split(sizes, dim=-1)]
    return grad_q, grad_k, grad_v


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    k_context: Tensor | None, v_context: Tensor | None, context_lens: Tensor | None, context_index: Tensor | None,
    block_table: Tensor | None, block_lens: Tensor | None,
    causal: bool, window: int | None, scale: float | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_values(q, k_context, context_lens, context_index, block_table, block_lens)
    dtype, (batch, length, heads, dim) = statistics_dtype(q), q.shape
    grad_q = q.new_zeros(q.shape)
    grad_k, grad_v = (q.new_zeros(() if x is None else x.shape) for x in (k, v))
    counts = [length] * batch if block_lens is None else block_lens.tolist()
    rows = list(range(batch)) if context_index is None else context_index.tolist()
    ends = [0] * batch if context_lens is None else context_lens.tolist()
    if k_context is not None and context_lens is None:
        ends = [k_context.shape[1] * (1 if block_table is None else block_table.shape[1])] * batch
    for b, (count, row, end) in enumerate(zip(counts, rows, ends, strict=True)):
        begin = 0 if window is None else max(0, end - window)
        keys, values = [], []
        if k_context is not None and v_context is not None and end > begin:
            keys.append(_context(k_context, block_table, row, begin, end).to(dtype))
            values.append(_context(v_context, block_table, row, begin, end).to(dtype))
        if k is not None and v is not None:
            keys.append(k[b, :count].to(dtype))
            values.append(v[b, :count].to(dtype))
        if count == 0 or not keys or heads == 0:
            continue
        kv_heads = keys[0].shape[1]
        grouped, towards = (x[b, :count].to(dtype).unflatten(1, (kv_heads, -1)) for x in (q, grad_out))
        lse = grad_lse[b, :count].to(dtype).unflatten(1, (kv_heads, -1))
        scaled = dim**-0.5 if scale is None else scale
        of_q, of_k, of_v = _row(towards, lse, grouped, keys, values, causal, scaled, softcap)
        grad_q[b, :count] = of_q.flatten(1, 2)
        if k is not None:
            grad_k[b, :count], grad_v[b, :count] = of_k[-1], of_v[-1]
    return grad_q, grad_k, grad_v


define(
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor? k, Tensor? v, Tensor? k_context, "
    "Tensor? v_context, Tensor? context_lens, Tensor? context_index, Tensor? block_table, Tensor? block_lens, "
    "bool causal, SymInt? window, float? scale, float softcap) -> (Tensor, Tensor, Tensor)",
    check=check_backward,
    cpu=_attention_backward,
    cuda="triton.attention_gradient:attention_backward",
    fake=lambda grad_out, grad_lse, q, k, v, *_: (
        q.new_empty(q.shape), *(q.new_empty(() if x is None else x.shape) for x in (k, v))
    ),
)  # fmt: skip


def save_block(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs of `block_attention`: nine tensors, then four options."""
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def block_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `block_attention`'s inputs: of q, k and v."""
    grads = call_in_graph("attention_backward", grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 10)


def save_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs of `context_attention`: seven tensors, then three options."""
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def context_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `context_attention`'s inputs: of q."""
    q, *rest = ctx.saved_tensors
    grad_q, *_ = call_in_graph("attention_backward", grad_out, grad_lse, q, None, None, *rest, False, *ctx.options)
    return (grad_q, *[None] * 9)


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
