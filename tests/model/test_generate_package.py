"""The package's generation: the specification's, token for token and event for event; and what a stream promises."""

import copy
import dataclasses
import functools
import inspect
import json
import math
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.small_model import MASK, VOCAB, package_model, small_model
from tests.paths import GOLDEN
from twotower_kernels.bench.checks import recordings
from twotower_kernels.generation import blocks as blocks_module
from twotower_kernels.generation import request
from twotower_kernels.generation import stream as stream_module
from twotower_kernels.generation.results import GenerateResult, StepEvent
from twotower_kernels.model import autoregression, diffusion, speculative, state
from twotower_kernels.model.generate import MODES, generate, stream
from twotower_kernels.model.two_tower import TwoTowerModel
from twotower_kernels.ops.remask_checks import REAL
from twotower_kernels.options import generation
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.generation import DRAFTING, GenerationConfig
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.options.seeds import philox as philox_of_integers
from twotower_kernels.options.seeds import sequence_seed
from twotower_kernels.reference import generate as specification
from twotower_kernels.reference import philox


def run(prompts: Any, **options: Any) -> GenerateResult:
    return generate(package_model(), prompts, **options)


def values_of(event: Any) -> tuple[Any, ...]:
    tensors = (event.rows, event.before, event.after, event.num_masked, event.nfe, event.start)
    return event.block, event.step, event.committed, *(t.tolist() for t in tensors)


def assert_same(prompts: Any, policy: str | None = None, **options: Any) -> None:
    """Both programs generate the same tokens in the same calls for the same reasons, and tell the same story."""
    events, wanted = [], []
    rule = getattr(RemaskPolicy, policy)() if policy else None
    got = run(prompts, policy=rule, on_step=events.append, **options)
    want = specification.generate(small_model(), prompts, policy=rule, on_step=wanted.append, **options)
    for name in ("sequences", "new_tokens"):
        assert [t.tolist() for t in getattr(got, name)] == [t.tolist() for t in getattr(want, name)]
        assert all(t.dtype == torch.int64 for t in getattr(got, name))
    for name in ("nfe", "finish_reason", "tokens_per_nfe"):
        assert getattr(got, name) == getattr(want, name)
    assert [values_of(event) for event in events] == [values_of(event) for event in wanted]


# --- the specification's text ---------------------------------------------------------------------------------------

tokens = st.integers(MASK + 1, VOCAB - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=3)
sampling = st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}])
blocks = st.sampled_from([{"block_size": s, "steps_per_block": t} for s, t in ((1, 1), (4, 4), (5, 2), (3, 8))])


@settings(max_examples=25)
@given(
    rows=prompts,
    mode=st.sampled_from(MODES),
    sampler=sampling,
    block=blocks,
    new=st.integers(0, 9),
    eos=st.none() | tokens,
    seed=st.integers(-(2**63), 2**64 - 1),
    threshold=st.floats(0, 1),
)
def test_generates_what_is_specified(rows, mode, sampler, block, new, eos, seed, threshold) -> None:  # type: ignore[no-untyped-def]
    options = {"max_new_tokens": new, "eos_token_id": eos, "seed": seed, "confidence_threshold": threshold}
    assert_same(rows, mode=mode, **options, **sampler, **block)


UNMASKING = [
    name
    for name in vars(RemaskPolicy)
    if inspect.ismethod(preset := getattr(RemaskPolicy, name)) and not preset().renoise
]


@pytest.mark.parametrize("name", UNMASKING)
def test_every_rule_as_specified(name: str) -> None:
    """Past its schedule too: a schedule of 3 steps for 6 masks."""
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 12, "block_size": 6, "steps_per_block": 3, "temperature": temperature}
        assert_same([[9, 4, 7], [5]], name, **options)


@pytest.mark.parametrize(("name", "index"), recordings.RECORDED_TEXTS)
def test_generates_what_was_recorded(name: str, index: int) -> None:
    recordings.assert_recorded_text(recorded_model(name), name, index)


@functools.cache
def recorded_model(name: str) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(GOLDEN / name, dtype=torch.float32)


def test_prompts_may_be_a_tensor_or_rows_of_any_kind() -> None:
    for mode in MODES:
        as_tensor = run(torch.tensor([[5, 6], [7, 8]]), mode=mode, max_new_tokens=5)
        as_rows = run([torch.tensor([5, 6], dtype=torch.int32), [7, 8]], mode=mode, max_new_tokens=5)
        assert [t.tolist() for t in as_tensor.sequences] == [t.tolist() for t in as_rows.sequences]


def test_the_arguments_are_those_of_the_specification() -> None:
    wanted = {name: p.default for name, p in inspect.signature(specification.generate).parameters.items()}
    assert wanted["mask_token_id"] is None  # the config's
    assert {name: p.default for name, p in inspect.signature(generate).parameters.items()} == wanted
    del wanted["on_step"]
    assert {name: p.default for name, p in inspect.signature(stream).parameters.items()} == wanted


# --- what it costs --------------------------------------------------------------------------------------------------


class Watched:
    """The small model, noting the rows of each call. A state that `commit` has consumed cannot be used again."""

    def __init__(self) -> None:
        self.model = package_model()
        self.config, self.prefill = self.model.config, self.model.prefill
        self.device, self.denoiser_device = self.model.device, self.model.denoiser_device
        self.denoised: list[int] = []
        self.committed: list[int] = []
        self.verified: list[int] = []
        self.consumed: list[Any] = []  # kept alive, so that `is` means the same state

    def _use(self, state: Any) -> Any:
        assert not any(state is old for old in self.consumed)
        return state

    def denoise(self, ids: torch.Tensor, state: Any, t: Any = None) -> torch.Tensor:
        self.denoised.append(len(ids))
        return self.model.denoise(ids, self._use(state), t)

    def commit(self, ids: torch.Tensor, state: Any) -> Any:
        self.committed.append(ids.numel())
        new = self.model.commit(ids, self._use(state))
        self.consumed.append(state)
        return new

    def verify(self, ids: torch.Tensor, state: Any) -> Any:
        self.verified.append(len(ids))
        verification = self.model.verify(ids, self._use(state))
        self.consumed.append(state)
        return verification

    def accept(self, verification: Any, lengths: torch.Tensor) -> Any:
        return self.model.accept(verification, lengths)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_done_cost_nothing(mode: str, ends: bool) -> None:
    """The model is called with the rows that still need it, and never after the last block."""
    rows = [[5], [6, 7, 8], [9, 10]]
    eos = int(run(rows, mode=mode, max_new_tokens=12, block_size=4).new_tokens[1][2]) if ends else None
    model: Any = Watched()
    result = generate(model, rows, mode=mode, max_new_tokens=12, block_size=4, eos_token_id=eos)
    assert ("eos" in result.finish_reason) == ends
    assert sum(model.denoised) + sum(model.verified) == (0 if mode == "ar" else sum(result.nfe))
    if mode == "speculative":
        assert sum(model.verified) == sum(result.verifications) == sum(model.denoised) and not model.committed  # type: ignore[arg-type]
        return
    block = 4 if mode == "mask_diffusion" else 1
    assert sum(model.committed) == sum((math.ceil(len(new) / block) - 1) * block for new in result.new_tokens)


LOOPS = (autoregression, diffusion, speculative, blocks_module, request, stream_module, state)
READS = ("tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_read_once_by_the_host(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of tensors are read by the host once per step, beginning and end of the request aside."""
    reads: Counter[str] = Counter()
    files = {module.__file__ for module in LOOPS}

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_code.co_filename in files:
                reads[frame.f_code.co_name] += 1
            return original(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    rows = [[5], [6, 7, 8], [9, 10]]
    events = list(stream(package_model(), rows, mode=mode, max_new_tokens=12, block_size=4))
    steps = sum(not event.committed for event in events) if mode == "mask_diffusion" else len(events)
    assert reads.pop("room_for") <= 2, "before storage is moved"
    if mode == "speculative":  # and the tokens that are known from the prompts
        drafts = sum(event.step == 0 for event in events if not event.committed)
        assert reads == {"speculate": 1 + drafts} and drafts > 3
        return
    assert reads == {"look": steps}
    assert steps > 3


def test_a_rule_that_stalls_is_finished() -> None:
    """A denoiser that always proposes the mask, under a rule that lets it: one call more than the block could need."""
    for size, steps in ((4, 2), (2, 5)):
        logits = torch.zeros(VOCAB, dtype=torch.float64)
        logits[MASK], logits[7] = 9.0, 5.0
        model: Any = Watched()
        model.denoise = lambda ids, state, t=None, logits=logits: logits.expand(*ids.shape, VOCAB)
        options = {"max_new_tokens": size, "block_size": size, "steps_per_block": steps}
        result = generate(model, [[5]], policy=RemaskPolicy.llada(), **options)
        assert result.new_tokens[0].tolist() == [7] * size
        assert result.nfe == [max(size, steps) + 1]


def test_the_seconds_are_those_of_the_model() -> None:
    def slow(event: StepEvent) -> None:
        time.sleep(0.05)

    start = time.perf_counter()
    result = run([[5]], max_new_tokens=8, block_size=4, on_step=slow)
    elapsed = time.perf_counter() - start
    assert 0 < result.seconds <= elapsed - 0.05 * (result.nfe[0] + 2)


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_is_left_keeps_its_finished_blocks(mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 12, "block_size": 4}
    rows = [[5], [6, 7]]
    whole = run(rows, **options)
    size = 4 if mode == "mask_diffusion" else 1
    written = [0, 0]
    events = stream(package_model(), rows, **options)
    assert [len(new) for new in events.result().new_tokens] == [0, 0]
    finished = 0
    for event in events:
        finished += event.committed
        for row in (0, 1) if event.committed else ():
            written[row] += size if event.accepted is None else int(event.accepted[row])
        if finished == 2:
            break
    events.close()
    assert list(events) == []
    result = events.result()
    kept = [new.tolist()[:count] for new, count in zip(whole.new_tokens, written, strict=True)]
    assert [new.tolist() for new in result.new_tokens] == kept
    assert result.sequences[1].tolist() == rows[1] + result.new_tokens[1].tolist()
    assert result.finish_reason == ["interrupted"] * 2
    assert all(0 < some <= all_ for some, all_ in zip(result.nfe, whole.nfe, strict=True))


def test_ctrl_c_inside_the_model_keeps_its_finished_blocks() -> None:
    model: Any = Watched()
    whole = generate(model, [[5]], max_new_tokens=12, block_size=4)
    commit = model.commit

    def interrupted(ids: torch.Tensor, state: Any) -> Any:
        if len(model.committed) == 3:  # two commits by the whole run, then one here
            raise KeyboardInterrupt
        return commit(ids, state)

    model.commit = interrupted
    events = stream(model, [[5]], max_new_tokens=12, block_size=4)
    with pytest.raises(KeyboardInterrupt):
        list(events)
    assert events.result().new_tokens[0].tolist() == whole.new_tokens[0].tolist()[:8]
    assert events.result().finish_reason == ["interrupted"]


def test_a_row_that_ended_before_the_interruption_has_its_reason() -> None:
    rows = [[5], [6, 7, 8]]
    free = run(rows, max_new_tokens=12, block_size=4)
    first, second = (new.tolist() for new in free.new_tokens)
    eos = next(token for token in first[:4] if token not in second)
    events = stream(package_model(), rows, max_new_tokens=12, block_size=4, eos_token_id=eos)
    next(event for event in events if event.committed)
    assert events.result().finish_reason == ["eos", "interrupted"]


def test_events_are_the_observers_own() -> None:
    """Whatever is written into an event's tensors, the text stays."""

    def spoil(event: StepEvent) -> None:
        for tensor in (event.rows, event.before, event.after, event.num_masked, event.nfe):
            tensor.fill_(VOCAB - 1)

    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 8, "block_size": 4}
        spoiled, whole = run([[5], [6, 7]], on_step=spoil, **options), run([[5], [6, 7]], **options)
        assert [t.tolist() for t in spoiled.sequences] == [t.tolist() for t in whole.sequences]
        assert spoiled.nfe == whole.nfe


def test_results_are_ordinary_tensors() -> None:
    (new,) = run([[5]], max_new_tokens=4, block_size=4).new_tokens
    new += 1
    assert not new.is_inference()


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_answers() -> None:
    """Random123's known answers."""
    ones = 2**32 - 1
    assert philox_of_integers((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox_of_integers((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@given(seed=st.integers(-(2**63), 2**64 - 1), index=st.integers(0, 2**63 - 1))
def test_seeds_are_the_specified_ones(seed: int, index: int) -> None:
    assert sequence_seed(seed, index) == philox.sequence_seed(seed, index)


@pytest.mark.parametrize(
    ("seed", "index", "message"),
    [(2**64, 0, "seed: .* 64 bits"), (-(2**63) - 1, 0, "seed"), (0, -1, "index: .* -1"), (0, 2**64, "index")],
)
def test_seeds_outside_their_range_are_refused(seed: int, index: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_seed(seed, index)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_model_is_reported(mode: str) -> None:
    model = copy.deepcopy(package_model())
    for tower in (model.context_tower, model.denoiser_tower):
        tower.norm_f.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"logits: .* row 0"):
        generate(model, [[5], [6, 7]], mode=mode, max_new_tokens=4)


def test_a_block_larger_than_trained_is_warned_about(recwarn: Any) -> None:
    """At the line that asked for it."""
    model: Any = Watched()
    model.config = copy.copy(model.config)
    object.__setattr__(model.config, "block_size", 4)
    generate(model, [[5]], max_new_tokens=4, block_size=4)
    assert not recwarn
    for call in (generate, stream):
        with pytest.warns(UserWarning, match="block_size 8 is larger than the 4") as warned:
            call(model, [[5]], max_new_tokens=4, block_size=8)
        assert [warning.filename for warning in warned] == [__file__]


# --- the options as one value ----------------------------------------------------------------------------------------


def test_the_options_are_the_arguments() -> None:
    """Of `stream`, by name and default."""
    arguments = {name: p.default for name, p in inspect.signature(stream).parameters.items()}
    fields = {
        f.name: inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(GenerationConfig)
    }
    del arguments["model"], arguments["prompts"]
    assert fields == arguments


def test_the_options_are_a_value() -> None:
    numbers = dict(max_new_tokens=torch.tensor(5), top_k=np.int64(2), temperature=1, seed=[1, np.int32(2)])
    one = GenerationConfig(**numbers, eos_token_id=torch.tensor([4, 7]))  # type: ignore[arg-type]
    other = GenerationConfig(max_new_tokens=5, top_k=2, temperature=1.0, seed=(1, 2), eos_token_id=[4, 7])
    assert one == other and hash(one) == hash(other)
    assert (one.ends, GenerationConfig(max_new_tokens=1).ends) == ((4, 7), ())
    assert one.sampling == {"temperature": 1.0, "top_k": 2, "top_p": 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.top_k = 3  # type: ignore[misc]


def test_the_rule_is_the_policy_or_the_threshold() -> None:
    by_threshold = GenerationConfig(max_new_tokens=1, confidence_threshold=0.25).unmasking
    assert by_threshold == RemaskPolicy.twotower(threshold=0.25)
    assert GenerationConfig(max_new_tokens=1, policy=RemaskPolicy.dream()).unmasking == RemaskPolicy.dream()


def test_what_only_blocks_read_matters_to_them_alone() -> None:
    wrong: dict[str, Any] = dict(max_new_tokens=1, block_size=0, steps_per_block=-1, mask_token_id="none")
    model = package_model().config
    assert [GenerationConfig(mode=mode, **wrong).for_model(model).mode for mode in ("mock_ar", "ar")]
    for mode in DRAFTING:
        with pytest.raises((TypeError, ValueError)):
            GenerationConfig(mode=mode, **wrong)
    assert GenerationConfig(max_new_tokens=1, draft_steps=0).mode == "mask_diffusion"
    assert GenerationConfig(mode="speculative", max_new_tokens=1, steps_per_block=0).draft_steps == 1


def test_the_highest_temperature_is_the_samplers() -> None:
    assert REAL["temperature"].high == generation.HIGHEST_TEMPERATURE


def test_the_mask_token_is_read_where_it_is_written() -> None:
    """Released files do not say it."""
    raw = json.loads((GOLDEN / "tiny" / "config.json").read_text(encoding="utf-8"))
    assert "mask_token_id" not in raw
    said: list[dict[str, Any]] = [{}, {"mask_token_id": None}, {"mask_token_id": 9}]
    assert [TwoTowerConfig.from_dict(raw | fields).mask_token_id for fields in said] == [3, 3, 9]
    with pytest.raises(ValueError, match="mask_token_id must be an integer of 32 bits, got 'three'"):
        TwoTowerConfig.from_dict(raw | {"mask_token_id": "three"})


def test_the_mask_token_is_the_models() -> None:
    """Unless another one is asked for."""
    model = Watched()
    model.config = dataclasses.replace(model.config, mask_token_id=5)
    for asked, mask in ((None, 5), (MASK, MASK)):
        events = list(stream(model, [[6, 7]], max_new_tokens=4, block_size=4, mask_token_id=asked))
        assert events[0].before.tolist() == [[mask] * 4]
    released = GenerationConfig(max_new_tokens=1).for_model(package_model().config)
    assert released.mask_token_id == 3
    model.config = dataclasses.replace(model.config, mask_token_id=VOCAB)
    with pytest.raises(ValueError, match=f"mask_token_id: .* {VOCAB}"):
        stream(model, [[6, 7]], max_new_tokens=4)
