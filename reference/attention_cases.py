"""Sizes and inputs for the attention ops: what tests and benchmarks speak of by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Sizes not named take the value in DEFAULTS; context None is no context at all, page None dense storage, value_dim None
# the same as head_dim; sinks True draws some.
DEFAULTS: dict[str, Any] = {
    "batch": 2, "block": 5, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": None, "context_rows": None,
    "context_index": None, "page": None, "context_lens": None, "context_starts": None, "block_lens": None,
    "transposed": False, "value_dim": None, "sinks": False,
}  # fmt: skip

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "block_attention": {
        "tiny": dict(context=7, context_lens=[7, 3]),
        "no_context": dict(),
        "whole_context": dict(context=6),
        "zero_context": dict(context=4, context_lens=[0, 0]),
        "zero_storage": dict(context=0),
        "one_token": dict(batch=3, block=1, context=5, context_lens=[0, 1, 5]),
        "no_tokens": dict(block=0, context=5),
        "empty_batch": dict(batch=0, context=5),
        "causal": dict(batch=3, block=7, context=9, context_lens=[9, 0, 4], causal=True),
        "prefill_ragged": dict(batch=4, block=9, block_lens=[9, 0, 1, 6], causal=True),
        "ragged": dict(batch=3, block=5, context=9, context_lens=[9, 0, 2], block_lens=[5, 0, 3]),
        "window": dict(batch=4, context=12, context_lens=[12, 5, 1, 0], window=5),
        "window_zero": dict(context=6, window=0),
        "softcap": dict(context=7, context_lens=[7, 2], softcap=2.0, scale=0.7),
        "multi_query": dict(heads=6, kv_heads=1, context=7, context_lens=[2, 7]),
        "multi_head": dict(heads=3, kv_heads=3, head_dim=5, context=7, context_lens=[2, 7]),
        "group_of_16": dict(heads=32, kv_heads=2, head_dim=16, block=16, context=33, context_lens=[33, 17]),
        "shared_context": dict(
            batch=5, context=8, context_rows=2, context_index=[1, 0, 1, 1, 0], context_lens=[8, 2, 0, 4, 5]
        ),
        "paged": dict(batch=3, context=12, page=4, context_lens=[12, 0, 5]),
        "paged_shared": dict(
            batch=4, context=21, page=7, context_rows=2, context_index=[0, 0, 1, 1], context_lens=[3, 21, 7, 8]
        ),
        "paged_window": dict(batch=3, context=21, page=7, context_lens=[3, 21, 8], window=6, causal=True),
        "transposed": dict(context=9, context_lens=[9, 4], transposed=True),
        "wide_head": dict(head_dim=256, context=5),
        "widest_head": dict(head_dim=512, heads=2, kv_heads=1, context=5),
        "sinks": dict(batch=3, context=9, context_lens=[9, 0, 4], block_lens=[5, 2, 0], sinks=True, softcap=2.0),
        "sinks_alone": dict(block=3, sinks=True, causal=True),
        "left_padded": dict(batch=4, context=9, context_lens=[9, 0, 4, 7], context_starts=[2, 0, 4, 8], causal=True),
        "left_padded_window": dict(batch=3, context=9, context_lens=[9, 4, 7], context_starts=[2, 1, 0], window=5),
        "one_context": dict(batch=4, context=8, context_rows=1, context_lens=[8, 2, 0, 4]),
        "one_paged_context": dict(batch=3, context=12, context_rows=1, page=4, context_starts=[5, 0, 4]),
        "narrow_values": dict(head_dim=12, value_dim=8, context=7, context_lens=[7, 3], causal=True),
        "wide_values": dict(head_dim=4, value_dim=20, context=8, page=4, context_lens=[7, 3]),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
        "released_128k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=131072),
        "released_4k_batch_64": dict(batch=64, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
        "released_prefill": dict(batch=1, block=4096, heads=32, kv_heads=2, head_dim=128, causal=True),
    },
    "context_attention": {
        "tiny": dict(context=7, context_lens=[7, 3]),
        "zero_context": dict(context=4, context_lens=[0, 2]),
        "zero_storage": dict(context=0),
        "ragged": dict(batch=3, context=9, context_lens=[9, 0, 2], block_lens=[5, 2, 0]),
        "window_softcap": dict(batch=3, context=12, context_lens=[12, 5, 1], window=4, softcap=3.0),
        "shared_context": dict(
            batch=4, context=8, context_rows=1, context_index=[0, 0, 0, 0], context_lens=[8, 2, 0, 4]
        ),
        "paged": dict(batch=3, context=12, page=4, context_lens=[12, 0, 5]),
        "transposed": dict(context=9, context_lens=[9, 4], transposed=True),
        "causal": dict(batch=3, context=12, context_lens=[12, 5, 3], causal=True),
        "causal_ragged": dict(
            batch=4, context=12, context_lens=[12, 5, 2, 0], block_lens=[3, 0, 5, 2], causal=True, sinks=True
        ),
        "sliding": dict(batch=3, block=7, context=12, context_lens=[12, 7, 5], causal=True, window=3),
        "sliding_itself": dict(context=6, causal=True, window=1),
        "sliding_nothing": dict(context=6, causal=True, window=0),
        "sliding_paged": dict(
            batch=3, context=21, page=7, context_lens=[12, 21, 8], context_starts=[2, 17, 0], causal=True, window=6
        ),
        "left_padded": dict(batch=3, context=9, context_lens=[9, 4, 7], context_starts=[2, 4, 8], sinks=True),
        "left_padded_causal": dict(batch=3, context=9, context_lens=[9, 4, 7], context_starts=[6, 0, 7], causal=True),
        "one_context": dict(batch=3, context=8, context_rows=1, context_lens=[8, 5, 6], causal=True),
        "narrow_values": dict(head_dim=12, value_dim=5, context=7, context_lens=[7, 3]),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096),
    },
    "merge_attention": {
        "tiny": dict(),
        "empty_sides": dict(batch=3, empty_a=[0, 1], empty_b=[1, 2]),
        "no_tokens": dict(block=0),
        "released": dict(batch=1, block=16, heads=32, head_dim=128),
    },
    "append_kv": {
        "tiny": dict(context=12, context_lens=[7, 0]),
        "fills_storage": dict(context=5, context_lens=[0, 0]),
        "ragged": dict(batch=3, context=12, context_lens=[7, 12, 0], block_lens=[5, 0, 1]),
        "no_tokens": dict(block=0, context=4, context_lens=[4, 1]),
        "indexed": dict(context=12, context_rows=4, context_index=[3, 1], context_lens=[7, 2]),
        "paged": dict(batch=3, context=12, page=4, context_lens=[7, 3, 0], block_lens=[5, 5, 2]),
        "transposed": dict(context=12, context_lens=[7, 0], transposed=True),
        "narrow_values": dict(context=12, context_lens=[7, 0], head_dim=12, value_dim=5),
        "released_4k": dict(batch=1, block=16, heads=32, kv_heads=2, head_dim=128, context=4096, context_lens=[4080]),
    },
}  # fmt: skip

# Of functions that are no operators of their own.
COMPOSED: dict[str, dict[str, dict[str, Any]]] = {
    "block_causal_attention": {
        "tiny": dict(block=7, block_size=3),
        "whole_blocks": dict(batch=3, block=8, block_lens=[8, 0, 5], block_size=4),
        "one_block": dict(block=5, block_size=9),
        "one_token": dict(block=5, block_size=1, sinks=True),
        "no_tokens": dict(block=0, block_size=4),
        "softcap": dict(batch=1, block=9, block_size=2, softcap=2.0, scale=0.7, heads=6, kv_heads=1),
        "narrow_values": dict(block=7, block_size=2, head_dim=12, value_dim=5, transposed=True),
        "released_prefill": dict(batch=1, block=4096, heads=32, kv_heads=2, head_dim=128, block_size=32),
    },
}  # fmt: skip


def make_inputs(
    op: str,
    case: str | dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for `op`: standard normal, NaN wherever a length says that nobody looks.

    case: a name in CASES[op] or COMPOSED[op], or a dict of sizes; keys that are no size (causal, window, ...) pass
    through. Unused block-table entries are -1. A merge case's empty_a, empty_b list batch rows that saw no key (out
    NaN, lse -inf).
    """
    given = (CASES | COMPOSED)[op][case] if isinstance(case, str) else case
    sizes = DEFAULTS | given
    options = {name: value for name, value in given.items() if name not in DEFAULTS}
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, tokens: int, heads: int, name: str = "") -> Tensor:
        shape = (rows, heads, tokens) if sizes["transposed"] else (rows, tokens, heads)
        dim = (name.startswith("v") and sizes["value_dim"]) or sizes["head_dim"]
        x = torch.randn(*shape, dim, generator=generator, device=device).to(dtype)
        return x.transpose(1, 2) if sizes["transposed"] else x  # [rows, tokens, heads, head_dim]

    batch, block, heads, kv_heads = (sizes[name] for name in ("batch", "block", "heads", "kv_heads"))
    if op == "merge_attention":
        inputs: dict[str, Any] = {}
        for side in ("a", "b"):
            out = draw(batch, block, heads)
            lse = torch.randn(batch, block, heads, generator=generator, device=device)
            lse = lse.double() if dtype == torch.float64 else lse
            rows = options.get(f"empty_{side}", [])
            out[rows], lse[rows] = torch.nan, -torch.inf
            inputs |= {f"out_{side}": out, f"lse_{side}": lse}
        return inputs

    names = {"context_attention": "q", "append_kv": "kv"}.get(op, "qkv")
    inputs = options | {name: draw(batch, block, heads if name == "q" else kv_heads, name) for name in names}
    blocks = [inputs[name] for name in names]
    counts = sizes["block_lens"] or [block] * batch
    for x in blocks:
        for row, count in enumerate(counts):
            x[row, count:] = torch.nan
    for name in ("context_lens", "context_starts", "block_lens", "context_index"):
        if sizes[name] is not None:
            inputs[name] = torch.tensor(sizes[name], dtype=torch.int64, device=device)
    if op == "block_causal_attention" and "block_lens" in inputs:
        inputs["seq_lens"] = inputs.pop("block_lens")
    if sizes["context"] is None:
        return inputs | _sinks(sizes, dtype, generator)

    tokens = sizes["context"]
    rows = batch if sizes["context_rows"] is None else sizes["context_rows"]
    readers = [0] * batch if rows == 1 else range(batch)
    readers = readers if sizes["context_index"] is None else sizes["context_index"]
    lens = sizes["context_lens"] or [tokens] * batch
    starts = sizes["context_starts"] or [0] * batch
    written, reserved, unread = [0] * rows, [0] * rows, [tokens] * rows
    for row, start, length, count in zip(readers, starts, lens, counts, strict=True):
        written[row] = max(written[row], length)
        unread[row] = min(unread[row], start)
        reserved[row] = max(reserved[row], length + (count if op == "append_kv" else 0))
    page = sizes["page"]
    if page is not None:
        table = torch.randperm(rows * (tokens // page) + 1, generator=generator, device=device)  # one page stays unused
        pool_pages, table = len(table), table[1:].view(rows, tokens // page).to(torch.int32)
    for name in ("k_context", "v_context"):
        dense = draw(rows, tokens, kv_heads, name)
        for row, length in enumerate(written):
            dense[row, length:] = dense[row, : unread[row]] = torch.nan
        inputs[name] = dense
        if page is not None:
            pool = torch.full_like(draw(pool_pages, page, kv_heads, name), torch.nan)
            pool[table.flatten().long()] = dense.reshape(-1, page, *dense.shape[2:])  # [rows * pages, page, Hkv, D]
            inputs[name] = pool
    if page is not None:
        for row, length in enumerate(reserved):
            table[row, -(-length // page) :] = -1
        inputs["block_table"] = table
    return inputs | _sinks(sizes, dtype, generator)


def _sinks(sizes: dict[str, Any], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Drawn last, so that all else is the same without."""
    if not sizes["sinks"]:
        return {}
    return {"sinks": torch.randn(sizes["heads"], generator=generator, device=generator.device).to(dtype)}
