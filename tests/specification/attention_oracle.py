"""What attention means, one query at a time, and what plain PyTorch makes of it: the tests' two yardsticks.

None of it shares a line with the reference: keys are looked up one by one, and softmax is written out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def value_of(lens: int | Tensor | None, row: int, default: int) -> int:
    """A length or an index that may be absent, a scalar or one per row."""
    if lens is None:
        return default
    return int(lens if isinstance(lens, int) or lens.ndim == 0 else lens[row])


def real_tokens(inputs: dict[str, Any], row: int) -> int:
    return value_of(inputs.get("block_lens", inputs.get("seq_lens")), row, default=inputs["q"].shape[1])


def visible_keys(inputs: dict[str, Any], row: int, query: int) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and values [Hkv,D] that one query sees, in order, each read from its own place in the storage."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def see(k: Tensor, v: Tensor) -> None:
        keys.append(k)
        values.append(v)

    tokens = real_tokens(inputs, row)
    if query >= tokens:
        return keys, values
    if "k_context" in inputs:
        k_context, v_context, table = inputs["k_context"], inputs["v_context"], inputs.get("block_table")
        page = k_context.shape[1]
        one = len(k_context if table is None else table) == 1
        place = value_of(inputs.get("context_index"), row, default=0 if one else row)
        length = value_of(inputs.get("context_lens"), row, default=page * (1 if table is None else table.shape[1]))
        window = inputs.get("window")
        if "k" not in inputs and inputs.get("causal"):
            length -= tokens - query - 1  # those of the block that come later
        for t in range(value_of(inputs.get("context_starts"), row, default=0), length):
            if window is not None and t < length - window:
                continue
            where = (place, t) if table is None else (int(table[place, t // page]), t % page)
            see(k_context[where], v_context[where])
    if "k" in inputs:
        size = inputs.get("block_size", 1 if inputs.get("causal") else tokens)
        for j in range(min(tokens, (query // size + 1) * size)):
            see(inputs["k"][row, j], inputs["v"][row, j])
    return keys, values


def oracle(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out [B,S,Hq,Dv], lse [B,S,Hq]) in float64: softmax over the visible keys, by its definition."""
    q = inputs["q"]
    batch, length, heads, dim = q.shape
    kv_heads, value_dim = inputs["v" if "v" in inputs else "v_context"].shape[2:]
    softcap, scale = inputs.get("softcap", 0.0), inputs.get("scale") or 1 / math.sqrt(dim)
    out = torch.zeros(batch, length, heads, value_dim, dtype=torch.float64)
    lse = torch.full((batch, length, heads), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        for query in range(length):
            keys, values = visible_keys(inputs, row, query)
            sinks = inputs.get("sinks") if query < real_tokens(inputs, row) else None
            if not keys:
                lse[row, query] = -torch.inf if sinks is None else sinks.double()
                continue
            key, value = torch.stack(keys).double(), torch.stack(values).double()  # [n,Hkv,D]
            for head in range(heads):
                group = head * kv_heads // heads
                logits = key[:, group] @ q[row, query, head].double() * scale
                if softcap:
                    logits = softcap * (logits / softcap).tanh()
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                top = logits.max()
                weights = (logits - top).exp()
                lse[row, query, head] = top + weights.sum().log()
                out[row, query, head] = (weights / weights.sum())[: len(value)] @ value[:, group]
    return out, lse


def naive(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same as anybody would write it with PyTorch operators, query by query, in the inputs' own precision."""
    q = inputs["q"]
    batch, length, heads, dim = q.shape
    softcap, scale = inputs.get("softcap", 0.0), inputs.get("scale") or 1 / math.sqrt(dim)
    out = q.new_zeros(batch, length, heads, inputs["v" if "v" in inputs else "v_context"].shape[3])
    lse = torch.full(
        (batch, length, heads), -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    for row in range(batch):
        for query in range(length):
            keys, values = visible_keys(inputs, row, query)
            sinks = inputs.get("sinks") if query < real_tokens(inputs, row) else None
            if not keys:
                lse[row, query] = -torch.inf if sinks is None else sinks.to(lse.dtype)
                continue
            group = heads // keys[0].shape[0]
            key = torch.stack(keys).repeat_interleave(group, dim=1)  # [n,Hkv,D] -> [n,Hq,D]
            value = torch.stack(values).repeat_interleave(group, dim=1)
            logits = torch.einsum("nhd,hd->hn", key, q[row, query]) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[:, None]], dim=-1)
            lse[row, query] = torch.logsumexp(logits.to(lse.dtype), dim=-1)
            out[row, query] = torch.einsum("hn,nhd->hd", logits.softmax(dim=-1)[:, : len(value)], value)
    return out, lse
