"""Block attention: a block over its context and itself, and causal prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import twotower_kernels as tt
from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.reference import attention


def heads_of(shapes: Shapes) -> dict[str, int]:
    return dict(heads=shapes.num_attention_heads, kv_heads=shapes.num_key_value_heads, head_dim=shapes.head_dim)


def over_context(
    batch: int,
    context: int,
    dtype: torch.dtype,
    device: str,
    goals: Goals = NO_GOALS,
    shapes: Shapes = RELEASED,
) -> Case:
    sizes = dict(batch=batch, block=shapes.block_size, context=context, **heads_of(shapes))
    inputs = attention.make_inputs("block_attention", sizes, dtype=dtype, device=device)
    q = inputs["q"]
    # PyTorch's best case: the block already stands behind its context in preallocated storage.
    k, v = (torch.cat([inputs[f"{name}_context"], inputs[name]], 1) for name in "kv")
    programs = {
        OURS: partial(tt.block_attention, **inputs),
        ORIGINAL: partial(pytorch.eager_attention, **inputs),
        "PyTorch: SDPA, grouped": partial(pytorch.grouped_attention, q, k, v),
        "PyTorch: SDPA, packed": partial(pytorch.packed_attention, q, k, v),
    }
    if device != "cpu":
        programs["PyTorch: SDPA, expanded"] = partial(pytorch.expanded_attention, q, k, v)
    return Case(
        "block_attention",
        f"B {batch}, S {shapes.block_size}, context {context}",
        dtype,
        programs,
        close(1e-2),
        costs.block_attention(**sizes, itemsize=dtype.itemsize),
        goals=goals,
        sizes=sizes,
        inputs=inputs,
    )


def prefill(length: int, dtype: torch.dtype, device: str, shapes: Shapes = RELEASED) -> Case:
    sizes = dict(batch=1, block=length, **heads_of(shapes))
    inputs = attention.make_inputs("block_attention", {**sizes, "causal": True}, dtype=dtype, device=device)
    q, k, v = (inputs[name] for name in "qkv")
    programs = {
        OURS: partial(tt.block_attention, **inputs),
        "PyTorch: SDPA, causal": partial(pytorch.grouped_attention, q, k, v, causal=True),
    }
    return Case(
        "block_attention",
        f"B 1, S {length}, causal",
        dtype,
        programs,
        close(1e-2),
        costs.causal_attention(**sizes, context=0, itemsize=dtype.itemsize),
        sizes=sizes,
        inputs=inputs,
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if batches or contexts:
        for batch in batches or (1,):
            for context in contexts or (8192,):
                for dtype in (bf16, fp32):
                    yield over_context(batch, context, dtype, device, shapes=shapes)
        return
    if device != "cpu":
        for batch in (1, 4, 16, 64):
            for context in (4096, 32768, 131072):
                goals: Goals = (None, None, 0.55) if (batch, context) == (1, 131072) else NO_GOALS
                yield over_context(batch, context, bf16, device, goals, shapes)
        yield prefill(4096, bf16, device, shapes)
        return
    yield over_context(1, 8192, bf16, device, (15, 4, 0.75), shapes)
    yield over_context(1, 32768, bf16, device, (15, 4, 0.75), shapes)
    yield over_context(1, 8192, fp32, device, (5, 1, 0.8), shapes)
    yield over_context(16, 1024, bf16, device, shapes=shapes)
    yield over_context(1, 256, bf16, device, shapes=shapes)
    yield prefill(2048, bf16, device, shapes)
    yield prefill(2048, fp32, device, shapes)
