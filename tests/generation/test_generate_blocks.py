"""`generate_blocks` and `stream_blocks` around a model without weights: the text, the calls and the numbers of a plain
loop over one prompt at a time, whatever shares its batch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.generation.toy_model import MASK, VOCAB, ToyModel, plain_loop
from twotower_kernels import RemaskPolicy, StepEvent

POLICIES = {
    "llada": RemaskPolicy.llada(),
    "twotower": RemaskPolicy.twotower(0.4),
    "sdar": RemaskPolicy.sdar(0.5),
    "editing": RemaskPolicy.llada2(0.3, min_commits=1, edit_threshold=0.2),
    "remasking": RemaskPolicy.llada2(0.3, remask_threshold=0.3),
    "first hitting": RemaskPolicy.first_hitting(),
    "posterior": RemaskPolicy.posterior(),
    "leftmost": RemaskPolicy.leftmost(),
    "dream": RemaskPolicy.dream("entropy"),
}
prompts = st.lists(st.integers(0, MASK - 1) | st.just(MASK), min_size=1, max_size=11)
requests = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(sorted(POLICIES)),
        "block_size": st.integers(1, 5),
        "steps_per_block": st.integers(1, 6),
        "max_new_tokens": st.integers(0, 9),
        "aligned": st.booleans(),
        "ends": st.lists(st.integers(0, MASK - 1), max_size=2),
        "sampling": st.sampled_from([{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}]),
    }
)


def arguments(request: dict[str, Any]) -> dict[str, Any]:
    """Those of `generate_blocks`."""
    others = {name: value for name, value in request.items() if name not in ("ends", "sampling", "policy")}
    rule = POLICIES[request["policy"]]
    return {**others, **request["sampling"], "eos_token_id": request["ends"], "mask_token_id": MASK, "policy": rule}


def lists(tensors: list[Tensor]) -> list[list[Any]]:
    return [t.tolist() for t in tensors]


OPTIONS: dict[str, Any] = {"policy": RemaskPolicy.llada(), "block_size": 4, "mask_token_id": MASK, "max_new_tokens": 9}
ROWS = [[5], [6, 7, 8, 9, MASK, 3, MASK], [1, 2, 3, 4]]


# --- against the plain loop -----------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    rows=st.lists(prompts, min_size=1, max_size=4), request=requests, seeds=st.lists(st.integers(0, 2**63), min_size=4)
)
def test_a_batch_is_the_plain_loop_over_each_row(rows, request, seeds) -> None:  # type: ignore[no-untyped-def]
    """Texts, logprobs, calls for every row, and reasons."""
    model, seeds = ToyModel(), seeds[: len(rows)]
    got = tt.generate_blocks(model, rows, seed=seeds, logprobs=True, **arguments(request))
    rule = {**request, "policy": POLICIES[request["policy"]]}
    for b, row in enumerate(rows):
        key = seeds[b] - 2**64 if seeds[b] >= 2**63 else seeds[b]
        want = plain_loop(row, seed=key, **rule)
        assert got.sequences[b].tolist() == want.sequence
        assert got.new_tokens[b].tolist() == want.new
        assert (got.nfe[b], got.finish_reason[b]) == (want.nfe, want.reason)
        assert model.calls.get(b, []) == want.calls
        assert got.logprobs is not None and got.logprobs[b].dtype == torch.float32
        assert got.logprobs[b].tolist() == pytest.approx(want.logprobs, rel=1e-5, abs=1e-6)


@settings(max_examples=40)
@given(row=prompts, request=requests, more=st.integers(0, 6))
def test_masks_at_the_end_are_new_tokens(row, request, more) -> None:  # type: ignore[no-untyped-def]
    options = arguments(request)
    asked = tt.generate_blocks(ToyModel(), [row], **{**options, "max_new_tokens": more})
    given_ = tt.generate_blocks(ToyModel(), [row + [MASK] * more], **{**options, "max_new_tokens": 0})
    assert lists(asked.sequences) == lists(given_.sequences) and lists(asked.new_tokens) == lists(given_.new_tokens)
    assert asked.nfe == given_.nfe and asked.finish_reason == given_.finish_reason


@settings(max_examples=40)
@given(row=prompts, request=requests, less=st.integers(0, 9))
def test_a_shorter_request_is_a_prefix(row, request, less) -> None:  # type: ignore[no-untyped-def]
    long, short = (
        tt.generate_blocks(ToyModel(), [row], **{**arguments(request), "max_new_tokens": new}).sequences[0].tolist()
        for new in (9, less)
    )
    assert short == long[: len(short)] and len(short) >= min(len(long), len(row) + less)


# --- what a step is called with -------------------------------------------------------------------------------------


def test_prompts_of_one_length_are_committed_together() -> None:
    """Shorter ones first, each with all of its whole blocks."""
    model = ToyModel()
    rows = [[1] * 9, [2] * 3, [3] * 4, [4] * 11, [5] * 7]
    tt.generate_blocks(model, rows, **{**OPTIONS, "max_new_tokens": 1})
    assert model.sizes[:3] == [(True, 2), (True, 2), (False, 5)]
    assert [model.calls[row][0] for row in (2, 4)] == [(True, 0, [3] * 4), (True, 0, [5] * 4)]
    assert [model.calls[row][0] for row in (0, 3)] == [(True, 0, [1] * 8), (True, 0, [4] * 8)]
    model = ToyModel()
    tt.generate_blocks(model, rows, aligned=False, **{**OPTIONS, "max_new_tokens": 1})
    assert [size for size in model.sizes if size[0]] == [(True, 1)] * 5


def test_a_block_that_is_given_whole_costs_nothing() -> None:
    model = ToyModel()
    events: list[StepEvent] = []
    row = [1, MASK, 3, 4, 5, 6, 7, 8, 9, MASK, 2, 2]
    result = tt.generate_blocks(model, [row], on_step=events.append, **{**OPTIONS, "max_new_tokens": 0})
    assert result.nfe == [2] and [commit for commit, _, _ in model.calls[0]] == [False, True, True, False]
    assert model.calls[0][2] == (True, 4, [5, 6, 7, 8])
    assert [(event.block, event.step) for event in events if event.committed] == [(0, 1), (1, 0), (2, 1)]
    assert result.sequences[0].tolist() == [t if t != MASK else result.sequences[0][i] for i, t in enumerate(row)]


def test_nothing_asked_costs_nothing() -> None:
    model = ToyModel()
    result = tt.generate_blocks(model, [[5], [6] * 8], **{**OPTIONS, "max_new_tokens": 0})
    assert lists(result.sequences) == [[5], [6] * 8] and result.nfe == [0, 0] and not model.sizes
    assert result.finish_reason == ["length"] * 2
    result = tt.generate_blocks(model, [[5], [6, MASK]], **{**OPTIONS, "max_new_tokens": 0})
    assert result.nfe == [0, 3] and set(model.calls) == {1}


def test_a_step_may_do_as_it_likes_with_what_it_gets() -> None:
    class Spoiling(ToyModel):
        def __call__(self, tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
            logits = super().__call__(tokens, start, rows, commit)
            for tensor in (tokens, start, rows):
                tensor.fill_(77)
            return logits

    spoiled, whole = (tt.generate_blocks(model, ROWS, **OPTIONS) for model in (Spoiling(), ToyModel()))
    assert lists(spoiled.sequences) == lists(whole.sequences)


def test_the_surroundings_are_the_callers() -> None:
    """But for gradients: autocast and inference mode reach the step."""

    class Asking(ToyModel):
        def __call__(self, *given: Any) -> Tensor | None:
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            return super().__call__(*given)

    want = tt.generate_blocks(ToyModel(), ROWS, **OPTIONS)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got = tt.generate_blocks(Asking(), ROWS, **OPTIONS)
    assert lists(got.sequences) == lists(want.sequences)
    assert not any(new.is_inference() or new.requires_grad for new in want.new_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_floating_dtype(dtype: torch.dtype) -> None:
    def step(tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
        logits = torch.zeros(*tokens.shape, VOCAB, dtype=dtype)
        logits[..., 7] = 3.0
        return None if commit else logits

    result = tt.generate_blocks(step, ROWS, logprobs=True, **OPTIONS)
    assert all(set(new.tolist()) == {7} for new in result.new_tokens)
    want = float(torch.tensor([3.0] + [0.0] * (VOCAB - 2)).log_softmax(0)[0])
    assert result.logprobs is not None
    assert torch.cat(result.logprobs).tolist() == pytest.approx(
        [want] * 29, rel=1e-2 if dtype != torch.float32 else 1e-6
    )


# --- events and streams ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(rows=st.lists(prompts, min_size=1, max_size=3), request=requests)
def test_events_tell_the_whole_story(rows, request) -> None:  # type: ignore[no-untyped-def]
    events: list[StepEvent] = []
    options = arguments(request)
    result = tt.generate_blocks(ToyModel(), rows, on_step=events.append, logprobs=True, **options)
    texts = [row + [MASK] * (options["max_new_tokens"] + options["block_size"]) for row in rows]
    nfe = [0] * len(rows)
    for event in events:
        assert event.start is not None and event.logprobs is not None
        for i, (row, start) in enumerate(zip(event.rows.tolist(), event.start.tolist(), strict=True)):
            before, after = event.before[i].tolist(), event.after[i].tolist()
            place = slice(start, start + options["block_size"])
            assert texts[row][place] == before
            texts[row][place] = after
            nfe[row] += not event.committed
            assert event.nfe[i] == nfe[row] and event.num_masked[i] == after.count(MASK)
            first = texts[row].index(MASK) if MASK in texts[row] else len(texts[row])
            assert not event.committed or first >= place.stop
            unscored = [
                s
                for s, token in enumerate(after)
                if token == MASK or (start + s < len(rows[row]) and rows[row][start + s] != MASK)
            ]
            assert event.logprobs[i].isnan().nonzero().flatten().tolist() == unscored
    assert nfe == result.nfe
    for text, sequence in zip(texts, result.sequences, strict=True):
        assert text[: len(sequence)] == sequence.tolist()


def test_a_stream_that_is_left_keeps_its_finished_blocks() -> None:
    """And what it was given behind them, masks included."""
    rows = [[5], [6, 7, 8, 9, MASK, 3, 2, 1, 4, 4, MASK]]
    whole = tt.generate_blocks(ToyModel(), rows, **OPTIONS)
    stream = tt.stream_blocks(ToyModel(), rows, **OPTIONS)
    assert isinstance(stream, tt.Stream)
    assert lists(stream.result().sequences) == rows and stream.result().finish_reason == ["interrupted"] * 2
    next(event for event in stream if event.committed)
    stream.close()
    assert list(stream) == []
    result = stream.result()
    assert result.sequences[0].tolist() == whole.sequences[0].tolist()[:4]
    assert result.sequences[1].tolist() == whole.sequences[1].tolist()[:8] + rows[1][8:]
    assert lists(result.new_tokens) == [whole.new_tokens[0].tolist()[:3], whole.new_tokens[1].tolist()[:1]]
    assert result.finish_reason == ["interrupted"] * 2


def test_ctrl_c_inside_a_step_keeps_finished_blocks() -> None:
    whole = tt.generate_blocks(ToyModel(), ROWS, **OPTIONS)

    class Interrupted(ToyModel):
        def __call__(self, tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
            if commit and len(rows) == 3:
                raise KeyboardInterrupt
            return super().__call__(tokens, start, rows, commit)

    stream = tt.stream_blocks(Interrupted(), ROWS, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        stream.run()
    result = stream.result()
    assert [len(new) for new in result.new_tokens] == [3, 3, 4]
    assert all(
        new.tolist() == all_.tolist()[: len(new)] for new, all_ in zip(result.new_tokens, whole.new_tokens, strict=True)
    )


def test_the_arguments_of_both_are_the_same() -> None:
    stream, generate = (inspect.signature(f).parameters for f in (tt.stream_blocks, tt.generate_blocks))
    assert {**stream, "on_step": generate["on_step"]} == dict(generate)
    models = inspect.signature(tt.TwoTowerModel.stream).parameters
    for name in set(stream) & set(models) - {"policy", "block_size", "mask_token_id", "steps_per_block"}:
        assert stream[name] == models[name]


# --- processors -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    rows=st.lists(prompts, min_size=1, max_size=3), request=requests, allowed=st.sets(st.integers(0, 11), min_size=1)
)
def test_processors_decide_what_may_be_written(rows, request, allowed) -> None:  # type: ignore[no-untyped-def]
    """As in the plain loop, by one that allows some tokens and one that writes to what it gets; logprobs are the
    model's own."""
    forbidden = [token for token in range(VOCAB) if token not in allowed]

    def guided(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        return logits.index_fill(2, torch.tensor(forbidden), -torch.inf)

    def penalised(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        return logits.sub_(torch.zeros_like(logits[:, 0]).scatter(1, tokens, 1.5)[:, None])

    def plainly(logits: Tensor, block: list[int]) -> Tensor:
        logits[:, sorted(set(block))] -= 1.5
        logits[:, forbidden] = -torch.inf
        return logits

    seeds = list(range(len(rows)))
    options = arguments(request) | {"seed": seeds, "logprobs": True}
    got = tt.generate_blocks(ToyModel(), rows, processors=(penalised, guided), **options)
    rule = {**request, "policy": POLICIES[request["policy"]]}
    for b, row in enumerate(rows):
        want = plain_loop(row, seed=b, processor=plainly, **rule)
        assert got.sequences[b].tolist() == want.sequence and set(got.new_tokens[b].tolist()) <= allowed
        assert got.logprobs is not None
        assert got.logprobs[b].tolist() == pytest.approx(want.logprobs, rel=1e-5, abs=1e-6)


def test_processors_are_told_rows_and_blocks() -> None:
    """In the order given, each with copies."""
    told: list[tuple[list[int], list[list[int]]]] = []

    def note(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        told.append((rows.tolist(), tokens.tolist()))
        tokens.fill_(0), rows.fill_(9)
        return logits + 1

    def follow(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        assert (rows.tolist(), tokens.tolist()) == told[-1]
        return logits - 1

    events: list[StepEvent] = []
    result = tt.generate_blocks(ToyModel(), ROWS, processors=[note, follow], on_step=events.append, **OPTIONS)
    assert told == [(event.rows.tolist(), event.before.tolist()) for event in events if not event.committed]
    assert lists(result.sequences) == lists(tt.generate_blocks(ToyModel(), ROWS, **OPTIONS).sequences)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda logits: None,
            TypeError,
            r"processors\[1\]: expected floating logits \[3, 4, 13\] on cpu, got NoneType",
        ),
        (lambda logits: logits.long(), TypeError, r"processors\[1\]: .* torch.int64"),
        (lambda logits: logits[:, :, 1:], ValueError, r"processors\[1\]: .* got .*\[3, 4, 12\]"),
        (lambda logits: logits.to("meta"), ValueError, r"processors\[1\]: .* on meta"),
        (lambda logits: logits * torch.nan, FloatingPointError, "logits: .* row 0"),
    ],
)
def test_wrong_processors_are_refused(returned: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        wrong = [lambda logits, *_: logits, lambda logits, *_: returned(logits)]
        tt.generate_blocks(ToyModel(), ROWS, processors=wrong, **OPTIONS)


# --- errors ---------------------------------------------------------------------------------------------------------


class Wrong(ToyModel):
    """Returns something else, from the second un-masking call on."""

    def __init__(self, logits: Any = lambda logits: logits, committed: Any = None) -> None:
        super().__init__()
        self.wrong, self.committed, self.denoised = logits, committed, 0

    def __call__(self, tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Any:
        logits = super().__call__(tokens, start, rows, commit)
        if commit:
            return self.committed
        self.denoised += 1
        return logits if self.denoised == 1 else self.wrong(logits)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Wrong(lambda _: None), TypeError, r"step: expected floating logits \[3, 4, 13\] on cpu, got NoneType"),
        (Wrong(lambda logits: [logits]), TypeError, "step: .* got list"),
        (Wrong(lambda logits: logits.long()), TypeError, "step: .* got a tensor torch.int64"),
        (Wrong(lambda logits: logits[0]), ValueError, r"step: .* got .*\[4, 13\]"),
        (Wrong(lambda logits: logits[:1]), ValueError, r"step: .* got .*\[1, 4, 13\]"),
        (Wrong(lambda logits: logits[:, 1:]), ValueError, r"step: .* got .*\[3, 3, 13\]"),
        (Wrong(lambda logits: logits[..., 1:]), ValueError, r"step: .* got .*\[3, 4, 12\]"),
        (Wrong(lambda logits: logits.to("meta")), ValueError, r"step: .* on cpu, got .* on meta"),
        (Wrong(lambda logits: logits * torch.nan), FloatingPointError, "logits: .* NaN or infinity in row 0"),
        (Wrong(committed=torch.zeros(1)), TypeError, r"step: expected None where commit is True, got a tensor"),
        (3, TypeError, "step: expected a callable, got int"),
    ],
)
def test_a_wrong_step_is_reported(model: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tt.generate_blocks(model, ROWS, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[5], [VOCAB]]}, f"prompts: expected tokens of a vocabulary of {VOCAB}, got {VOCAB}"),
        ({"mask_token_id": VOCAB}, f"mask_token_id: .* {VOCAB}, got {VOCAB}"),
        ({"eos_token_id": [2, VOCAB]}, f"eos_token_id: .* {VOCAB}, got {VOCAB}"),
        ({"top_k": VOCAB + 1}, f"top_k: .* {VOCAB}, got {VOCAB + 1}"),
    ],
)
def test_what_the_first_logits_tell_is_checked_then(change: dict[str, Any], message: str) -> None:
    stream = tt.stream_blocks(
        lambda tokens, *_: torch.zeros(*tokens.shape, VOCAB), **{"prompts": [[5]], **OPTIONS, **change}
    )
    with pytest.raises(ValueError, match=message):
        next(stream)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, ValueError, "prompts: expected at least one row"),
        ({"prompts": [[5], []]}, ValueError, r"prompts\[1\]: expected one token or more"),
        ({"prompts": [[-1]]}, ValueError, r"prompts\[0\]: expected tokens, 0 or more, got -1"),
        ({"prompts": [[0.5]]}, TypeError, r"prompts\[0\]: expected integers"),
        ({"block_size": 0}, ValueError, "block_size: .* 0"),
        ({"steps_per_block": 0}, ValueError, "steps_per_block: .* 0"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: .* -1"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id: .* -1"),
        ({"mask_token_id": None}, TypeError, "mask_token_id: expected a token, got None"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id: .* -1"),
        ({"policy": None}, TypeError, "policy: expected a RemaskPolicy, got NoneType"),
        ({"policy": "llada"}, TypeError, "policy: expected a RemaskPolicy, got str"),
        ({"policy": RemaskPolicy.diffusion_gemma()}, ValueError, "policy: .* renoise"),
        ({"seed": [1, 2]}, ValueError, "seed: .* 3 rows, got 2"),
        ({"seed": 2**64}, ValueError, "seed: .* 64 bits"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"processors": 3}, TypeError, "processors: expected a list of callables, got int"),
        ({"processors": [3]}, TypeError, r"processors\[0\]: expected a callable, got int"),
        ({"processors": lambda *given: given[0]}, TypeError, "processors: expected a list of callables, got function"),
        ({"aligned": 1}, TypeError, "aligned: expected True or False, got 1"),
    ],
)
def test_bad_input_is_named_at_once(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tt.stream_blocks(**{"step": ToyModel(), "prompts": ROWS, **OPTIONS, **change})
