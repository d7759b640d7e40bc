"""Steps recorded on a CPU: to the bit what the model computes, or nothing at all."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import twotower_kernels as tt
from tests.model.test_leaks import resident
from twotower_kernels import TwoTowerModel
from twotower_kernels.bench.checks.random_models import VOCABULARY, models, random_ids, with_wide_residual
from twotower_kernels.model import capture, generate, idle
from twotower_kernels.model.autoregression import next_token
from twotower_kernels.model.capture import CapturedModel
from twotower_kernels.ops import _direct, recording
from twotower_kernels.ops.recording import CpuRecordings

GREEDY: dict[str, Any] = dict(temperature=0.0, top_k=0, top_p=1.0)
SAMPLED: dict[str, Any] = dict(temperature=1.1, top_k=20, top_p=0.9)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is recorded when it comes for the first time."""
    monkeypatch.setattr(capture, "WORTH_AFTER", 0)


def small(pattern: str = "M*E-", dtype: torch.dtype = torch.float32) -> TwoTowerModel:
    return models(pattern, dtype).ours


def recorded(model: TwoTowerModel) -> CapturedModel:
    return CapturedModel(model, CpuRecordings())


# --- the same bits --------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    pattern=st.sampled_from(["M*E-", "*", "M", "E*M", "-M"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    wide=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    block=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_called(pattern, dtype, wide, lengths, block, seed):  # type: ignore[no-untyped-def]
    """In any order, of states of all ages that are forked, selected, held and dropped, over storage that grows."""
    made = models(pattern, dtype)
    model, chance = (with_wide_residual(made) if wide else made).ours, random.Random(seed)
    with patch.object(capture, "WORTH_AFTER", 0):
        captured = recorded(model)
    prompts = random_ids(len(lengths), max(lengths), seed=seed % 97), lengths
    pairs = [(model.prefill(*prompts), model.prefill(*prompts))]
    for _ in range(24):
        mine, theirs = pair = pairs[0] if chance.random() < 0.7 else chance.choice(pairs)
        rows, numbers = mine.batch_size, chance.randrange(99)
        ids, token = random_ids(rows, block, seed=numbers), random_ids(rows, 1, seed=numbers)
        match chance.choice(
            ["commit", "grow", "next", "next", "verify", "verify", "denoise", "denoise", "fork", "select", "drop"]
        ):
            case "commit":
                pairs[pairs.index(pair)] = captured.commit(ids, mine), model.commit(ids, theirs)
            case "grow":
                many = random_ids(rows, 40, seed=numbers)
                pairs[pairs.index(pair)] = captured.commit(many, mine), model.commit(many, theirs)
            case "next":
                seeds, how = torch.arange(rows) - numbers, chance.choice([GREEDY, SAMPLED])
                mine, one = captured.next_token(token, mine, seeds, numbers, how)
                theirs, other = next_token(model, token, theirs, seeds, numbers, how)
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
                pairs[pairs.index(pair)] = mine, theirs
            case "verify":
                counts = torch.tensor([chance.randint(0, block) for _ in range(rows)])
                one, other = captured.verify(ids, mine), model.verify(ids, theirs)
                assert torch.equal(one.logits, other.logits)
                pairs[pairs.index(pair)] = captured.accept(one, counts), model.accept(other, counts)
            case "denoise":
                t = chance.choice([None, torch.rand(rows), torch.rand(rows, dtype=torch.float64)])
                assert torch.equal(captured.denoise(ids, mine, t), model.denoise(ids, theirs, t))
            case "fork" if len(pairs) < 4:
                pairs.append((mine.fork(1), theirs.fork(1)))
            case "select" if len(pairs) < 4:
                index = [chance.randrange(rows) for _ in range(2)]
                pairs.append((mine.select(index), theirs.select(index)))
            case "drop" if len(pairs) > 1:
                pairs.remove(pair)
        del mine, theirs, pair
        for one, other in pairs:
            assert torch.equal(one.logits, other.logits) and torch.equal(one.lengths, other.lengths)
    assert len(captured.recordings) > 0
    for one, other in pairs:
        ids = random_ids(one.batch_size, 3)
        assert torch.equal(model.denoise(ids, one, 0.5), model.denoise(ids, other, 0.5))


@contextmanager
def unrecorded() -> Iterator[None]:
    with patch.object(generate, "_records_on_cpu", lambda model: False):
        yield


def events(model: TwoTowerModel, **options: Any) -> list[list[Any]]:
    found = generate.stream(model, [[5], [6, 7, 8], [9, 10]], **options)
    return [[x.tolist() if isinstance(x, Tensor) else x for x in vars(event).values()] for event in found]


@pytest.mark.parametrize("mode", generate.MODES)
@pytest.mark.parametrize(
    "sampling", [pytest.param(GREEDY, marks=pytest.mark.thorough), SAMPLED], ids=["greedy", "sampled"]
)
def test_a_generation_says_the_same(mode: str, sampling: dict[str, Any]) -> None:
    """Event for event, of rows that end at different times; and so does a second one, with the first one's recordings,
    and one that stands still while another of the same model goes on."""
    model = small("MEM*E-")
    options: dict[str, Any] = dict(mode=mode, max_new_tokens=24, block_size=4, eos_token_id=19, seed=5, **sampling)
    with unrecorded():
        expected = events(model, logprobs=True, **options)
    again = generate.stream(model, [[5], [6, 7, 8], [9, 10]], **options)
    next(again)
    kept: list[int] = []
    for _ in range(2):
        assert str(events(model, logprobs=True, **options)) == str(expected)  # NaN is not NaN
        kept.append(sum(map(len, idle._IDLE[model])))
    assert kept[0] == kept[1] > 0
    with unrecorded():
        result = generate.generate(model, [[5], [6, 7, 8], [9, 10]], **options)
    assert str(again.run().sequences) == str(result.sequences)


def test_threads_have_recordings_of_their_own() -> None:
    model = small("MEM*E-", torch.bfloat16)
    with unrecorded():
        expected = [model.generate([[5, 6]], mode="ar", max_new_tokens=60, seed=seed).sequences for seed in range(4)]
    found: dict[int, Any] = {}

    def run(seed: int) -> None:
        found[seed] = model.generate([[5, 6]], mode="ar", max_new_tokens=60, seed=seed).sequences

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed][0], expected[seed][0]) for seed in range(4))


def test_what_is_chosen_for_each_run_is_chosen_for_a_replay() -> None:
    """Instruction set and threads are those of the replay."""
    model = small(dtype=torch.bfloat16)
    captured, state, ids = recorded(model), model.prefill(random_ids(2, 9)), random_ids(2, 4)
    captured.denoise(ids, state)
    before = torch.get_num_threads()
    try:
        for isa in tt.cpu.kernels().isas():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with tt.cpu.use(isa):
                    assert torch.equal(captured.denoise(ids, state), model.denoise(ids, state))
    finally:
        torch.set_num_threads(before)
    assert len(captured.recordings) == 1


# --- weights and modules --------------------------------------------------------------------------------------------


def text(model: TwoTowerModel) -> list[int]:
    found: list[int] = model.generate([[5, 6]], mode="ar", max_new_tokens=12).sequences[0].tolist()
    return found


def test_weights_are_those_of_now() -> None:
    """What is written to them is read; what is put in their place is recorded anew."""
    model = small("MEM*E-")
    text(model)
    head = type(model.context_lm_head)(32, VOCABULARY)
    head.weight.data.normal_()
    changes: list[Callable[[], Any]] = [
        lambda: model.context_lm_head.weight.data.neg_(),
        lambda: setattr(model.context_lm_head.weight, "data", -model.context_lm_head.weight.data),
        lambda: setattr(model, "context_lm_head", head),
        lambda: setattr(head.weight, "data", -head.weight.data),
        lambda: setattr(head, "weight", torch.nn.Parameter(-head.weight, requires_grad=False)),
        lambda: model.double(),
    ]
    for change in changes:
        change()
        found = text(model)
        with unrecorded():
            assert found == text(model)


def test_a_weight_replaced_meanwhile_is_an_error() -> None:
    model = small()
    stream = generate.stream(model, [[5, 6]], mode="ar", max_new_tokens=4)
    next(stream)
    model.context_lm_head.weight.data = model.context_lm_head.weight.data.clone()
    with pytest.raises(RuntimeError, match="expected the same weights and modules"):
        list(stream)


def test_who_watches_sees_every_call() -> None:
    """A hook, a function laid over one of the model's, a mode: no replay passes them by."""
    model, seen = small(), []
    hook = model.context_tower.layers[0].mixer.register_forward_hook(lambda *_: seen.append(1))
    text(model)
    assert len(seen) == 1 + 11  # the prompt, and every token but the last
    hook.remove()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    captured, state, ids = recorded(model), model.prefill(random_ids(1, 4)), random_ids(1, 4)
    expected, calls = captured.denoise(ids, state).clone(), list[str]()
    with Watched():
        assert torch.equal(captured.denoise(ids, state), expected)
    assert "twotower.block_attention.default" in calls
    with _direct.off():
        assert not recording.may_replay()
    denoise = model.denoise
    model.denoise = lambda *arguments: (seen.append(2), denoise(*arguments))[1]  # type: ignore[method-assign]
    result = model.generate([[5, 6]], max_new_tokens=4, block_size=4)
    assert seen.count(2) == result.nfe[0]


# --- errors, memory -------------------------------------------------------------------------------------------------


def test_an_unknown_token_is_an_error_and_harms_nothing() -> None:
    model = small()
    captured = recorded(model)
    mine, theirs = (model.prefill(random_ids(1, 5)) for _ in range(2))
    ids = random_ids(1, 4)
    captured.denoise(ids, mine)
    for wrong in (-1, VOCABULARY, 2**62):
        with pytest.raises(ValueError, match=f"expected rows of a table of {VOCABULARY}, got {wrong}"):
            captured.denoise(torch.full((1, 4), wrong), mine)
    mine = captured.commit(ids, mine)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        captured.commit(torch.full((1, 4), VOCABULARY), mine)
    assert torch.equal(captured.denoise(ids, mine), model.denoise(ids, model.commit(ids, theirs)))


def test_nothing_is_left_behind() -> None:
    """By generations, nor of the contexts that they read."""
    model = small()

    def generations(count: int) -> int:
        for seed in range(count):
            model.generate([[5, 6]], max_new_tokens=8, block_size=4, seed=seed)
        gc.collect()
        return resident()

    before = generations(20)
    assert generations(30) - before < 1 << 20
    (kept,) = idle._IDLE[model]
    assert all(not r._state.k for rows in kept._of_rows.values() for r in rows.calls.values() if not isinstance(r, int))


def test_a_model_takes_its_recordings_with_it() -> None:
    model = small()
    text(model)
    gone, count = ref(model), len(idle._IDLE)
    del model
    gc.collect()
    assert gone() is None and len(idle._IDLE) < count
