"""Calls that are noted and run again, and the kernels of what lies between the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import MACHINE_ISAS, awkward
from tests.kernels.op_arguments import OPS, arguments, overload, written
from twotower_kernels import cpu
from twotower_kernels.ops.linear import linear
from twotower_kernels.ops.recording import CpuRecordings
from twotower_kernels.testing.budget import as_tuple

COPIED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
WIDENED = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))


# --- copies and rows of a table -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5) | st.just([3, 40_000]),
    kinds=st.sampled_from([*((dtype, dtype) for dtype in COPIED), *WIDENED]),
    isa=st.sampled_from(MACHINE_ISAS),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_copies(shape, kinds, isa, layout, seed):  # type: ignore[no-untyped-def]
    """Of any shape and layout, and wider: what PyTorch's copy has, infinities and subnormal numbers included."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 12 - 6)
    numbers[numbers > 4] = torch.inf
    source = numbers.to(kinds[0])
    source = awkward(source, layout) if source.ndim else source
    to = torch.zeros(shape, dtype=kinds[1])
    to = to.transpose(0, -1) if seed % 2 and to.ndim and to.shape[0] == to.shape[-1] else to
    with cpu.use(isa):
        cpu.call("copy_numbers", source, to)
    assert torch.equal(to, source.to(kinds[1]))


@settings(max_examples=30)
@given(
    vocabulary=st.integers(1, 9),
    width=st.integers(1, 70),
    count=st.integers(0, 9) | st.just(3000),
    dtype=st.sampled_from(COPIED[:4]),
    isa=st.sampled_from(MACHINE_ISAS),
    seed=st.integers(0, 2**31),
)
def test_rows_of_a_table(vocabulary, width, count, dtype, isa, seed):  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, width + 3, generator=random).to(dtype)[:, :width]
    ids, out = torch.randint(vocabulary, (count,), generator=random), torch.empty(count, width, dtype=dtype)
    with cpu.use(isa):
        cpu.call("gather_rows", table, ids, out)
        assert torch.equal(out, table[ids])
        if count:
            wrong = [-1, vocabulary, 2**62][seed % 3]
            ids[seed % count] = wrong
            with pytest.raises(ValueError, match=f"expected rows of a table of {vocabulary}, got {wrong}"):
                cpu.call("gather_rows", table, ids, out)


# --- what is recorded, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [0, 3])
@pytest.mark.parametrize("name", OPS)
def test_every_operator_is_noted(name: str, layout: int) -> None:
    """Recorded with some numbers, replayed with others: what it gives is what it gives of those, to the bit."""

    def laid_out(seed: int) -> list[Any]:
        given = arguments(name, seed=seed)
        return [awkward(x, layout) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]

    given, other, expected = laid_out(0), laid_out(1), laid_out(1)
    for n in written(name):  # they are written where they lie
        given[n], other[n], expected[n] = (x.contiguous() for x in (given[n], other[n], expected[n]))
    op = overload(name)
    wanted = op(*expected)
    if name == "attention_backward":  # PyTorch computes it
        with pytest.raises(NotImplementedError, match=r"recording: aten\.bmm"):
            CpuRecordings()(lambda: op(*given))
        return
    with torch.inference_mode():
        replay, results = CpuRecordings()(lambda: op(*given))
        for x, new in zip(given, other, strict=True):
            if isinstance(x, Tensor):
                x.copy_(new)
    replay()
    for got, want in zip(as_tuple(results), as_tuple(wanted), strict=True):
        if isinstance(want, Tensor):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
    for n in written(name):
        assert torch.equal(given[n].nan_to_num(), expected[n].nan_to_num())


def test_nothing_is_computed_while_recording() -> None:
    x, weight, storage = torch.randn(3, 8), torch.randn(8, 8), torch.zeros(1, 4, 2, 4)
    k, lengths = torch.randn(1, 1, 2, 4), torch.tensor([2])

    def step() -> Tensor:
        tt.append_kv(storage, storage.clone(), k, k, lengths)
        return linear(linear(x, weight), weight)

    replay, out = CpuRecordings()(step)
    assert not storage.any() and not cpu.is_recording()
    replay()
    assert torch.equal(out, linear(linear(x, weight), weight)) and torch.equal(storage[0, 2], k[0, 0])
    x.copy_(torch.randn(3, 8))
    replay()
    assert torch.equal(out, linear(linear(x, weight), weight))


def test_memory_between_kernels_is_used_again() -> None:
    x, weight = torch.randn(4, 64), torch.randn(64, 64)

    def step(layers: int) -> Tensor:
        y = x
        for _ in range(layers):
            y = linear(y, weight)
        return y

    for layers in (3, 30):
        record = CpuRecordings()
        replay, out = record(lambda layers=layers: step(layers))
        replay()
        assert torch.equal(out, step(layers))
        assert len(record._pool._pieces) == 2


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (lambda x: linear(x, x) if x.sum() > 0 else x, "aten.sum"),
        (lambda x: linear(x, x).sort().values, "aten.sort"),
        (lambda x: linear(x, x) * x.max().item(), "aten.max"),
        (lambda x: linear(x, x.tolist() and x), "tolist"),
        (lambda x: linear(torch.from_numpy(x.numpy()), x), "numpy"),
        (lambda x: x.mul_(2), "aten.mul_"),
        (lambda x: linear(x, torch.rand(8, 8)), "aten.rand"),
        (lambda x: linear(x.to("meta"), x.to("meta")), "meta"),
    ],
)
def test_what_is_not_known_is_refused(step: Callable[[Tensor], Tensor], name: str) -> None:
    """By its name, and the thread goes on as if nothing had been recorded."""
    x = torch.randn(8, 8)
    with pytest.raises(NotImplementedError, match=f"recording: .*{name}"):
        CpuRecordings()(lambda: step(x))
    assert not cpu.is_recording()
    assert torch.allclose(linear(x, x), x @ x.T, atol=1e-5)


def test_a_plan_of_other_experts_is_an_error_of_the_replay() -> None:
    x, weights = torch.randn(2, 8), torch.rand(2, 1)
    experts = torch.tensor([[0], [1]], dtype=torch.int32)
    plan, up, down = tt.moe_plan(experts, 2), torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    replay, _ = CpuRecordings()(lambda: tt.moe_experts(x, up, down, weights, experts, plan=plan))
    replay()
    experts[0] = 1
    with pytest.raises(ValueError, match="plan: expected moe_plan"):
        replay()


def test_a_thread_records_its_own_calls_alone() -> None:
    x, found = torch.randn(8, 8), list[Any]()

    def step() -> Tensor:
        other = threading.Thread(target=lambda: found.append(linear(x, x)))
        other.start()
        other.join()
        with pytest.raises(RuntimeError, match="records already"):
            CpuRecordings()(lambda: x)
        return linear(x, x)

    replay, out = CpuRecordings()(step)
    assert torch.equal(found[0], linear(x, x)) and len(replay.calls) == 1
    replay()
    assert torch.equal(out, found[0])


def test_others_go_on_during_a_replay() -> None:
    x, weight = torch.randn(64, 512), torch.randn(512, 512) / 20

    def step() -> Tensor:
        y = x
        for _ in range(400):
            y = linear(y, weight)
        return y

    replay, _ = CpuRecordings()(step)
    (run,) = replay._parts
    worker, turns = threading.Thread(target=run), 0
    worker.start()
    while worker.is_alive():
        turns += 1
    assert turns > 1000
