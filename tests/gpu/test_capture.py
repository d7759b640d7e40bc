"""Recorded calls: which tensors a replay reads. The recording itself is a stand-in that calls again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.random_models import models, random_ids
from twotower_kernels import TwoTowerModel
from twotower_kernels.model import capture, generate, two_tower
from twotower_kernels.model.capture import CapturedModel, CudaGraphs
from twotower_kernels.model.state import ContextState

T = TypeVar("T")


class Untouched(TorchDispatchMode):
    """While it is entered, operations run; when it is left, every tensor has the numbers again that it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = zip(func._schema.arguments, args, strict=False)
        given = [*named, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.inference_mode():
            for tensor, numbers in self.before.values():
                tensor.copy_(numbers)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder:
    """As a graph does, it computes nothing when it records, and each replay writes to the same tensors from the same
    ones. What one replay gives, the next one of any recording destroys: they share memory."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replaying = False
        self.outputs: list[Tensor] = []

    def __call__(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
        self.recordings += 1
        with Untouched():
            output = call()
        self.outputs += _tensors(output)
        return self.replay(call, output, self.outputs), output

    def of_its_own(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
        """The recording of a call that changes nothing but its results, in memory of its own."""
        self.recordings += 1
        output = call()
        return self.replay(call, output, []), output

    def replay(self, call: Callable[[], T], output: T, destroyed: list[Tensor]) -> Callable[[], None]:
        @torch.inference_mode()  # a graph writes whatever kind of tensor it is
        def replay() -> None:
            self.replaying = True
            try:
                for tensor in destroyed:
                    tensor.fill_(-7)
                for mine, new in zip(_tensors(output), _tensors(call()), strict=True):
                    mine.copy_(new)
            finally:
                self.replaying = False

        return replay


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
        held: list[tuple[ContextState, ContextState]] = []
        for block in range(40):
            ids = random_ids(mine.batch_size, 1 if block % 3 else 4, seed=block)
            held.append((mine.fork(1), theirs.fork(1)) if block % 7 == 0 else held[-1])
            mine, theirs = captured.commit(ids, mine), model.commit(ids, theirs)
            if block == 30:
                mine, theirs = mine.select([2, 0]), theirs.select([2, 0])
        for one, other in [*held, (mine, theirs)]:
            assert torch.equal(one.logits, other.logits)
            ids = random_ids(one.batch_size, 4)
            assert torch.equal(model.denoise(ids, one, 0.5), model.denoise(ids, other, 0.5))
            assert torch.equal(one.lengths, other.lengths)
    assert 2 <= record.recordings <= 8


def test_recorded_verifications_leave_the_same_context() -> None:
    """Drafts of two sizes, of which every row accepts its own number, none too; between commits, forks and denoising,
    whose replays overwrite what a verification has said, but not what it is accepted by."""
    model, record = small(), Recorder()
    captured = CapturedModel(model, record)
    chance = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        mine, theirs = (model.prefill(random_ids(3, 20), [20, 3, 11]) for _ in range(2))
        held = [(mine.fork(1), theirs.fork(1))]
        for block in range(36):
            ids = random_ids(mine.batch_size, 3 if block % 3 else 5, seed=block)
            if block % 7 == 0:
                held.append((mine.fork(1), theirs.fork(1)))
            one, other = captured.verify(ids, mine), model.verify(ids, theirs)
            assert torch.equal(one.logits, other.logits)
            captured.denoise(random_ids(3, 4), held[0][0], torch.rand(3))
            counts = torch.randint(ids.shape[1] + 1, (len(ids),), generator=chance)
            mine, theirs = captured.accept(one, counts), model.accept(other, counts)
            if block % 5 == 0:
                mine, theirs = captured.commit(ids, mine), model.commit(ids, theirs)
            if block == 24:
                mine, theirs = mine.select([2, 0]), theirs.select([2, 0])
        for ours, other_state in [*held, (mine, theirs)]:
            assert torch.equal(ours.logits, other_state.logits)
            ids = random_ids(ours.batch_size, 4)
            assert torch.equal(model.denoise(ids, ours, 0.5), model.denoise(ids, other_state, 0.5))
            assert torch.equal(ours.lengths, other_state.lengths)
    assert 6 <= record.recordings <= 30


def test_a_verification_that_was_overwritten_is_refused() -> None:
    """As it was recorded, and so was one of another context after it."""
    model = small()
    captured, ids, counts = CapturedModel(model, Recorder()), random_ids(2, 4), torch.tensor([1, 4])
    with torch.inference_mode():
        one, other = (model.prefill(random_ids(2, 5)) for _ in range(2))
        for _ in range(3):
            one = captured.accept(captured.verify(ids, one), counts)
        held = captured.verify(ids, one)
        for _ in range(3):
            other = captured.accept(captured.verify(ids, other), counts)
        with pytest.raises(RuntimeError, match=r"accept: expected the last verification of a block \[2, 4\]"):
            captured.accept(held, counts)
        assert other.lengths.tolist() == [8, 17]


@pytest.mark.parametrize("seed", range(6))
def test_states_of_all_ages_stay_valid(seed: int) -> None:
    """Whoever forks or selects, keeps or drops a state, commits to it or denoises with it, in any order: to the bit
    what the model says without recordings."""
    model, chance = small(), random.Random(seed)
    captured = CapturedModel(model, Recorder())
    prompts = random_ids(2, 5, seed=seed), [5, 2]
    pairs = [(model.prefill(*prompts), model.prefill(*prompts))]
    for _ in range(120):
        # Mostly the first one, so that its recordings are replayed.
        mine, theirs = pair = pairs[0] if chance.random() < 0.7 else chance.choice(pairs)
        ids = random_ids(mine.batch_size, 4 if chance.random() < 0.8 else 1, seed=chance.randrange(99))
        match chance.choice(["commit", "commit", "commit", "denoise", "denoise", "fork", "select", "drop"]):
            case "commit":
                pairs[pairs.index(pair)] = captured.commit(ids, mine), model.commit(ids, theirs)
            case "denoise":
                t = chance.choice([None, torch.rand(mine.batch_size)])
                assert torch.equal(captured.denoise(ids, mine, t), model.denoise(ids, theirs, t))
            case "fork" if len(pairs) < 5:
                pairs.append((mine.fork(1), theirs.fork(1)))
            case "select" if len(pairs) < 5:
                rows = [chance.randrange(mine.batch_size) for _ in range(2)]
                pairs.append((mine.select(rows), theirs.select(rows)))
            case "drop" if len(pairs) > 1:
                pairs.remove(pair)
        del mine, theirs, pair
        for one, other in pairs:
            block = random_ids(one.batch_size, 3)
            assert torch.equal(one.logits, other.logits) and torch.equal(one.lengths, other.lengths)
            assert torch.equal(model.denoise(block, one, 0.5), model.denoise(block, other, 0.5))


def test_a_fork_that_is_held_is_not_overwritten() -> None:
    """The state that a replay gave reads what the next replay overwrites; so does its fork, until then."""
    model = small()
    captured = CapturedModel(model, Recorder())
    state = model.prefill(random_ids(2, 5))
    for block in range(3):
        state = captured.commit(random_ids(2, 4, seed=block), state)
    fork = state.fork(1)
    addresses = [state.ssm[0].data_ptr(), *(fork.ssm[0].data_ptr() for _ in range(2))]
    before = model.denoise(random_ids(2, 4), fork, 0.5)
    state = captured.commit(random_ids(2, 4, seed=3), state)
    assert addresses[0] == addresses[1] == state.ssm[0].data_ptr() != fork.ssm[0].data_ptr()
    assert torch.equal(model.denoise(random_ids(2, 4), fork, 0.5), before)
    held = fork.ssm[0].data_ptr()
    state = captured.commit(random_ids(2, 4, seed=4), state)
    assert fork.ssm[0].data_ptr() == held, "once is enough"


def test_half_of_a_state_is_not_overwritten_either() -> None:
    """Who replaces `conv` alone goes on reading `ssm` where it was."""
    model = small()
    captured = CapturedModel(model, Recorder())
    state = model.prefill(random_ids(2, 5))
    for block in range(3):
        state = captured.commit(random_ids(2, 4, seed=block), state)
    other = state.replaced(conv={i: tensor.clone() for i, tensor in state.conv.items()})
    before = model.denoise(random_ids(2, 4), other, 0.5)
    captured.commit(random_ids(2, 4, seed=3), state)
    assert torch.equal(model.denoise(random_ids(2, 4), other, 0.5), before)


@pytest.mark.parametrize("mode", generate.MODES)
def test_a_generation_moves_no_state(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commits consume the last state that reads what they overwrite, while rows end and selections come and go."""
    model, record, moved = small(), Recorder(), 0
    move = capture._States._move_readers

    def watched(states: capture._States) -> None:
        nonlocal moved
        moved += states._read_by is not None and states._read_by() is not None
        move(states)

    monkeypatch.setattr(capture._States, "_move_readers", watched)
    monkeypatch.setattr(generate, "_records", lambda device: True)
    monkeypatch.setattr(generate, "CapturedModel", partial(CapturedModel, record=record))
    options: dict[str, Any] = dict(mode=mode, max_new_tokens=40, block_size=4, temperature=1.2, seed=5)
    list(generate.stream(model, [[5], [6, 7, 8], [9, 10]], eos_token_id=19, **options))
    assert record.recordings > 1 and not moved


class Failing(Recorder):
    """Memory runs out when it records, or as often as it replays."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = "record"

    def __call__(self, call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
        def short_of_memory() -> T:
            if self.replaying and self.fails == "replay":
                raise MemoryError
            return call()

        if self.fails == "record":
            raise MemoryError
        return super().__call__(short_of_memory, device)


def test_a_commit_that_fails_leaves_the_state() -> None:
    model, record = small(), Failing()
    captured = CapturedModel(model, record)
    mine, theirs = (model.prefill(random_ids(2, 5)) for _ in range(2))
    for fails in ("nothing yet", "record", "replay", "replay"):
        record.fails = fails
        for held in ([], [mine.fork(1)]):
            with pytest.raises(ValueError, match="expected 2 rows"):
                captured.commit(random_ids(3, 4), mine)
            if fails != "nothing yet":
                with pytest.raises(MemoryError):
                    captured.commit(random_ids(2, 4), mine)
            for state in (mine, *held):
                assert torch.equal(state.logits, theirs.logits)
                assert torch.equal(model.denoise(random_ids(2, 4), state), model.denoise(random_ids(2, 4), theirs))
        record.fails = "nothing"
        mine, theirs = captured.commit(random_ids(2, 4), mine), model.commit(random_ids(2, 4), theirs)
    assert record.recordings == 1


# --- what a call costs beside its graph -----------------------------------------------------------------------------


class HostCalls(TorchDispatchMode):
    """The operations that the host asks for, and the bytes that they write; not those of a replay."""

    def __init__(self, record: Recorder) -> None:
        super().__init__()
        self.record, self.names, self.bytes = record, list[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.record.replaying and func.overloadpacket is not torch.ops.aten.to:  # to where it is already
            self.names.append(str(func).split(".")[1])
            written = args[0] if func._schema.name.endswith("_") else result
            self.bytes += sum(tensor.nbytes for tensor in _tensors(written))
        return result


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at ids for a better message, as nobody does on a GPU."""
    monkeypatch.setattr(two_tower, "readable", lambda tensor: False)


@pytest.mark.parametrize("pattern", ["M*E-", "M*E-MM*E-MM*E-M"])
def test_the_host_asks_for_four_things_per_commit(pattern: str, unread: None) -> None:
    """Ids and lengths go to the graph; the last output and the new lengths are the state's. However many layers."""
    model, record = models(pattern, torch.float32).ours, Recorder()
    captured = CapturedModel(model, record)
    state = model.prefill(random_ids(2, 5))
    for block in range(3):
        state = captured.commit(random_ids(2, 1, seed=block), state)
    ids = random_ids(2, 1, seed=3)
    with HostCalls(record) as calls:
        state = captured.commit(ids, state)
    assert calls.names == ["copy_", "copy_", "clone", "add"]
    assert calls.bytes == 2 * 8 * 3 + state.last_hidden.nbytes


def test_the_host_asks_for_little_per_step(unread: None) -> None:
    """Ids and times; of a new state lengths, of selected rows their index; and nothing that grows with the layers."""
    model, record = small(), Recorder()
    captured = CapturedModel(model, record)
    state = model.prefill(random_ids(2, 5))
    ids, t = random_ids(2, 4), torch.rand(2)
    for _ in range(3):
        for some in (state, state.select([1, 0])):
            captured.denoise(ids, some, t)
        state = captured.commit(ids, state)
    some = state.select([1, 0])
    expected = {state: ["copy_"] * 3, some: ["copy_"] * 4}
    for each, names in expected.items():
        for asked in (names, ["copy_"] * 2):  # for the first time, and again
            with HostCalls(record) as calls:
                captured.denoise(ids, each, t)
            assert calls.names == asked
    assert record.recordings == 3


class Closed(dict[int, Tensor]):
    """Whoever walks it is noticed."""

    def __iter__(self) -> Any:
        raise AssertionError("walked")

    keys = values = items = __iter__


def test_no_call_walks_the_layers() -> None:
    model = small()
    captured = CapturedModel(model, Recorder())
    state = model.prefill(random_ids(2, 5))
    ids = random_ids(2, 4)
    for _ in range(3):
        captured.denoise(ids, state)
        state = captured.commit(ids, state)
    expected = model.denoise(ids, state)
    state.k, state.v, state.conv, state.ssm = map(Closed, (state.k, state.v, state.conv, state.ssm))
    assert torch.equal(captured.denoise(ids, state), expected)


def test_keys_and_values_are_not_copied() -> None:
    """Nor, but for the first time, Mamba-2's states."""
    model = small()
    captured = CapturedModel(model, Recorder())
    state = model.prefill(random_ids(2, 9))
    for _ in range(2):
        captured.denoise(random_ids(2, 4), state, torch.rand(2))
        state = captured.commit(random_ids(2, 4), state)
    captured.denoise(random_ids(2, 4), state, torch.rand(2))
    recordings = list(captured._calls.values())
    assert len(recordings) == 2
    for recording in recordings:
        assert recording is not None
        for part in ("k", "v", "conv", "ssm"):
            mine, theirs = getattr(recording._state, part), getattr(state, part)
            assert theirs and all(mine[i] is tensor for i, tensor in theirs.items())


# --- CUDA graphs, as PyTorch is asked for them ----------------------------------------------------------------------


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
