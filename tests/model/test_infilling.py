"""Prompts that hold masks, and processors of logits, in both programs: their definition, and that they agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.model.small_model import MASK, VOCAB, package_model, small_model
from tests.model.test_generate_package import assert_same
from twotower_kernels.model.generate import MODES
from twotower_kernels.reference import generate as specification

PROGRAMS = {
    "package": lambda prompts, **options: package_model().generate(prompts, **options),
    "specification": lambda prompts, **options: specification.generate(small_model(), prompts, **options),
}
program = pytest.mark.parametrize("run", PROGRAMS.values(), ids=PROGRAMS)
tokens = st.integers(MASK + 1, VOCAB - 1)
rows_with_masks = st.lists(st.lists(tokens | st.just(MASK), min_size=1, max_size=9), min_size=1, max_size=3)
sampling = st.sampled_from([{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}])
blocks = st.sampled_from([{"block_size": s, "steps_per_block": t} for s, t in ((1, 1), (4, 4), (5, 2), (3, 8))])
POLICIES = ("twotower", "llada", "sdar", "posterior", "first_hitting", "dream", "predict_and_noise")
ROWS = [[5, MASK, 7, MASK, MASK, 9, 4, 6], [6, 7, 8], [MASK, 10], [4, 4, MASK]]


def lists(tensors: list[Tensor]) -> list[list[Any]]:
    return [t.tolist() for t in tensors]


# --- infilling ------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    rows=rows_with_masks,
    mode=st.sampled_from(("mask_diffusion", "mask_diffusion", "mock_ar", "ar")),
    policy=st.sampled_from(POLICIES),
    sampler=sampling,
    block=blocks,
    new=st.integers(0, 7),
    eos=st.lists(tokens, max_size=3),
    seed=st.integers(0, 2**64 - 1),
)
def test_both_programs_agree(rows, mode, policy, sampler, block, new, eos, seed) -> None:  # type: ignore[no-untyped-def]
    options = {"mode": mode, "max_new_tokens": new, "eos_token_id": eos, "seed": seed, **sampler, **block}
    assert_same(rows, policy, **options)


@program
@pytest.mark.parametrize("policy", POLICIES)
def test_infilling_is_its_definition(policy: str, run: Any) -> None:
    """Row by row: what stands before the first mask is context; then come blocks, of which the given tokens stay."""
    rule, model = getattr(tt.RemaskPolicy, policy)(), small_model()
    options: dict[str, Any] = {"block_size": 4, "steps_per_block": 3, "temperature": 1.0}
    seeds = [11, 12, 13, 14]
    result = run(ROWS, policy=rule, max_new_tokens=3, seed=seeds, **options)
    for row, seed, got, nfe in zip(ROWS, seeds, lists(result.sequences), result.nfe, strict=True):
        text = row + [MASK] * 3
        begin, index, calls = text.index(MASK), 0, 0
        while begin < len(text):
            block = torch.tensor([(text[begin : begin + 4] + [MASK] * 4)[:4]])
            state = model.prefill(torch.tensor([text[:begin]], dtype=torch.int64).reshape(1, begin))
            editable, step = block == MASK, 0
            while MASK in block:
                finish = step == 4
                masked, n = (block == MASK).sum(1), max(3, step + 1)
                with torch.no_grad():
                    logits = model.denoise(block, state, rule.model_time(masked, 4, step, n))
                block = specification.remask(
                    logits,
                    block,
                    mask_token_id=MASK,
                    policy=specification.FINISH if finish else rule,
                    step=step,
                    num_steps=n,
                    temperature=1.0,
                    seed=torch.tensor([seed]),
                    offset=index,
                    editable=editable,
                    initial_num_masked=int(editable.sum()),
                ).tokens
                step += 1
            text[begin : begin + 4] = block[0].tolist()
            begin, index, calls = begin + 4, index + 1, calls + step
        assert got == text[: len(row) + 3] and nfe == calls


@program
def test_what_is_given_stays(run: Any) -> None:
    result = run(ROWS, max_new_tokens=5, block_size=4, logprobs=True)
    for row, sequence, new, scores in zip(ROWS, result.sequences, result.new_tokens, result.logprobs, strict=True):
        assert len(sequence) == len(row) + 5 and MASK not in sequence
        holes = [i for i in range(len(sequence)) if i >= len(row) or row[i] == MASK]
        assert all(sequence[i] == row[i] for i in range(len(row)) if i not in holes)
        assert new.tolist() == sequence[holes].tolist()
        assert scores.shape == new.shape and not scores.isnan().any()


@program
def test_an_end_between_given_tokens_is_a_token(run: Any) -> None:
    """Behind them it ends the row."""
    options: dict[str, Any] = {"max_new_tokens": 6, "block_size": 4}
    free = run(ROWS[:1], **options).sequences[0].tolist()
    inside, behind = free[1], free[9]
    assert inside not in free[8:], "the example no longer shows it"
    assert lists(run(ROWS[:1], eos_token_id=inside, **options).sequences) == [free]
    ended = run(ROWS[:1], eos_token_id=behind, **options)
    assert ended.finish_reason == ["eos"] and ended.sequences[0].tolist() == free[: 8 + free[8:].index(behind) + 1]


@program
def test_masks_at_the_end_are_new_tokens(run: Any) -> None:
    options: dict[str, Any] = {"block_size": 4, "temperature": 1.0, "seed": [5, 6]}
    asked = run([[5, 6], [7]], max_new_tokens=6, **options)
    filled = run([[5, 6] + [MASK] * 6, [7] + [MASK] * 6], max_new_tokens=0, **options)
    assert lists(asked.sequences) == lists(filled.sequences) and asked.nfe == filled.nfe


def test_an_interrupted_stream_keeps_what_was_given() -> None:
    stream = package_model().stream(ROWS[:1], max_new_tokens=4, block_size=4)
    next(event for event in stream if event.committed)
    stream.close()
    result = stream.result()
    assert result.sequences[0].tolist()[5:] == ROWS[0][5:] and MASK not in result.sequences[0]
    assert [len(new) for new in result.new_tokens] == [3] and result.finish_reason == ["interrupted"]


# --- the loop is the one of generate_blocks -------------------------------------------------------------------------


@settings(max_examples=20)
@given(rows=rows_with_masks, sampler=sampling, block=blocks, new=st.integers(0, 7), eos=st.lists(tokens, max_size=2))
def test_a_model_is_a_step(rows, sampler, block, new, eos) -> None:  # type: ignore[no-untyped-def]
    """`generate` is `generate_blocks` around prefill, denoise and commit."""
    model, states = package_model(), {}

    def step(tokens: Tensor, start: Tensor, of: Tensor, commit: bool) -> Tensor | None:
        if not commit:
            logits = []
            for row, ids in zip(of.tolist(), tokens, strict=True):
                state = states.setdefault(row, model.empty_state(1))
                assert int(state.lengths) == start[of.tolist().index(row)]
                t = (ids == MASK).double().mean()
                logits.append(model.denoise(ids[None], state, t[None].float()))
            return torch.cat(logits)
        for row, ids in zip(of.tolist(), tokens, strict=True):
            states[row] = model.commit(ids[None], states.setdefault(row, model.empty_state(1)))
        return None

    options = {"policy": tt.RemaskPolicy.twotower(0.5), "max_new_tokens": new, "eos_token_id": eos, **sampler, **block}
    want = model.generate(rows, **options)
    got = tt.generate_blocks(step, rows, mask_token_id=MASK, aligned=False, **options)
    assert lists(got.sequences) == lists(want.sequences)
    assert (got.nfe, got.finish_reason) == (want.nfe, want.finish_reason)


# --- processors -----------------------------------------------------------------------------------------------------


def forbidding(*forbidden: int) -> Any:
    return lambda logits, tokens, rows: logits.index_fill(2, torch.tensor(forbidden), -torch.inf)


def by_row(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """What a row likes depends on the row, the place, and what stands there."""
    places = torch.arange(tokens.shape[1])
    liked = (rows[:, None] * 7 + places + tokens.sum(1, keepdim=True)) % VOCAB
    return logits + 4 * torch.nn.functional.one_hot(liked, VOCAB)


@settings(max_examples=25)
@given(rows=rows_with_masks, mode=st.sampled_from(MODES), sampler=sampling, block=blocks, new=st.integers(0, 6))
def test_both_programs_apply_processors_alike(rows, mode, sampler, block, new) -> None:  # type: ignore[no-untyped-def]
    options = {"mode": mode, "max_new_tokens": new, "processors": [by_row, forbidding(5, 6, 7)], **sampler, **block}
    assert_same(rows, **options)


@program
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "speculative"])
def test_processors_decide_and_logprobs_are_the_models(mode: str, run: Any) -> None:
    allowed = [7, 8, 19]
    forbidden = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, torch.tensor(allowed), False)
    proposed: list[Tensor] = []

    def only_these(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        assert tokens.tolist() == [[MASK] * (4 if mode == "mask_diffusion" else 1)] * 2 and rows.tolist() == [0, 1]
        proposed.append(logits.clone())
        return logits.masked_fill_(forbidden, -torch.inf)

    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 5, "block_size": 4, "steps_per_block": 1}
    result = run([[5, 6], [9]], processors=[only_these], logprobs=True, **options)
    new, logits = torch.stack(result.new_tokens), torch.cat(proposed, 1)[:, :5]
    assert set(new.flatten().tolist()) <= set(allowed)
    if mode == "mask_diffusion":
        logits[..., MASK] = -torch.inf
    want = logits.log_softmax(-1).gather(2, new[..., None])[..., 0]
    torch.testing.assert_close(torch.stack(result.logprobs), want.float(), rtol=1e-5, atol=1e-6)


@program
@pytest.mark.parametrize("mode", MODES)
def test_processors_that_leave_logits_alone_change_nothing(mode: str, run: Any) -> None:
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 9, "block_size": 4, "temperature": 1.0}
    plain = run([[5, 6], [9]], **options)
    assert lists(run([[5, 6], [9]], processors=(lambda logits, *_: logits,) * 2, **options).sequences) == lists(
        plain.sequences
    )


@program
@pytest.mark.parametrize(
    ("processors", "message"),
    [
        (7, "processors: expected a list of callables, got int"),
        ([None], r"processors\[0\]: expected a callable, got NoneType"),
        (forbidding(5), "processors: expected a list of callables, got function"),
    ],
)
def test_wrong_processors_are_refused(processors: Any, message: str, run: Any) -> None:
    for mode in MODES:
        with pytest.raises(TypeError, match=message):
            run([[5]], mode=mode, max_new_tokens=1, processors=processors)
