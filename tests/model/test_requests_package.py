"""Requests for text: seeds, ends and logprobs of both programs; prompts, lengths and rows of every integer dtype."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.model.small_model import MASK, VOCAB, save_small_model, small_model
from twotower_kernels.generation.results import StepEvent
from twotower_kernels.model.generate import MODES
from twotower_kernels.options.generation import DRAFTING
from twotower_kernels.reference import generate as specification


@functools.cache
def package_model() -> tt.TwoTowerModel:
    with tempfile.TemporaryDirectory() as folder:
        return tt.TwoTowerModel.from_pretrained(save_small_model(Path(folder)), dtype=torch.float64)


def by_package(prompts: Any, **options: Any) -> Any:
    return package_model().generate(prompts, **options)


def by_specification(prompts: Any, **options: Any) -> Any:
    return specification.generate(small_model(), prompts, **options)


PROGRAMS = {"package": by_package, "specification": by_specification}
program = pytest.mark.parametrize("run", PROGRAMS.values(), ids=PROGRAMS)
any_mode = pytest.mark.parametrize("mode", MODES)
ROWS = [[5], [6, 7, 8], [9, 10], [6, 7, 8]]


def lists(tensors: list[Tensor]) -> list[list[Any]]:
    return [t.tolist() for t in tensors]


# --- numbers --------------------------------------------------------------------------------------------------------

NUMBERS = {
    **{"max_new_tokens": 7, "block_size": 4, "steps_per_block": 3, "draft_steps": 2, "top_k": 9, "mask_token_id": MASK},
    **{"eos_token_id": 11, "seed": 7, "temperature": 0.75, "top_p": 0.5, "confidence_threshold": 0.25},
}
OF_BLOCKS = ("block_size", "confidence_threshold", "mask_token_id")
READ_BY = dict.fromkeys(OF_BLOCKS, DRAFTING) | {"steps_per_block": ("mask_diffusion",), "draft_steps": ("speculative",)}


@program
@any_mode
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_may_be_of_any_kind(name: str, mode: str, run: Callable[..., Any]) -> None:
    value = NUMBERS[name]
    want = lists(run(ROWS, mode=mode, **NUMBERS).sequences)
    kinds = [np.uint8, np.int64] if isinstance(value, int) else [np.float16, np.float32]
    for kind in (*kinds, np.array, torch.tensor):
        assert lists(run(ROWS, mode=mode, **NUMBERS | {name: kind(value)}).sequences) == want
    for flag in (True, np.True_, "7"):
        if mode in READ_BY.get(name, MODES):
            with pytest.raises(TypeError, match=name):
                run(ROWS, mode=mode, **NUMBERS | {name: flag})


# --- seeds ----------------------------------------------------------------------------------------------------------

SAMPLED: dict[str, Any] = {"max_new_tokens": 9, "block_size": 4, "steps_per_block": 3, "temperature": 1.5}
seeds = st.integers(-(2**63), 2**64 - 1)


@pytest.mark.parametrize("run", PROGRAMS.values(), ids=PROGRAMS)
@settings(max_examples=8)
@given(mode=st.sampled_from(MODES), one=seeds, several=st.lists(seeds, min_size=4, max_size=4))
def test_a_row_is_repeated_by_its_seed(run, mode, one, several) -> None:  # type: ignore[no-untyped-def]
    """Alone, with the seed that was given for it, or with the one that follows from the request's."""
    batch = run(ROWS, mode=mode, seed=several, **SAMPLED)
    derived = run(ROWS, mode=mode, seed=one, **SAMPLED)
    for b, row in enumerate(ROWS):
        alone = run([row], mode=mode, seed=[several[b]], **SAMPLED)
        assert alone.sequences[0].tolist() == batch.sequences[b].tolist() and alone.nfe[0] == batch.nfe[b]
        again = run([row], mode=mode, seed=[tt.sequence_seed(one, b)], **SAMPLED)
        assert again.sequences[0].tolist() == derived.sequences[b].tolist()


@program
@any_mode
def test_seeds_may_come_in_any_form(mode: str, run: Callable[..., Any]) -> None:
    want = lists(run(ROWS, mode=mode, seed=[7, 8, 9, 7], **SAMPLED).sequences)
    assert want[1] != want[3] and lists(run(ROWS, mode=mode, seed=[9, 7, 9, 9], **SAMPLED).sequences)[1] == want[3]
    assert want != lists(run(ROWS, mode=mode, seed=7, **SAMPLED).sequences)
    for kind in (tuple, np.array, torch.tensor, lambda s: torch.tensor(s, dtype=torch.uint8), mixed):
        assert lists(run(ROWS, mode=mode, seed=kind([7, 8, 9, 7]), **SAMPLED).sequences) == want
    large = [2**63 + 5, 2**64 - 1, 0, 1]
    signed = [s - 2**64 if s >= 2**63 else s for s in large]
    want = lists(run(ROWS, mode=mode, seed=large, **SAMPLED).sequences)
    for same in (np.array(large, np.uint64), torch.tensor(signed), [np.uint64(s) for s in large]):
        assert lists(run(ROWS, mode=mode, seed=same, **SAMPLED).sequences) == want


def mixed(numbers: list[int]) -> list[Any]:
    return [np.int64(numbers[0]), torch.tensor(numbers[1]), *numbers[2:]]


@program
@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        ([7, 8], ValueError, "seed.* 4 rows, got 2"),
        ([], ValueError, "seed.* 4 rows, got 0"),
        (torch.arange(5), ValueError, "seed.* 4 rows, got 5"),
        ([0, 1, 2**64, 3], ValueError, "seed.* 64 bits, got 18446744073709551616"),
        ([0, 1, 2, 3.0], TypeError, "seed.* integer.*, got float"),
        ([0, 1, True, 3], TypeError, "seed.* integer.*, got bool"),
        (torch.zeros(4), TypeError, "seed.* integer.*, got float"),
        (torch.zeros(4, 1, dtype=torch.int64), TypeError, "seed.* integer.*, got (list|a tensor)"),
        (7.0, TypeError, "seed.* integer.*, got float"),
        (None, TypeError, "seed.* integer.*, got NoneType"),
    ],
)
def test_wrong_seeds_are_refused(seed: Any, error: type, message: str, run: Callable[..., Any]) -> None:
    with pytest.raises(error, match=message):
        run(ROWS, seed=seed, **SAMPLED)


# --- ends -----------------------------------------------------------------------------------------------------------


@program
@any_mode
def test_any_of_several_tokens_ends_a_row(mode: str, run: Callable[..., Any]) -> None:
    """The first one, wherever it stands in the list; its row is cut there and costs nothing more."""
    options = {**SAMPLED, "mode": mode, "max_new_tokens": 14, "seed": 3}
    free = lists(run(ROWS, **options).new_tokens)
    for ends in ([12, 5], [free[0][2], free[1][5], free[1][1]], [], list(range(VOCAB))):
        results = [run(ROWS, eos_token_id=kind(ends), **options) for kind in (list, tuple, np.array, torch.tensor)]
        if len(ends) == 1:
            results.append(run(ROWS, eos_token_id=ends[0], **options))
        for result in results if ends else [run(ROWS, eos_token_id=ends, **options)]:
            for b, new in enumerate(free):
                length = next((i + 1 for i, token in enumerate(new) if token in ends), 14)
                assert result.new_tokens[b].tolist() == new[:length]
                assert result.finish_reason[b] == ("eos" if set(new) & set(ends) else "length")
                size = 4 if mode == "mask_diffusion" else 1
                assert mode in DRAFTING or result.nfe[b] == -(-length // size)


@program
@pytest.mark.parametrize(
    ("ends", "error"),
    [([5, VOCAB], ValueError), ([-1], ValueError), ([2.0], TypeError), (2.0, TypeError), ("2", TypeError)],
)
def test_wrong_ends_are_refused(ends: Any, error: type, run: Callable[..., Any]) -> None:
    with pytest.raises(error, match="eos_token_id"):
        run(ROWS, eos_token_id=ends, **SAMPLED)


# --- logprobs -------------------------------------------------------------------------------------------------------

POLICIES = {
    "twotower": tt.RemaskPolicy.twotower(0.5),
    "llada": tt.RemaskPolicy.llada(),  # lets the mask be proposed
    "editing": tt.RemaskPolicy.llada2(0.3, min_commits=1, edit_threshold=0.2),
    "remasking": tt.RemaskPolicy.llada2(0.3, remask_threshold=0.3),
    "tempered": tt.RemaskPolicy.sdar(0.5),
    "posterior": tt.RemaskPolicy.posterior(),
}


def logprob(logits: Tensor, token: int, without: int | None = None) -> float:
    """Of one position, the plain way."""
    p = logits.detach().double().exp()
    if without is not None:
        p[without] = 0
    return float((p[token] / p.sum()).log())


@program
@pytest.mark.parametrize("policy", POLICIES)
def test_logprobs_are_of_the_step_that_wrote_the_token(
    policy: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told again from the model's calls and the events alone."""
    model: Any = package_model() if run is by_package else small_model()
    calls: list[Tensor] = []
    denoise = model.denoise

    def watched(ids: Tensor, state: Any, t: Any = None) -> Tensor:
        calls.append(denoise(ids, state, t))
        return calls[-1]

    monkeypatch.setattr(model, "denoise", watched)
    events: list[StepEvent] = []
    options = {**SAMPLED, "policy": POLICIES[policy], "top_k": 9, "seed": 2, "eos_token_id": [13, 21]}
    result = run(ROWS, logprobs=True, on_step=events.append, **options)
    current: dict[int, list[float]] = {}
    told: list[list[float]] = [[] for _ in ROWS]
    rewritten = 0
    for event in events:
        logits = None if event.committed else calls.pop(0)
        for i, row in enumerate(event.rows.tolist()):
            if event.committed:
                told[row] += current.pop(row)
                continue
            assert logits is not None
            now = current.setdefault(row, [0.0] * 4)
            before, after = event.before[i].tolist(), event.after[i].tolist()
            for s in range(4):
                if after[s] not in (before[s], MASK):
                    now[s] = logprob(logits[i, s], after[s], without=MASK)
                    rewritten += before[s] != MASK
            shown = torch.tensor([now[s] if after[s] != MASK else torch.nan for s in range(4)])
            torch.testing.assert_close(event.logprobs[i], shown, rtol=1e-5, atol=1e-6, equal_nan=True)  # type: ignore[index]
    assert (rewritten > 0) == (policy in ("editing", "remasking"))
    for got, new, want in zip(result.logprobs, result.new_tokens, told, strict=True):
        assert got.dtype == torch.float32 and got.shape == new.shape
        torch.testing.assert_close(got, torch.tensor(want)[: len(new)], rtol=1e-5, atol=1e-6)


@program
@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_logprobs_of_one_token_at_a_time(mode: str, run: Callable[..., Any]) -> None:
    """Those of the tower that proposes, the mask a token as any other; whatever temperature and filters are."""
    options = {**SAMPLED, "mode": mode, "seed": 5, "top_k": 5}
    events: list[StepEvent] = []
    result = run(ROWS, logprobs=True, on_step=events.append, **options)
    assert torch.equal(torch.cat([event.logprobs for event in events], 1), torch.stack(result.logprobs))  # type: ignore[misc]
    model = small_model()
    for row, new, got in zip(ROWS, result.new_tokens, result.logprobs, strict=True):
        assert got.dtype == torch.float32 and got.shape == new.shape
        ids = row + new.tolist()
        for i, value in enumerate(got.tolist()):
            end = len(row) + i
            past = torch.tensor([ids[:end]])
            if mode == "ar":
                logits = model.forward_ar(past)[0, -1]
            else:
                logits = model.denoise(past[:, -1:], model.prefill(past[:, :-1]), None)[0, 0]
            assert value == pytest.approx(logprob(logits, ids[end]), rel=1e-5, abs=1e-6)


@settings(max_examples=20)
@given(
    mode=st.sampled_from(MODES),
    policy=st.none() | st.sampled_from(sorted(POLICIES)),
    temperature=st.sampled_from([0.0, 0.8]),
    new=st.integers(0, 9),
    ends=st.lists(st.integers(4, VOCAB - 1), max_size=3),
    seed=seeds | st.lists(seeds, min_size=4, max_size=4),
)
def test_both_programs_agree(mode, policy, temperature, new, ends, seed) -> None:  # type: ignore[no-untyped-def]
    options = {**SAMPLED, "mode": mode, "temperature": temperature, "max_new_tokens": new, "eos_token_id": ends}
    options |= {"seed": seed, "policy": POLICIES[policy] if policy and mode != "speculative" else None}
    got, want = (run(ROWS, logprobs=True, **options) for run in PROGRAMS.values())
    assert lists(got.sequences) == lists(want.sequences) and got.finish_reason == want.finish_reason
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for run in PROGRAMS.values():
        plain = run(ROWS, **options)
        assert plain.logprobs is None and lists(plain.sequences) == lists(got.sequences)


def test_the_logprob_of_what_is_nearly_certain_or_impossible_is_exact() -> None:
    """In float32 logits, far from 0 and 1, where a probability has no digits left."""
    logits = torch.full((VOCAB,), -40.0)
    logits[7], logits[MASK] = 60.0, 300.0
    model: Any = package_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "denoise", lambda ids, state, t=None: logits.expand(*ids.shape, VOCAB))
        (sure,) = model.generate([[5]], max_new_tokens=4, block_size=4, logprobs=True).logprobs
        (second,) = model.generate([[5]], mode="mock_ar", max_new_tokens=1, logprobs=True).logprobs
        logits[7], logits[9] = 0.0, 0.0
        (half,) = model.generate([[5]], max_new_tokens=4, block_size=4, logprobs=True).logprobs
    assert sure.tolist() == [0.0] * 4 and second.tolist() == [0.0]
    assert half.tolist() == pytest.approx([-0.6931472] * 4)


@any_mode
def test_a_stream_that_is_left_has_the_logprobs_of_what_it_wrote(mode: str) -> None:
    whole = by_package(ROWS, mode=mode, logprobs=True, **SAMPLED)
    stream = package_model().stream(ROWS, mode=mode, logprobs=True, **SAMPLED)
    assert lists(stream.result().logprobs or []) == [[]] * 4
    finished = next(event for event in stream if event.committed)
    stream.close()
    result = stream.result()
    sizes = [4 if mode == "mask_diffusion" else 1] * 4 if finished.accepted is None else finished.accepted.tolist()
    assert lists(result.logprobs or []) == [row.tolist()[:n] for row, n in zip(whole.logprobs, sizes, strict=True)]


def test_nobody_pays_for_logprobs_that_were_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass over the vocabulary beside the op's own."""
    monkeypatch.setattr(Tensor, "log_softmax", lambda *_: pytest.fail("asked for"))
    for mode in MODES:
        by_package(ROWS, mode=mode, **SAMPLED)


# --- temperatures ---------------------------------------------------------------------------------------------------


@program
@any_mode
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-36, 1e-30])
def test_small_temperatures_are_greedy(temperature: float, mode: str, run: Callable[..., Any]) -> None:
    options = {**SAMPLED, "mode": mode, "top_p": 0.9}
    got, want = (run(ROWS, **options | {"temperature": t}) for t in (temperature, 0.0))
    assert lists(got.sequences) == lists(want.sequences) and got.nfe == want.nfe


@program
def test_temperatures_beyond_the_samplers_are_refused_at_once(run: Callable[..., Any]) -> None:
    for wrong in (1.1e6, 10**400, -1e-45, np.float32("nan")):
        with pytest.raises(ValueError, match="temperature"):
            run(ROWS, **SAMPLED | {"temperature": wrong, "max_new_tokens": 0})


# --- integers of every dtype -----------------------------------------------------------------------------------------

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
SHOWN: dict[str, Callable[[Tensor], Any]] = {"tensor": lambda x: x, "array": Tensor.numpy, "lists": Tensor.tolist}
shown_as = pytest.mark.parametrize("form", SHOWN)
of_dtype = pytest.mark.parametrize("dtype", DTYPES)


@program
@any_mode
@of_dtype
def test_prompts_of_every_dtype(dtype: torch.dtype, mode: str, run: Callable[..., Any]) -> None:
    want = lists(run([[5, 6], [7, 8]], mode=mode, **SAMPLED).sequences)
    ids = torch.tensor([[5, 6], [7, 8]]).to(dtype)
    for prompts in (ids, ids.numpy(), list(ids), [ids[0], ids.numpy()[1]], [list(ids.numpy()[0]), [7, 8]]):
        result = run(prompts, mode=mode, **SAMPLED)
        assert lists(result.sequences) == want and result.sequences[0].dtype == torch.int64
    wrong = torch.tensor([[5, 6], [7, 100]]).to(dtype)
    with pytest.raises(ValueError, match=r"prompts\[1\].* 100"):
        run(wrong, mode=mode, **SAMPLED)


@shown_as
@of_dtype
def test_ids_and_lengths_of_every_dtype(dtype: torch.dtype, form: str) -> None:
    model = package_model()
    ids, lengths = torch.tensor([[5, 6, 9], [7, 8, 4]]), torch.tensor([3, 1])
    as_given = [SHOWN[form](x.to(dtype)) for x in (ids, lengths)]
    assert torch.equal(model.forward_ar(as_given[0]), model.forward_ar(ids))
    state, plain = model.prefill(*as_given), model.prefill(ids, lengths)
    assert torch.equal(model.denoise(as_given[0], state, 0.5), model.denoise(ids, plain, 0.5))
    state, plain = model.commit(as_given[0], state, as_given[1]), model.commit(ids, plain, lengths)
    assert state.lengths.tolist() == [6, 2] and torch.equal(state.logits, plain.logits)
    wrong = SHOWN[form](torch.tensor([[5, 6, 100], [7, 8, 4]]).to(dtype))
    for call in (model.forward_ar, model.prefill, lambda x: model.denoise(x, state), lambda x: model.commit(x, state)):
        with pytest.raises(ValueError, match="ids: token 100 at row 0, position 2 is outside the vocabulary of 24"):
            call(wrong)
    with pytest.raises(ValueError, match=r"lengths: expected \[2\] values in 0..3, got \[3, 100\]"):
        model.prefill(ids, SHOWN[form](torch.tensor([3, 100]).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32])
def test_what_is_no_integer_is_refused_by_its_name(dtype: torch.dtype) -> None:
    model, ids, name = package_model(), torch.ones(2, 3), str(dtype).replace(".", r"\.")
    state = model.prefill(ids.long())
    for x in (ids.to(dtype), ids.to(dtype).numpy()):
        for call in (model.forward_ar, model.prefill, lambda x: model.denoise(x, state)):
            with pytest.raises(ValueError, match=rf"ids: expected integers \[B, S\], got {name} \[2, 3\]"):
                call(x)
        with pytest.raises(ValueError, match=rf"lengths: expected \[2\] integers, got {name} \[2\]"):
            model.prefill(ids.long(), x[:, 0])
        for run in PROGRAMS.values():
            with pytest.raises(TypeError, match=rf"prompts\[0\].* integers, got {name}"):
                run(x, **SAMPLED)


@shown_as
@of_dtype
def test_rows_of_every_dtype_are_indices(dtype: torch.dtype, form: str) -> None:
    """One of one byte is no mask."""
    model = package_model()
    state = model.prefill(torch.tensor([[5, 6, 9], [7, 8, 4], [6, 6, 6]]), [3, 1, 2])
    rows = torch.tensor([1, 0, 1])
    got = state.select(SHOWN[form](rows.to(dtype)))
    assert got.lengths.tolist() == [1, 3, 1] and torch.equal(got.logits, state.logits[rows])
    theirs = small_model().prefill(torch.tensor([[5, 6, 9], [7, 8, 4], [6, 6, 6]]), torch.tensor([3, 1, 2]))
    assert theirs.select(rows.to(dtype)).lengths.tolist() == [1, 3, 1]
    with pytest.raises(IndexError, match="rows: expected rows of 3, got 100"):
        state.select(SHOWN[form](torch.tensor([1, 100]).to(dtype)))


def test_masks_and_rows_from_the_end() -> None:
    state = package_model().prefill(torch.tensor([[5, 6, 9], [7, 8, 4], [6, 6, 6]]), [3, 1, 2])
    for mask in ([True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])):
        assert state.select(mask).lengths.tolist() == [3, 2]
    assert state.select(np.array([-1, 0], np.int8)).lengths.tolist() == [2, 3]
    with pytest.raises(IndexError, match="rows: expected rows of 3, got -4"):
        state.select([0, -4])
    with pytest.raises(ValueError, match="rows: expected a mask of 3 rows, got one of 2"):
        state.select([True, False])
    assert state.fork(np.uint8(2)).lengths.tolist() == [3, 3, 1, 1, 2, 2]
    for wrong in (2.0, True, None):
        with pytest.raises(TypeError, match="fork: expected a number of copies, got"):
            state.fork(wrong)  # type: ignore[arg-type]


def test_numbers_of_the_model_may_be_of_any_kind() -> None:
    model, ids = package_model(), torch.tensor([[5, 6], [7, 8]])
    state = model.empty_state(np.int64(2))  # type: ignore[arg-type]
    want = model.denoise(ids, state, 0.5)
    for t in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float16)):
        assert torch.equal(model.denoise(ids, state, t), want)  # type: ignore[arg-type]
    for wrong in (True, "0.5", [0.5, 0.5]):
        with pytest.raises(TypeError, match="t: expected a number"):
            model.denoise(ids, state, wrong)  # type: ignore[arg-type]
