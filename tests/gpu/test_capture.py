"""Recorded calls: which tensors a replay reads. The recording itself is a stand-in that calls again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.model.random_models import models, random_ids
from twotower_kernels import TwoTowerModel
from twotower_kernels.model.capture import CapturedModel, CudaGraphs
from twotower_kernels.model.state import ContextState

T = TypeVar("T")


class Recorder:
    """As a graph does, it runs the call once and from then on writes to the same tensors from the same ones."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
        self.recordings += 1
        output = call()

        @torch.inference_mode()  # a graph writes whatever kind of tensor it is
        def replay() -> None:
            for mine, new in zip(tree_leaves(output), tree_leaves(call()), strict=True):
                if mine is not None:
                    mine.copy_(new)

        return replay, output


def small() -> TwoTowerModel:
    return models("M*E-", torch.float32).ours


def test_a_replay_says_what_the_model_says() -> None:
    """Over steps, blocks, dropped rows and storage that grows; recorded anew only for other shapes or storage."""
    model, record = small(), Recorder()
    captured = CapturedModel(model, record)

    def agrees(state: ContextState, ids: Tensor, t: Tensor | None = None) -> None:
        assert torch.equal(captured.denoise(ids, state, t), model.denoise(ids, state, t))

    with torch.inference_mode():
        state = model.prefill(random_ids(3, 20), [20, 3, 11])
        for block in range(3):
            for step in range(2):
                agrees(state, random_ids(3, 4, seed=10 * block + step), torch.rand(3))
                assert record.recordings == (block > 0 or step > 0)  # not for the first time
            state = model.commit(random_ids(3, 4, seed=block), state)
        for rows in ([2, 0], [0, 1], [1, 2]):
            agrees(state.select(rows), random_ids(2, 4), torch.rand(2))
        assert record.recordings == 2
        for rows in ([2, 0], [0, 1]):
            agrees(state.select(rows), random_ids(2, 4))
        assert record.recordings == 3
        state = model.commit(random_ids(3, 200), state)  # moves to larger storage
        for _ in range(2):
            agrees(state, random_ids(3, 4), torch.rand(3))
        assert record.recordings == 4
        assert len(captured._calls) == 1


def test_recorded_commits_leave_the_same_context() -> None:
    """Over blocks of two sizes, storage that grows, forks of what a replay gave, and rows that are dropped."""
    model, record = small(), Recorder()
    captured = CapturedModel(model, record)
    with torch.inference_mode():
        mine, theirs = (model.prefill(random_ids(3, 20), [20, 3, 11]) for _ in range(2))
        kept: list[tuple[ContextState, ContextState]] = []
        for block in range(40):
            ids = random_ids(mine.batch_size, 1 if block % 3 else 4, seed=block)
            kept.append((mine.fork(1), theirs.fork(1)) if block % 7 == 0 else kept[-1])
            mine, theirs = captured.commit(ids, mine), model.commit(ids, theirs)
            if block == 30:
                mine, theirs = mine.select([2, 0]), theirs.select([2, 0])
        for one, other in [*kept, (mine, theirs)]:
            assert torch.equal(one.logits, other.logits)
            ids = random_ids(one.batch_size, 4)
            assert torch.equal(model.denoise(ids, one, 0.5), model.denoise(ids, other, 0.5))
            assert torch.equal(one.lengths, other.lengths)
    assert 2 <= record.recordings <= 8


def test_a_commit_that_fails_leaves_the_state() -> None:
    model = small()
    captured = CapturedModel(model, Recorder())
    state = model.prefill(random_ids(2, 5))
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 2 rows"):
            captured.commit(random_ids(3, 4), state)
        with patch.object(captured, "_call", side_effect=MemoryError), pytest.raises(MemoryError):
            captured.commit(random_ids(2, 4), state)
        assert state.batch_size == 2
        state = captured.commit(random_ids(2, 4), state)


def test_keys_and_values_are_not_copied() -> None:
    model = small()
    captured = CapturedModel(model, Recorder())
    with torch.inference_mode():
        state = model.prefill(random_ids(2, 9))
        for _ in range(2):
            captured.denoise(random_ids(2, 4), state, torch.rand(2))
        (recording,) = captured._calls.values()
        assert recording is not None
        assert all(recording._state.k[i] is k for i, k in state.k.items())
        assert all(recording._state.v[i] is v for i, v in state.v.items())


def test_recordings_share_memory_and_disturb_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch is asked for it: one pool a device, and errors in this thread alone."""
    asked: list[tuple[object, object]] = []

    @contextmanager
    def graph(graph: object, pool: object, capture_error_mode: str) -> Iterator[None]:
        asked.append((pool, capture_error_mode))
        yield

    stand_in = SimpleNamespace(replay=lambda: None)
    handles = iter([(0, 1), (0, 2)])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    record = CudaGraphs()
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        replay, output = record(lambda: 5, torch.device(device))
        assert output == 5 and replay is stand_in.replay
    assert asked == [((0, n), "thread_local") for n in (1, 2, 1)]
