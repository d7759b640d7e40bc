"""Speculative decoding: autoregression's text, whatever is drafted; what it costs and tells; a commit in two halves."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS
from tests.model.small_model import MASK, VOCAB, package_model, small_model
from tests.model.test_row_bits import assert_same_bits, assert_same_state, on
from twotower_kernels import GenerateResult, StepEvent, TwoTowerModel
from twotower_kernels.bench.checks.random_models import VOCABULARY, models, random_ids
from twotower_kernels.model import state, two_tower
from twotower_kernels.reference import generate as specification

PATTERNS = ("M*E-", "M", "*", "MME", "-*E*")
SETS, THREADS = st.sampled_from(EVERY_ISA), st.integers(1, 2)
SAMPLING = st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}])
SEEDS = st.integers(-(2**63), 2**64 - 1)


@cache
def model(pattern: str, dtype: torch.dtype = torch.float32) -> TwoTowerModel:
    return models(pattern, dtype).ours


@cache
def shipped(dtype: torch.dtype = torch.float32) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(tt.demo_path(), dtype=dtype)


class Oracle:
    """A denoiser that knows the texts that autoregression writes, and says another token now and then."""

    def __init__(self, vocabulary: int, prompts: list[list[int]], wanted: GenerateResult, wrong: float, seed: int):
        self.vocabulary, self.wrong = vocabulary, wrong
        self.texts = [(len(p), text.tolist()) for p, text in zip(prompts, wanted.sequences, strict=True)]
        self.chance = torch.Generator().manual_seed(seed)

    def __call__(self, ids: Tensor, state: Any, t: Any = None) -> Tensor:
        tokens = torch.randint(self.vocabulary, ids.shape, generator=self.chance)
        for row, (known, begin) in enumerate(zip(ids[:, 0].tolist(), state.lengths.tolist(), strict=True)):
            for length, text in self.texts:  # of those that might be this row's, the first: a draft may be wrong
                if length <= begin < len(text) and text[begin] == known:
                    right = torch.tensor(text[begin : begin + ids.shape[1]])
                    tokens[row, : len(right)] = right
                    break
        errs = torch.rand(ids.shape, generator=self.chance) < self.wrong
        tokens = torch.where(errs, torch.randint(self.vocabulary, ids.shape, generator=self.chance), tokens)
        return 60 * torch.nn.functional.one_hot(tokens, self.vocabulary).float()


def lists(tensors: Any) -> list[list[Any]]:
    return [tensor.tolist() for tensor in tensors]


def assert_same_text(got: GenerateResult, wanted: GenerateResult, events: list[StepEvent]) -> None:
    """Tokens, ends and probabilities are autoregression's to the bit, and so the events tell it; calls are counted."""
    assert lists(got.sequences) == lists(wanted.sequences) and lists(got.new_tokens) == lists(wanted.new_tokens)
    assert got.finish_reason == wanted.finish_reason
    assert got.logprobs is not None and wanted.logprobs is not None and got.verifications is not None
    for b, (ours, theirs) in enumerate(zip(got.logprobs, wanted.logprobs, strict=True)):
        assert_same_bits(ours, theirs, f"row {b}: log probabilities")
    rows = range(len(got.sequences))
    told: list[list[int]] = [[] for _ in rows]
    of_told: list[list[float]] = [[] for _ in rows]
    drafted, verified = [0] * len(rows), [0] * len(rows)
    for event in events:
        for i, row in enumerate(event.rows.tolist()):
            assert event.start is not None and int(event.start[i]) == len(got.sequences[row]) - len(
                got.new_tokens[row]
            ) + len(told[row])
            if not event.committed:
                assert event.accepted is event.logprobs is None
                drafted[row] += 1
                continue
            assert event.accepted is not None and event.logprobs is not None and event.accepted[i] >= 1
            told[row] += event.after[i, : event.accepted[i]].tolist()
            of_told[row] += event.logprobs[i, : event.accepted[i]].tolist()
            verified[row] += 1
    assert told == lists(got.new_tokens) and of_told == lists(got.logprobs)
    for row in rows:  # a last token that is known is a block that nobody verifies
        assert got.verifications[row] in (verified[row], verified[row] - 1)
        assert got.nfe[row] == drafted[row] + got.verifications[row]
    assert got.accepted == sum(map(len, got.new_tokens)) / max(1, sum(got.verifications))
    assert wanted.accepted is None


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    """A model, prompts and options; whether the denoiser knows the text, and how often it errs."""
    tokens = st.integers(0, VOCABULARY - 1)
    return dict(
        pattern=draw(st.sampled_from(PATTERNS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        rows=draw(st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4)),
        asked=dict(
            max_new_tokens=draw(st.integers(0, 30)),
            eos_token_id=draw(st.lists(tokens, max_size=3)),
            seed=draw(SEEDS),
            logprobs=True,
            **draw(SAMPLING),
        ),
        drafts=dict(block_size=draw(st.integers(1, 20)), draft_steps=draw(st.integers(1, 4)), confidence_threshold=0.5),
        wrong=draw(st.none() | st.sampled_from([0.0, 0.1, 0.4])),
        isa=draw(SETS),
        threads=draw(THREADS),
    )


def assert_autoregression(pattern, dtype, rows, asked, drafts, wrong, isa, threads) -> None:  # type: ignore[no-untyped-def]
    tower, events = model(pattern, dtype), []
    with on(isa, threads):
        wanted = tower.generate(rows, mode="ar", **asked)
        denoise = tower.denoise if wrong is None else Oracle(VOCABULARY, rows, wanted, wrong, asked["seed"] % 2**32)
        with patch.object(tower, "denoise", denoise):
            got = tower.generate(rows, mode="speculative", on_step=events.append, **drafts, **asked)
    assert_same_text(got, wanted, events)
    if wrong == 0 and len(rows) == 1:  # in a batch, a row may be taken for another
        assert got.verifications[0] <= -(-asked["max_new_tokens"] // drafts["block_size"])


@settings(max_examples=15)
@given(requests())
def test_the_text_is_autoregressions(request: dict[str, Any]) -> None:
    """Of random models, whose denoisers know nothing, and with drafts that are right until they are wrong."""
    assert_autoregression(**request)


@pytest.mark.thorough
@settings(max_examples=300)
@given(requests())
def test_the_text_is_autoregressions_every_time(request: dict[str, Any]) -> None:
    assert_autoregression(**request)


ON_SETS = [
    pytest.param(isa, marks=[] if isa == ISAS[-2] else pytest.mark.thorough) for isa in ISAS
]  # emulated AMX comes last


@pytest.mark.parametrize("isa", ON_SETS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 30, "top_p": 0.95}])
def test_the_shipped_model_writes_its_autoregressive_text(sampling: dict[str, Any], isa: str) -> None:
    """Ragged, in bfloat16, whose roundings show soonest; and several tokens at a time."""
    tower = shipped(torch.bfloat16)
    rows = [random_prompt(tower, length).tolist() for length in (7, 70, 33)]
    asked: dict[str, Any] = dict(max_new_tokens=40, eos_token_id=[10, 11], seed=3, logprobs=True, **sampling)
    with on(isa, 1):
        wanted = tower.generate(rows, mode="ar", **asked)
        for size, steps in ((16, 1), (5, 3)):
            events: list[StepEvent] = []
            drafts: dict[str, Any] = dict(block_size=size, draft_steps=steps)
            got = tower.generate(rows, mode="speculative", on_step=events.append, **drafts, **asked)
            assert_same_text(got, wanted, events)
            assert got.accepted is not None and got.accepted > 1.3


def random_prompt(tower: TwoTowerModel, length: int) -> Tensor:
    return torch.randint(4, tower.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))


# --- the specification ----------------------------------------------------------------------------------------------


def values_of(event: Any) -> tuple[Any, ...]:
    tensors = (event.rows, event.before, event.after, event.num_masked, event.nfe, event.start)
    accepted = None if event.accepted is None else event.accepted.tolist()
    return event.block, event.step, event.committed, accepted, *lists(tensors)


@settings(max_examples=12)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=3),
    size=st.integers(1, 6),
    steps=st.integers(1, 4),
    threshold=st.floats(0, 1),
    new=st.integers(0, 10),
    ends=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    seed=SEEDS,
    sampling=SAMPLING,
)
def test_drafts_as_specified(rows, size, steps, threshold, new, ends, seed, sampling) -> None:  # type: ignore[no-untyped-def]
    """The same drafts, of which as much is accepted, told the same; the mask may be known, or written, as any token."""
    options: dict[str, Any] = dict(mode="speculative", block_size=size, draft_steps=steps, max_new_tokens=new)
    options |= dict(confidence_threshold=threshold, eos_token_id=ends, seed=seed, **sampling)
    events, wanted = [], []
    got = package_model().generate(rows, on_step=events.append, **options)
    want = specification.generate(small_model(), rows, on_step=wanted.append, **options)
    assert lists(got.sequences) == lists(want.sequences) and got.finish_reason == want.finish_reason
    assert (got.nfe, got.verifications, got.accepted) == (want.nfe, want.verifications, want.accepted)
    assert [values_of(event) for event in events] == [values_of(event) for event in wanted]


def test_a_known_mask_is_given() -> None:
    """A context tower that writes the mask token: drafts begin with it, and it is neither filled nor counted."""
    tower, logits = package_model(), torch.zeros(VOCAB, dtype=torch.float64)
    logits[MASK] = 9.0
    events: list[StepEvent] = []
    with pytest.MonkeyPatch.context() as patches:
        for module in (two_tower, state):
            patches.setattr(module, "logits", lambda hidden, head: logits.expand(*hidden.shape[:-1], VOCAB))
        result = tower.generate([[5]], mode="speculative", max_new_tokens=4, block_size=3, on_step=events.append)
    assert result.new_tokens[0].tolist() == [MASK] * 4
    assert result.verifications == [3]  # a denoiser never proposes the mask, so nothing else of a draft agrees
    for event in (event for event in events if not event.committed):
        assert event.before.tolist() == [[MASK] * 3] and event.after[0, 0] == MASK
        assert MASK not in event.after[0, 1:] and event.num_masked.tolist() == [0]


# --- what it costs, and what is refused -----------------------------------------------------------------------------


def test_a_last_token_that_is_known_costs_nothing() -> None:
    for options in ({"max_new_tokens": 1}, {"max_new_tokens": 9, "eos_token_id": list(range(VOCAB))}):
        result = package_model().generate([[5], [6, 7]], mode="speculative", **options)  # type: ignore[arg-type]
        assert (result.nfe, result.verifications, result.accepted) == ([0, 0], [0, 0], 2.0)
        wanted = package_model().generate([[5], [6, 7]], mode="ar", **options)  # type: ignore[arg-type]
        assert lists(result.sequences) == lists(wanted.sequences)
    alone = package_model().generate([[5]], mode="speculative", max_new_tokens=6, block_size=1)
    assert (alone.nfe, alone.verifications) == ([5], [5])  # no masks, so no denoiser


def test_processors_see_what_autoregression_shows_them() -> None:
    """One position at a time; in drafts, the block as it stands."""
    shapes: set[tuple[int, ...]] = set()

    def ban(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        shapes.add(tuple(logits.shape[:2]))
        logits[rows == 1, :, 4:14] = -torch.inf
        return logits

    rows, options = [[5], [6, 7]], dict(max_new_tokens=9, seed=1, temperature=1.0, logprobs=True, processors=[ban])
    wanted = package_model().generate(rows, mode="ar", **options)  # type: ignore[arg-type]
    got = package_model().generate(rows, mode="speculative", block_size=4, **options)  # type: ignore[arg-type]
    assert lists(got.sequences) == lists(wanted.sequences) and lists(got.logprobs) == lists(wanted.logprobs)
    assert not set(range(4, 14)) & set(wanted.new_tokens[1].tolist())
    assert shapes == {(2, 1), (1, 1), (2, 4), (1, 4)} or shapes == {(2, 1), (2, 4)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": tt.RemaskPolicy.llada()}, ValueError, "policy: expected None, as drafts have a rule of their own"),
        ({"block_size": 65}, ValueError, "block_size: expected 1 to 64, got 65"),
        ({"block_size": 0}, ValueError, "block_size: expected 1 to 64, got 0"),
        ({"draft_steps": 0}, ValueError, "draft_steps: expected 1 to .*, got 0"),
        ({"draft_steps": 1.5}, TypeError, "draft_steps"),
        ({"confidence_threshold": float("nan")}, ValueError, "confidence_threshold: expected a number, got nan"),
        ({"mask_token_id": VOCAB}, ValueError, f"mask_token_id: .* {VOCAB}"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for program in (package_model().generate, lambda *a, **o: specification.generate(small_model(), *a, **o)):
        with pytest.raises(error, match=message):
            program([[5]], mode="speculative", max_new_tokens=4, **options)


def test_a_denoiser_that_says_no_numbers_is_reported() -> None:
    for steps in (1, 3):
        nothing = torch.full((1, 4, VOCAB), torch.nan, dtype=torch.float64)
        tower = package_model()
        denoising = patch.object(tower, "denoise", lambda *_, nothing=nothing: nothing)
        with denoising, pytest.raises(FloatingPointError, match="row 0"):
            tower.generate([[5]], mode="speculative", max_new_tokens=4, block_size=4, draft_steps=steps)


# --- a commit in two halves -----------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    before=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    size=st.integers(1, 64),
    data=st.data(),
    seed=st.integers(0, 99),
    isa=SETS,
    threads=THREADS,
)
def test_what_counts_is_committed(pattern, dtype, before, size, data, seed, isa, threads) -> None:  # type: ignore[no-untyped-def]
    """The state of a commit of the tokens that count, and the logits of one token after the other."""
    tower, rows = model(pattern, dtype), len(before)
    counts = [data.draw(st.integers(0, size)) for _ in before]
    prompts, block = random_ids(rows, 9, seed=seed), random_ids(rows, size, seed=seed + 1)
    with on(isa, threads):
        verification = tower.verify(block, tower.prefill(prompts, before))
        wanted = tower.commit(block, tower.prefill(prompts, before), counts)
        accepted = tower.accept(verification, counts)
        assert_same_state(accepted, list(range(rows)), wanted)
        after = block.flip(1)  # what is behind the length is dead
        assert_same_state(tower.commit(after, accepted), list(range(rows)), tower.commit(after, wanted))
        one_by_one = tower.prefill(prompts, before)
        for i in range(min(size, 6)):
            one_by_one = tower.commit(block[:, i : i + 1], one_by_one)
            assert_same_bits(verification.logits[:, i], one_by_one.logits, f"behind token {i}")


def test_a_verification_is_accepted_once_and_consumes_its_state() -> None:
    tower = model("M*E-")
    context = tower.prefill(random_ids(2, 5))
    fork = context.fork(1)
    before = fork.logits.clone()
    with pytest.raises(ValueError, match="block_ids: expected at least one token"):
        tower.verify(random_ids(2, 0), context)
    with pytest.raises(ValueError, match="expected 2 rows as the state has, got 3"):
        tower.verify(random_ids(3, 4), context)
    verification = tower.verify(random_ids(2, 4), context)
    with pytest.raises(RuntimeError, match="consumed"):
        _ = context.lengths
    for lengths in ([1], [1, 5], [-1, 2]):
        with pytest.raises(ValueError, match="lengths"):
            tower.accept(verification, lengths)
    assert tower.accept(verification, [1, 3]).lengths.tolist() == [6, 8]
    with pytest.raises(RuntimeError, match="verification: expected one that was not accepted yet"):
        tower.accept(verification, [1, 3])
    assert fork.lengths.tolist() == [5, 5] and torch.equal(fork.logits, before)
    denoiser = TwoTowerModel(tower.config, towers="denoiser")
    with pytest.raises(RuntimeError, match="context tower"):
        denoiser.verify(random_ids(2, 4), denoiser.empty_state(2))
