"""Block attention: 32 query heads over 2 key heads of dimension 128, blocks of 16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import twotower_kernels as tt
from bench import rivals
from bench.timing import ORIGINAL, OURS, Case, close
from reference import attention

HEADS, KV_HEADS, DIM = 32, 2, 128


def over_context(
    batch: int, context: int, dtype: torch.dtype, goals: tuple[float | None, float | None, float | None]
) -> Case:
    sizes = dict(batch=batch, block=16, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, context=context)
    inputs = attention.make_inputs("block_attention", sizes, dtype=dtype)
    q = inputs["q"]
    # PyTorch's best case: the block already stands behind its context in preallocated storage.
    k, v = (torch.cat([inputs[f"{name}_context"], inputs[name]], 1) for name in "kv")
    programs = {
        OURS: lambda: tt.block_attention(**inputs),
        ORIGINAL: lambda: rivals.eager_attention(**inputs),
        "PyTorch: SDPA, grouped": lambda: rivals.grouped_attention(q, k, v),
        "PyTorch: SDPA, packed": lambda: rivals.packed_attention(q, k, v),
    }
    return Case(
        "block_attention",
        f"B {batch}, S 16, context {context}",
        dtype,
        programs,
        close(1e-2),
        bytes=2 * k.numel() * k.element_size(),
        flops=4 * batch * 16 * HEADS * DIM * (context + 16),
        goals=goals,
    )


def prefill(length: int, dtype: torch.dtype) -> Case:
    sizes = dict(batch=1, block=length, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, causal=True)
    inputs: dict[str, Any] = attention.make_inputs("block_attention", sizes, dtype=dtype)
    q, k, v = (inputs[name] for name in "qkv")
    programs = {
        OURS: lambda: tt.block_attention(**inputs),
        ORIGINAL: lambda: rivals.eager_attention(**inputs),
        "PyTorch: SDPA, causal": lambda: rivals.grouped_attention(q, k, v, causal=True),
    }
    flops = 2 * length * (length + 1) * HEADS * DIM
    return Case("block_attention", f"B 1, S {length}, causal", dtype, programs, close(1e-2), flops=flops)


def cases() -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    yield over_context(1, 8192, bf16, (15, 4, 0.75))
    yield over_context(1, 32768, bf16, (15, 4, 0.75))
    yield over_context(1, 8192, fp32, (5, 1, 0.8))
    yield over_context(16, 1024, bf16, (None, None, None))
    yield over_context(1, 256, bf16, (None, None, None))
    yield prefill(2048, bf16)
    yield prefill(2048, fp32)
