"""The remasking kernel: against the specification on every instruction set, dtype, layout and policy; registration."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, instruction_set
from tests.kernels.remask_cases import assert_step_agrees
from twotower_kernels.bench.checks.operations import check_draws
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import philox
from twotower_kernels.reference.remask import CASES, make_inputs, remask
from twotower_kernels.testing.cases.remask import MASK, row_numbers, steps
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward

SMALL = [case for case in CASES["remask"] if not case.startswith("released")]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SMALL)
def test_every_case_on_every_instruction_set(case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            assert_step_agrees(make_inputs("remask", case, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}])
def test_a_vocabulary_of_several_pieces(options: dict[str, Any], isa: str) -> None:
    """Positions are cut into pieces of 16384 tokens, the last of which is a part of a stretch."""
    case = dict(batch=1, block=3, vocab=40003, num_steps=3, seed=4, **options)
    for policy in (RemaskPolicy.twotower(0.8), RemaskPolicy.dream("margin")):
        inputs = make_inputs("remask", {**case, "policy": policy})
        inputs["logits"][0, 1, 39999:] = inputs["logits"].max() + 1  # ties at the end: the first of them is proposed
        with instruction_set(isa):
            assert_step_agrees(inputs)


def test_threads_change_no_bit() -> None:
    inputs = make_inputs("remask", dict(batch=2, block=3, vocab=40003, temperature=0.9, seed=1))
    inputs |= {"top_p": torch.tensor([1.0, 0.9])}
    alone = tt.remask(**inputs)
    torch.set_num_threads(3)
    try:
        together = tt.remask(**inputs)
    finally:
        torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@settings(max_examples=100)
@given(inputs=steps(), isa=st.sampled_from(EVERY_ISA), layout=st.integers(0, 3))
def test_any_step(inputs: dict[str, Any], isa: str, layout: int) -> None:
    with instruction_set(isa):
        assert_step_agrees(inputs, layout=layout)


@settings(max_examples=30)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**40),
    temperature=st.sampled_from([0.02, 0.7, 1.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
)
def test_the_draws_are_those_of_the_specification(seed, offset, step, temperature, dtype, isa):  # type: ignore[no-untyped-def]
    """Token for token; and on flat logits the candidate is the token with the smallest word, whose noise is largest."""
    generator = torch.Generator().manual_seed(seed)
    logits = (0.3 * torch.randn(1, 4, 2000, generator=generator)).to(dtype)
    tokens = torch.full((1, 4), MASK)
    options = dict(mask_token_id=MASK, num_steps=step + 2, step=step, seed=seed, offset=offset, temperature=temperature)
    with instruction_set(isa):
        got = tt.remask(logits, tokens, **options)
    assert got.candidate.equal(remask(logits, tokens, **options).candidate)
    flat = torch.zeros(1, 4, 2000)
    numbers = [torch.tensor([x]) for x in (seed, offset, step)]
    words = philox.vocabulary_words(*numbers, 4, 2000).index_fill(2, torch.tensor([MASK]), 2**32)
    with instruction_set(isa):
        assert tt.remask(flat, tokens, **options).candidate.equal(words.argmin(-1))


@pytest.mark.parametrize("alpha", ["linear", "cosine", "exponential", "sine", "cosine_floor"])
@pytest.mark.parametrize("schedule", ["posterior", "coin", "truncated"])
def test_the_end_of_a_schedule(alpha: str, schedule: str) -> None:
    """There a(t) is 0 or 1 but for the last digit of a cosine, and what leaves is all or nothing."""
    for long_grid in (False, True):
        policy = RemaskPolicy(schedule=schedule, alpha=alpha, long_grid=long_grid, statistics="filtered")
        sizes = dict(batch=3, block=4, vocab=9, num_steps=2, temperature=1.0, policy=policy)
        for step in (0, 1, 2):
            assert_step_agrees(make_inputs("remask", sizes | {"step": torch.full((3,), step)}))


def test_known_answers_of_philox() -> None:
    """Random123's answers for counter and key all zero: on flat logits the smallest word wins."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # tokens 0 to 3 at position 0, step 0, offset 0
    order = sorted(range(4), key=lambda token: words[token])
    for isa in ISAS:
        taken: list[int] = []
        for token in order[:3]:
            with instruction_set(isa):
                result = tt.remask(
                    torch.zeros(1, 1, 5),
                    torch.full((1, 1), 4),
                    mask_token_id=4,
                    suppress_ids=taken,
                    temperature=1.0,
                )
            assert result.candidate.item() == token
            taken.append(token)


def test_extreme_logits() -> None:
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        logits = torch.full((1, 4, 600), -torch.inf, dtype=dtype)
        logits[0, 0, 7], logits[0, 0, 8] = most, -most
        logits[0, 1, 599] = -most
        logits[0, 2, :] = most
        logits[0, 3, 10:12] = torch.finfo(dtype).tiny
        for options in ({}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1e6, "top_p": 0.5}):
            inputs = dict(logits=logits, tokens=torch.full((1, 4), MASK), mask_token_id=MASK, num_steps=3, **options)
            assert_step_agrees(inputs)
    assert result_of_certainty().entropy.tolist() == [[0.0]]


def result_of_certainty() -> tt.RemaskResult:
    logits = torch.full((1, 1, 700), -torch.inf)
    logits[0, 0, 650] = 1.0
    return tt.remask(logits, torch.full((1, 1), MASK), mask_token_id=MASK)


JUDGES = [RemaskPolicy.llada2(0.6, edit_threshold=0.9, remask_threshold=0.5), RemaskPolicy.diffusion_gemma()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -50.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_is_found_wherever_it_lies(sign: int, shift: float, dtype: torch.dtype) -> None:
    """Of either sign, in any stretch of a long row, beside logits of both signs and beside negative ones alone."""
    places = [0, 2047, 2048, 5000, 9000, 16384, 16999, 23999]
    logits = (torch.randn(1, len(places) + 1, 24000, generator=torch.Generator().manual_seed(1)) + shift).to(dtype)
    quiet = {torch.float32: (torch.int32, 22), torch.bfloat16: (torch.int16, 6), torch.float16: (torch.int16, 9)}
    integer, bit = quiet[dtype]  # the lowest that is set in a NaN without a payload
    bits = torch.tensor(-(2**bit) if sign < 0 else torch.iinfo(integer).max - 2**bit + 1, dtype=integer)
    assert bits.view(dtype).isnan() and bits.view(dtype).signbit() == (sign < 0)
    for s, token in enumerate(places):
        logits.view(integer)[0, s, token] = bits
    tokens = torch.full((1, len(places) + 1), MASK)
    got = tt.remask(logits, tokens, mask_token_id=MASK, num_steps=4, policy=RemaskPolicy(suppress_mask=False))
    assert got.candidate[0, :-1].eq(-1).all() and got.confidence[0, :-1].isnan().all()
    assert got.candidate[0, -1] == logits[0, -1].float().argmax() and got.confidence[0, -1] > 0


@pytest.mark.parametrize("policy", [RemaskPolicy(), *JUDGES])
def test_rows_that_are_not_looked_at_are_not_read(policy: RemaskPolicy) -> None:
    """Committed positions, unless the policy judges them, fixed and padded ones may hold anything; suppressed tokens
    too."""
    case = dict(
        batch=3, block=6, vocab=70, masked=0.5, num_steps=3, policy=dataclasses.replace(policy, suppress_mask=True)
    )
    inputs = make_inputs("remask", case)
    inputs |= {"editable": torch.rand(3, 6) < 0.8, "valid_lens": torch.tensor([6, 4, 0]), "suppress_ids": [9]}
    clean = tt.remask(**inputs)
    looked = inputs["editable"] & (torch.arange(6) < inputs["valid_lens"][:, None])
    if policy not in JUDGES:
        looked &= inputs["tokens"] == MASK
    assert clean.candidate.ge(0).equal(looked)
    inputs["logits"][~looked] = torch.nan
    inputs["logits"][..., 9] = math.inf
    inputs["logits"][..., MASK] = torch.nan
    assert all(a.equal(b) for a, b in zip(tt.remask(**inputs), clean, strict=True))


TINY = [5e-324, 1e-50, 1.4e-45, 1e-39, 1e-36, 2e-36, 1e-33, 1e-30]  # as floats 0, subnormal, with an infinite inverse
EXTREME_TEMPERATURES = [-0.0, *TINY, 1e-9, 1e6]
EXTREME_POLICIES = [RemaskPolicy.dream("entropy"), RemaskPolicy.twotower(0.8), RemaskPolicy.posterior()]


@pytest.mark.parametrize("temperature", EXTREME_TEMPERATURES)
def test_extreme_temperatures(temperature: float) -> None:
    for policy in EXTREME_POLICIES:
        sizes = dict(batch=2, block=3, vocab=70, num_steps=3, seed=3, policy=policy)
        for filters in ({}, {"top_p": 0.9}, {"top_k": 5}):
            for scale in (1.0, 1e4):  # z / T is a number, or too large for one
                inputs = make_inputs("remask", sizes | filters | {"temperature": temperature})
                assert_step_agrees(inputs | {"logits": scale * inputs["logits"]})


@pytest.mark.parametrize("isa", ISAS)
def test_small_temperatures_are_greedy(isa: str) -> None:
    """Each row its own; a certain token is drawn and has the probability 1, one of two equal ones a half."""
    with instruction_set(isa):
        for dtype in DTYPES:
            assert_small_temperatures_are_greedy(dtype)


def assert_small_temperatures_are_greedy(dtype: torch.dtype) -> None:
    sizes = dict(batch=len(TINY), block=4, vocab=20011, num_steps=3, seed=torch.arange(len(TINY)))
    inputs = make_inputs("remask", sizes | {"policy": RemaskPolicy(statistics="filtered")}, dtype=dtype)
    logits = inputs["logits"]
    logits[:, 0] -= 2 * logits[:, 0].amax(-1, keepdim=True)  # all below zero
    logits[:, 1] *= 1e3
    logits[:, 2, -3:-1] = 60.0  # in the last piece
    logits[:, 3] = -torch.inf
    logits[:, 3, 17] = torch.finfo(dtype).max
    greedy = tt.remask(**inputs)
    assert greedy.candidate[:, 2:].eq(torch.tensor([20011 - 3, 17])).all()
    for rows in (TINY, TINY[::-1]):
        got = assert_step_agrees(inputs | {"temperature": torch.tensor(rows, dtype=torch.float64)})
        assert got.candidate.equal(greedy.candidate)
        assert got.confidence.equal(torch.tensor([1.0, 1.0, 0.5, 1.0]).to(got.confidence.dtype).expand(len(rows), 4))


@pytest.mark.parametrize("isa", ISAS)
def test_a_temperature_that_falls_to_nothing(isa: str) -> None:
    policy = RemaskPolicy(temperature_end=0.0, statistics="filtered")
    inputs = make_inputs("remask", dict(batch=2, block=3, vocab=70, num_steps=4, temperature=1e-35, policy=policy))
    for step in range(4):  # in step 4 it would be 0
        with instruction_set(isa):
            got = assert_step_agrees(inputs | {"step": step})
        assert got.candidate.equal(inputs["logits"].argmax(-1)) and got.confidence.eq(1).all()


# --- registration ---------------------------------------------------------------------------------------------------


def op_arguments(layout: str, rows: bool, policy: tt.RemaskPolicy) -> tuple[Any, ...]:
    inputs = make_inputs("remask", dict(batch=2, block=5, vocab=40, masked=0.7), seed=2)
    logits, tokens = inputs["logits"], inputs["tokens"]
    if layout == "permuted":
        logits, tokens = awkward(logits, 2), awkward(tokens, 3)
    numbers: dict[str, Any] = row_numbers(torch.Generator().manual_seed(1), 2, 5, 40) if rows else {}
    names = ("step", "num_steps", "top_k", "seed", "offset", "initial_num_masked", "temperature", "top_p", "gate_bound")
    return (
        logits,
        tokens,
        MASK,
        *policy.encoded(),
        [0, 3, 0, 7, 0, -1],
        [0.8, 0.9, 0.5],
        *(numbers.get(name) for name in names),
        [4],
        torch.tensor([5, 6]) if rows else None,
        [],
        None,
        torch.rand(2, 5) < 0.9 if rows else None,
        numbers.get("valid_lens"),
        torch.full((2, 5), -1) if rows else None,
        torch.rand(2, 5) if rows else None,
        int(rows),
        torch.randn(2, 40) if rows else None,
    )


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_registration(layout: str, rows: bool) -> None:
    for policy in (tt.RemaskPolicy.twotower(), tt.RemaskPolicy.dream("margin")):
        torch.library.opcheck(torch.ops.twotower.remask.default, op_arguments(layout, rows, policy))


def test_compiles_without_a_break() -> None:
    inputs = make_inputs("remask", "sampled")
    policy = tt.RemaskPolicy.twotower()

    def call(logits, tokens, step):  # type: ignore[no-untyped-def]
        options = dict(temperature=0.7, seed=3, suppress_ids=[5], step=step, num_steps=8)
        return tuple(tt.remask(logits, tokens, mask_token_id=MASK, policy=policy, **options))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for step in (torch.tensor([1, 2]), 3):
        want = call(inputs["logits"], inputs["tokens"], step)
        got = compiled(inputs["logits"], inputs["tokens"], step)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_draws_follow_the_softmax() -> None:
    check_draws("cpu")
