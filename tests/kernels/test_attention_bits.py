"""A query's bits on a CPU depend on its own keys: not on where its block begins, on other rows, or on the threads."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, instruction_set
from twotower_kernels.testing.drawing import DTYPES

BEYOND = 7000  # keys; parts of keys grow from 6144 on


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_threads(threads: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out: tuple[Tensor, Tensor] = tt.block_attention(**arguments, return_lse=True)
        return out
    finally:
        torch.set_num_threads(before)


THREADS = st.integers(1, 3)


@settings(max_examples=60)
@given(
    context=st.one_of(st.integers(0, 12), st.integers(80, 110), st.integers(370, 400)),
    tokens=st.integers(1, 64),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dim=st.sampled_from([1, 8, 20, 64, 160]),
    threads=st.tuples(THREADS, THREADS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    softcap=st.sampled_from([0.0, 2.0]),
    paged=st.booleans(),
    seed=st.integers(0, 99),
)
@example(context=95, tokens=64, heads=(4, 2), dim=64, threads=(2, 2), dtype=torch.bfloat16, isa="avx512bf16",
         softcap=0.0, paged=False, seed=0)  # fmt: skip
@example(context=95, tokens=64, heads=(6, 1), dim=160, threads=(2, 1), dtype=torch.bfloat16, isa="amx",
         softcap=0.0, paged=True, seed=0)  # fmt: skip
@example(context=BEYOND, tokens=3, heads=(2, 1), dim=8, threads=(3, 1), dtype=torch.float32, isa="avx2",
         softcap=0.0, paged=False, seed=0)  # fmt: skip
def test_tokens_at_once_see_what_they_see_one_by_one(
    context: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    softcap: float,
    paged: bool,
    seed: int,
) -> None:
    """Under a causal mask. The context's storage holds anything beyond its length."""
    queries, keys = heads
    total, rows = context + tokens, 2
    q = drawn(seed, rows, tokens, queries, dim, dtype=dtype)
    k, v = (drawn(seed + i, rows, total, keys, dim, dtype=dtype) for i in (1, 2))
    options: dict[str, Any] = dict(causal=True, softcap=softcap)
    if paged:
        page = 16
        pages = -(-total // page)
        table = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(seed)).view(rows, pages)
        stored = [x.new_zeros(rows * pages, page, keys, dim) for x in (k, v)]
        for into, x in zip(stored, (k, v), strict=True):
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * page - total))
            into[table.flatten()] = padded.reshape(rows * pages, page, keys, dim)
        options["block_table"] = table
    else:
        stored = [k, v]

    def run(count: int, first: int, seen: int) -> tuple[Tensor, Tensor]:
        block = slice(seen, seen + count)
        lens = torch.full((rows,), seen)
        return with_threads(
            threads[first > 0], q=q[:, first : first + count], k=k[:, block], v=v[:, block],
            k_context=stored[0], v_context=stored[1], context_lens=lens, **options,
        )  # fmt: skip

    with instruction_set(isa):
        out, lse = run(tokens, 0, context)
        for t in range(tokens):
            one, one_lse = run(1, t, context + t)
            assert torch.equal(one[:, 0], out[:, t]) and torch.equal(one_lse[:, 0], lse[:, t]), t


@settings(max_examples=30)
@given(
    lens=st.lists(st.one_of(st.integers(0, 500), st.integers(6100, BEYOND)), min_size=1, max_size=4),
    tokens=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (16, 1)]),
    window=st.sampled_from([None, 5, 400]),
    causal=st.booleans(),
    threads=st.tuples(THREADS, THREADS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 99),
)
def test_a_row_is_the_same_alone_and_on_any_number_of_threads(
    lens: list[int],
    tokens: int,
    heads: tuple[int, int],
    window: int | None,
    causal: bool,
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    queries, keys = heads
    rows, dim = len(lens), 8
    q = drawn(seed, rows, tokens, queries, dim, dtype=dtype)
    k, v = (drawn(seed + i, rows, tokens, keys, dim, dtype=dtype) for i in (1, 2))
    stored = [drawn(seed + i, rows, max(lens), keys, dim, dtype=dtype) for i in (3, 4)]
    lengths = torch.tensor(lens)
    options: dict[str, Any] = dict(window=window, causal=causal)
    with instruction_set(isa):
        together = with_threads(
            threads[0], q=q, k=k, v=v, k_context=stored[0], v_context=stored[1], context_lens=lengths, **options
        )
        for b in range(rows):
            row = slice(b, b + 1)
            alone = with_threads(
                threads[1], q=q[row], k=k[row], v=v[row], k_context=stored[0][row], v_context=stored[1][row],
                context_lens=lengths[row], **options,
            )  # fmt: skip
            for ours, theirs in zip(together, alone, strict=True):
                assert torch.equal(ours[row], theirs)


@settings(max_examples=40)
@given(
    context=st.one_of(st.integers(0, 12), st.integers(80, 110), st.integers(370, 400)),
    tokens=st.integers(1, 64),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dims=st.sampled_from([(8, 8), (20, 6), (64, 80)]),
    padding=st.sampled_from([(0, 0), (3, 0), (90, 97)]),
    window=st.sampled_from([None, 1, 7, 100]),
    has_sinks=st.booleans(),
    threads=st.tuples(THREADS, THREADS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 99),
)
@example(context=BEYOND, tokens=3, heads=(2, 1), dims=(8, 8), padding=(6144, 1), window=6200, has_sinks=True,
         threads=(3, 1), dtype=torch.bfloat16, isa="avx512bf16", seed=0)  # fmt: skip
def test_a_context_that_holds_the_block_is_seen_as_it_is_beside_it_and_unpadded(
    context: int,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    padding: tuple[int, int],
    window: int | None,
    has_sinks: bool,
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    """Under a causal mask: all at once, one by one through a sliding window, and without the padding on the left."""
    queries, keys = heads
    total, rows = context + tokens, len(padding)
    q = drawn(seed, rows, tokens, queries, dims[0], dtype=dtype)
    k, v = (drawn(seed + i, rows, total + max(padding), keys, dims[i - 1], dtype=dtype) for i in (1, 2))
    for b, count in enumerate(padding):
        k[b, :count] = v[b, :count] = torch.nan
    starts = torch.tensor(padding)
    stored: dict[str, Any] = dict(k_context=k, v_context=v, context_starts=starts, causal=True)
    stored |= {"sinks": drawn(seed, queries, dtype=torch.float32)} if has_sinks else {}

    def run(count: int, **arguments: Any) -> tuple[Tensor, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            out: tuple[Tensor, Tensor] = tt.context_attention(**stored | arguments, return_lse=True)
            return out
        finally:
            torch.set_num_threads(before)

    with instruction_set(isa):
        whole = run(threads[0], q=q, context_lens=starts + total, window=window)
        for t in range(0, tokens, 5):
            seen = starts + context + t + 1
            one = run(threads[1], q=q[:, t : t + 1], context_lens=seen, window=window)
            for x, y in zip(one, whole, strict=True):
                assert torch.equal(x[:, 0], y[:, t]), t
        for b, count in enumerate(padding):
            row, real = slice(b, b + 1), slice(count, count + total)
            alone = dict(k_context=k[row, real], v_context=v[row, real], context_starts=None)
            for x, y in zip(run(threads[1], q=q[row], window=window, **alone), whole, strict=True):
                assert torch.equal(x, y[row])
        if window is None:
            places = (torch.arange(tokens) + starts[:, None] + context)[:, :, None, None]
            own = [x.gather(1, places.expand(-1, -1, *x.shape[2:])) for x in (k, v)]
            beside = with_threads(threads[1], q=q, k=own[0], v=own[1], context_lens=starts + context, **stored)
            for x, y in zip(beside, whole, strict=True):
                assert torch.equal(x, y)


@settings(max_examples=30)
@given(
    lens=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 4, 32, 100, 1000]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    threads=st.tuples(THREADS, THREADS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 99),
)
def test_a_block_is_the_same_whatever_follows_it(
    lens: list[int],
    block_size: int,
    heads: tuple[int, int],
    threads: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    """In a sequence of blocks: alone, on any number of threads, and with the later blocks cut off."""
    queries, keys = heads
    q = drawn(seed, len(lens), 400, queries, 8, dtype=dtype)
    k, v = (drawn(seed + i, len(lens), 400, keys, 8, dtype=dtype) for i in (1, 2))
    before = torch.get_num_threads()
    with instruction_set(isa):
        try:
            torch.set_num_threads(threads[0])
            together = tt.block_causal_attention(q, k, v, block_size, seq_lens=torch.tensor(lens), return_lse=True)
            torch.set_num_threads(threads[1])
            for b, count in enumerate(lens):
                cut = min(count // 2 // block_size * block_size, 400)
                row = [x[b : b + 1, :cut] for x in (q, k, v)]
                for x, y in zip(tt.block_causal_attention(*row, block_size, return_lse=True), together, strict=True):
                    assert torch.equal(x[0], y[b, :cut])
        finally:
            torch.set_num_threads(before)
