"""On a CPU a row's numbers have the same bits alone and in any batch, committed at once and token by token.

What they may depend on is the instruction set, the dtype and the row itself: not its neighbours, their lengths, the
place in the batch, or the number of threads. So a text does not depend on what shares its batch, and speculative
decoding, which commits several tokens at once, writes the autoregressive text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, instruction_set
from twotower_kernels import ContextState, TwoTowerModel
from twotower_kernels.bench.checks.random_models import models, random_ids

PATTERN = "M*E-M*"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@cache
def model(dtype: torch.dtype) -> TwoTowerModel:
    return models(PATTERN, dtype).ours


@contextmanager
def on(isa: str, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set(isa):
            yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    wrong = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, by {(ours - theirs).abs().max():g}"


def assert_same_state(ours: ContextState, rows: list[int], theirs: ContextState) -> None:
    """`theirs` is these rows of `ours`, to the bit."""
    for row, b in enumerate(rows):
        mine, other = ours.select([b]), theirs.select([row])
        length = int(mine.lengths)
        assert length == int(other.lengths)
        at, there = (int(s.index) if s.index is not None else 0 for s in (mine, other))
        for i in mine.k:
            assert_same_bits(mine.k[i][at, :length], other.k[i][there, :length], f"row {b}: keys of layer {i}")
            assert_same_bits(mine.v[i][at, :length], other.v[i][there, :length], f"row {b}: values of layer {i}")
        for i in mine.ssm:
            assert_same_bits(mine.conv[i][at], other.conv[i][there], f"row {b}: convolution of layer {i}")
            assert_same_bits(mine.ssm[i][at], other.ssm[i][there], f"row {b}: state of layer {i}")
        if length:
            assert_same_bits(mine.logits, other.logits, f"row {b}: logits")


SETS = st.sampled_from(EVERY_ISA)
THREADS = st.integers(1, 3)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    isa=SETS,
    threads=st.tuples(THREADS, THREADS),
    context=st.integers(0, 240),
    lengths=st.lists(st.integers(0, 64), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@example(dtype=torch.bfloat16, isa="avx512bf16", threads=(2, 2), context=95, lengths=[2], seed=0)
@example(dtype=torch.float32, isa="avx2", threads=(1, 2), context=383, lengths=[64], seed=0)
@example(dtype=torch.float32, isa="avx512", threads=(2, 1), context=0, lengths=[64, 1], seed=0)
def test_a_commit_at_once_is_commits_one_by_one(
    dtype: torch.dtype, isa: str, threads: tuple[int, int], context: int, lengths: list[int], seed: int
) -> None:
    rows, size = len(lengths), max(lengths)
    ids, tower = random_ids(rows, context + size, seed=seed), model(dtype)
    with on(isa, threads[0]):
        prompt = tower.prefill(ids[:, :context])
        at_once = tower.commit(ids[:, context:], prompt.fork(1), lengths)
    with on(isa, threads[1]):
        one_by_one = prompt
        for t in range(size):
            one = [int(t < length) for length in lengths]
            one_by_one = tower.commit(ids[:, context + t : context + t + 1], one_by_one, one)
    assert_same_state(at_once, list(range(rows)), one_by_one)


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(DTYPES),
    isa=SETS,
    threads=st.tuples(THREADS, THREADS),
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(60, 300)), min_size=2, max_size=5),
    block=st.sampled_from([1, 4, 16, 33]),
    seed=st.integers(0, 99),
)
@example(dtype=torch.bfloat16, isa="avx512bf16", threads=(2, 2), lengths=[40, 300], block=16, seed=0)
@example(dtype=torch.float32, isa="avx2", threads=(2, 3), lengths=[64, 65, 17], block=16, seed=0)
def test_a_row_alone_is_the_row_in_any_batch(
    dtype: torch.dtype, isa: str, threads: tuple[int, int], lengths: list[int], block: int, seed: int
) -> None:
    tower, rows = model(dtype), len(lengths)
    ids, masked = random_ids(rows, max(lengths), seed=seed), random_ids(rows, block, seed=seed + 1)
    t = torch.linspace(0, 1, rows)
    with on(isa, threads[0]):
        together = tower.prefill(ids, lengths)
        logits = tower.denoise(masked, together, t)
    with on(isa, threads[1]):
        for b, length in enumerate(lengths):
            alone = tower.prefill(ids[b : b + 1, :length])
            assert_same_state(together, [b], alone)
            assert_same_bits(logits[b : b + 1], tower.denoise(masked[b : b + 1], alone, t[b : b + 1]), "denoiser")


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_the_shipped_model_writes_the_same_text_in_any_batch(mode: str) -> None:
    """In bfloat16, whose roundings show soonest; sampled, where a bit can change a word."""
    shipped = TwoTowerModel.from_pretrained(tt.demo_path(), dtype=torch.bfloat16)
    vocabulary = shipped.config.vocab_size
    prompts = [
        torch.randint(4, vocabulary, (length,), generator=torch.Generator().manual_seed(length))
        for length in (7, 70, 33, 130)
    ]
    seeds = [tt.sequence_seed(5, b) for b in range(len(prompts))]
    options = dict(mode=mode, max_new_tokens=24, temperature=0.8, block_size=8, logprobs=True)
    together = shipped.generate(prompts, seed=seeds, **options)
    for b, prompt in enumerate(prompts):
        alone = shipped.generate([prompt], seed=[seeds[b]], **options)
        assert alone.new_tokens[0].tolist() == together.new_tokens[b].tolist(), f"row {b}"
        assert alone.nfe[0] == together.nfe[b]
        assert_same_bits(alone.logprobs[0], together.logprobs[b], f"row {b}: log probabilities")
