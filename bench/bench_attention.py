"""Block attention: 32 query heads over 2 key heads of dimension 128, blocks of 16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import twotower_kernels as tt
from bench import rivals
from bench.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals, close
from reference import attention

HEADS, KV_HEADS, DIM = 32, 2, 128


def over_context(batch: int, context: int, dtype: torch.dtype, device: str, goals: Goals = NO_GOALS) -> Case:
    sizes = dict(batch=batch, block=16, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, context=context)
    inputs = attention.make_inputs("block_attention", sizes, dtype=dtype, device=device)
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


def prefill(length: int, dtype: torch.dtype, device: str) -> Case:
    sizes = dict(batch=1, block=length, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, causal=True)
    inputs: dict[str, Any] = attention.make_inputs("block_attention", sizes, dtype=dtype, device=device)
    q, k, v = (inputs[name] for name in "qkv")
    programs = {
        OURS: lambda: tt.block_attention(**inputs),
        "PyTorch: SDPA, causal": lambda: rivals.grouped_attention(q, k, v, causal=True),
    }
    flops = 2 * length * (length + 1) * HEADS * DIM
    return Case("block_attention", f"B 1, S {length}, causal", dtype, programs, close(1e-2), flops=flops)


def cases(device: str = "cpu") -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if device != "cpu":
        for batch in (1, 4, 16, 64):
            for context in (4096, 32768, 131072):
                if batch * context <= 2**21:  # keys and values of 2 GB, and 16 times as much for the original style
                    yield over_context(batch, context, bf16, device)
        yield prefill(4096, bf16, device)
        return
    yield over_context(1, 8192, bf16, device, (15, 4, 0.75))
    yield over_context(1, 32768, bf16, device, (15, 4, 0.75))
    yield over_context(1, 8192, fp32, device, (5, 1, 0.8))
    yield over_context(16, 1024, bf16, device)
    yield over_context(1, 256, bf16, device)
    yield prefill(2048, bf16, device)
    yield prefill(2048, fp32, device)
