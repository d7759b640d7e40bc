"""The CUDA C++ kernels of remasking, run on a host: the CPU kernel's demands, and what is peculiar to them."""

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels import test_remask_kernel as cpu_tests
from tests.kernels.remask_cases import assert_step_agrees
from tests.replay_policies import implementation, replay
from tests.simt.overlay import cuda_kernels
from tests.specification import test_policies
from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda import remask as cuda_remask
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.remask import CASES, make_inputs
from twotower_kernels.testing.cases.remask import MASK, steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in CASES["remask"] if not case.startswith("released")]


def narrowed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a step without float64 logits, which the GPU refuses."""
    logits = inputs["logits"]
    wide = ("logits", "shift_logits") if logits.dtype == torch.float64 else ()
    return inputs | {name: inputs[name].float() for name in wide if name in inputs}


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("case", SMALL)
def test_every_case(case: str, build: str) -> None:
    with cuda_kernels(build=build):
        for dtype in DTYPES:
            assert_step_agrees(make_inputs("remask", case, dtype=dtype))


@settings(max_examples=200)
@given(inputs=steps().map(narrowed), layout=st.integers(0, 3))
def test_any_step(inputs: dict[str, Any], layout: int) -> None:
    with cuda_kernels():
        assert_step_agrees(inputs, layout=layout)


def test_scores_that_float32_cannot_tell_apart() -> None:
    """Nearly flat logits, whose entropies differ by less than the specification rounds: found by `make fuzz`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 515, generator=generator)
    favourite = torch.randint(0, 515, (2, 5, 1), generator=generator)
    logits = 0.01 * logits.scatter_add(2, favourite, 8 * torch.rand(2, 5, 1, generator=generator))
    tokens = torch.randint(0, 515, (2, 5), generator=generator)
    options = dict(suppress_mask=False, score="neg_entropy", schedule="none", min_commits=2, finish=False, renoise=True)
    inputs = dict(logits=logits, tokens=tokens, mask_token_id=MASK, policy=RemaskPolicy(**options))
    with cuda_kernels():
        assert_step_agrees(inputs)


@settings(max_examples=60)
@given(inputs=steps().map(narrowed), layout=st.integers(0, 3))
def test_any_step_whose_places_lie_in_scratch(inputs: dict[str, Any], layout: int) -> None:
    with cuda_kernels(), patch.object(cuda_remask, "_LONGEST", 0):
        assert_step_agrees(inputs, layout=layout)


RARE: dict[str, dict[str, Any]] = {
    "posterior": dict(schedule="posterior", suppress_mask=True, rank_temperature=0.0),
    "uniform": dict(
        **dict(schedule="uniform", renoise=True, renoise_as="random", standing=False, rank_temperature=0.0),
        **dict(edit_threshold=None, remask_threshold=None),
    ),
    "corrupt": dict(schedule="corrupt", renoise=True, standing=True, edit_threshold=None, remask_threshold=None),
    "editing": dict(
        schedule="even", standing=False, renoise_as="random", renoise=False, edit_threshold=0.5, remask_threshold=0.3
    ),
    "renoise": dict(renoise=True, edit_threshold=None, remask_threshold=None),
}


@pytest.mark.parametrize("rule", RARE)
@settings(max_examples=100)
@given(inputs=steps().map(narrowed), layout=st.integers(0, 3))
def test_any_step_of_a_rare_rule(rule: str, inputs: dict[str, Any], layout: int) -> None:
    """One that few random policies have; also as the CPU has it."""
    inputs = inputs | {"policy": dataclasses.replace(inputs["policy"], **RARE[rule])}
    with cuda_kernels():
        got = assert_step_agrees(inputs, layout=layout)
    for a, b in zip(got, tt.remask(**inputs), strict=True):
        assert a.is_floating_point() or a.equal(b)


@settings(max_examples=40)
@given(inputs=steps().map(narrowed), layout=st.integers(0, 3))
def test_any_step_is_free_of_races(inputs: dict[str, Any], layout: int) -> None:
    with cuda_kernels(build="race"):
        assert_step_agrees(inputs, layout=layout)


@pytest.mark.parametrize("name", test_policies.CASES)
def test_recorded_steps_come_out(name: str) -> None:
    with cuda_kernels():
        assert replay(test_policies.CASES[name], implementation("package")) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1024, 3072, 17001])
def test_vocabularies_of_whole_vectors_and_of_several_pieces(vocab: int, dtype: torch.dtype) -> None:
    """Aligned rows of one warp, of three and of three pieces, the last of which is a part of one; then the same out of
    a larger array, with its rows or everything stored the other way round."""
    options = dict(temperature=torch.tensor([0.0, 1.0]), top_p=torch.tensor([1.0, 0.9]), suppress_ids=[5, vocab - 1])
    case = dict(batch=2, block=2, vocab=vocab, num_steps=3, seed=4, policy=RemaskPolicy.dream("margin"), **options)
    inputs = make_inputs("remask", case, dtype=dtype)
    inputs["logits"][0, 1, -9:] = inputs["logits"].max() + 1  # ties at the end: the first of them is proposed
    with cuda_kernels():
        for layout in range(4):
            assert_step_agrees(inputs, layout=layout)


@pytest.mark.parametrize("given_before", [False, True])
def test_shifted_logits_of_several_pieces(given_before: bool) -> None:
    case = dict(batch=2, block=3, vocab=17001, num_steps=3, temperature=0.9, top_p=0.9, policy=RemaskPolicy.dream())
    inputs = make_inputs("remask", case) | {"shift": 1}
    if given_before:
        inputs["shift_logits"] = torch.randn(2, 17001).mul(4)
    with cuda_kernels():
        for layout in range(4):
            assert_step_agrees(inputs, layout=layout)


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.7}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_posterior_over_several_pieces(temperature: float, filters: dict[str, Any]) -> None:
    """The mask's chance hangs on sums over all pieces, and on whether the filter keeps it."""
    case = dict(batch=3, block=4, vocab=17001, num_steps=4, temperature=temperature, policy=RemaskPolicy.posterior())
    inputs = make_inputs("remask", case | filters) | {"step": torch.tensor([1, 2, 3])}
    inputs["logits"] *= 3  # else the many others outweigh the best
    with cuda_kernels():
        left = [assert_step_agrees(inputs | {"seed": seed}).num_masked for seed in range(3)]
    assert 0 < sum(left)[:2].sum() <= 24 and not sum(left)[2]  # the last step leaves none


@pytest.mark.parametrize("statistics", ["raw", "filtered"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.7}])
def test_a_mask_that_is_certain_stays(filters: dict[str, Any], statistics: str) -> None:
    """Nothing moves in the last step of this schedule: the mask's logit is infinite, and no nucleus has a token."""
    policy = dataclasses.replace(RemaskPolicy.posterior("cosine_floor", long_grid=True), statistics=statistics)
    case = dict(batch=2, block=4, vocab=70, step=3, num_steps=4, temperature=0.8, policy=policy)
    with cuda_kernels():
        assert assert_step_agrees(make_inputs("remask", case | filters)).num_masked.tolist() == [4, 4]


def test_every_sequence_has_its_own_scratch() -> None:
    """The executor runs one block after the other, so that shared scratch would not be seen in the results."""
    found = []

    def spy(kernel: cuda.Kernel, grid: int, block: int, shared: int, arguments: Any, **options: Any) -> None:
        if kernel.name == "remask_select_kernel":
            *_, scratch, _ = arguments
            found.append(scratch.fill_(-1))
        launch(kernel, grid, block, shared, arguments, **options)

    with cuda_kernels(), patch.object(cuda_remask, "_LONGEST", 0):
        launch = cuda.launch
        with patch.object(cuda, "launch", spy):
            tt.remask(**make_inputs("remask", "tiny"))
    assert found[0].shape == (2, 36) and found[0].ne(-1).sum(1).ge(30).all()


def test_long_vocabularies_with_a_filter_are_free_of_races() -> None:
    options = dict(temperature=0.9, top_k=60, top_p=0.9, suppress_ids=[5, 8999], confidence_suppress_ids=[6])
    with cuda_kernels(build="race"):
        assert_step_agrees(make_inputs("remask", dict(batch=1, block=2, vocab=9000, num_steps=3, seed=4, **options)))


@settings(max_examples=40)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**40),
    temperature=st.sampled_from([0.02, 0.7, 1.0, 5.0]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from([tt.RemaskPolicy(), tt.RemaskPolicy.posterior(), tt.RemaskPolicy.diffusion_gemma()]),
)
def test_the_draws_are_the_cpus(seed, offset, step, temperature, spread, dtype, policy):  # type: ignore[no-untyped-def]
    """Of candidates; of the positions that the posterior leaves, half of them here; of the tokens that are noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(1, 4, 2000, generator=generator)).to(dtype)
    options = dict(mask_token_id=MASK, num_steps=step + 2, step=step, seed=seed, offset=offset, temperature=temperature)
    tokens = torch.full((1, 4), MASK)
    with cuda_kernels():
        got = tt.remask(logits, tokens, policy=policy, **options)
    want = tt.remask(logits, tokens, policy=policy, **options)
    assert got.candidate.equal(want.candidate) and got.tokens.equal(want.tokens)


@pytest.mark.parametrize("alpha", ["cosine", "sine"])
def test_the_end_of_a_schedule(alpha: str) -> None:
    with cuda_kernels():
        cpu_tests.test_the_end_of_a_schedule(alpha, "posterior")


def test_known_answers_of_philox() -> None:
    with cuda_kernels():
        cpu_tests.test_known_answers_of_philox()


@pytest.mark.parametrize("policy", [RemaskPolicy(), *cpu_tests.JUDGES])
def test_rows_that_are_not_looked_at_are_not_read(policy: RemaskPolicy) -> None:
    with cuda_kernels():
        cpu_tests.test_rows_that_are_not_looked_at_are_not_read(policy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    logits = torch.full((1, 4, 600), -torch.inf, dtype=dtype)
    logits[0, 0, 7], logits[0, 0, 8] = most, -most
    logits[0, 1, 599] = -most
    logits[0, 2, :] = most
    logits[0, 3, 10:12] = torch.finfo(dtype).tiny
    with cuda_kernels():
        for options in ({}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1e6, "top_p": 0.5}):
            inputs = dict(logits=logits, tokens=torch.full((1, 4), MASK), mask_token_id=MASK, num_steps=3, **options)
            assert_step_agrees(inputs)
        assert cpu_tests.result_of_certainty().entropy.tolist() == [[0.0]]


@pytest.mark.parametrize("temperature", [*cpu_tests.EXTREME_TEMPERATURES, 1e-3])
def test_extreme_temperatures(temperature: float) -> None:
    with cuda_kernels():
        cpu_tests.test_extreme_temperatures(temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_temperatures_are_greedy(dtype: torch.dtype) -> None:
    with cuda_kernels():
        cpu_tests.assert_small_temperatures_are_greedy(dtype)


def test_a_row_alone_gets_the_same_bits() -> None:
    case = dict(batch=3, block=4, vocab=9000, num_steps=3, policy=RemaskPolicy.dream("entropy"), seed=torch.arange(3))
    inputs = make_inputs("remask", dict(case, temperature=torch.tensor([0.0, 1.0, 0.7]), top_k=30))
    with cuda_kernels():
        together = tt.remask(**inputs)
        for b in range(3):
            cut = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            alone = tt.remask(**cut)
            assert all(x[b].equal(y[0]) for x, y in zip(together, alone, strict=True))


def test_values_out_of_range_do_no_harm() -> None:
    """A GPU does not look at them beforehand; every write stays within its array."""
    inputs = make_inputs("remask", dict(batch=2, block=4, vocab=50, temperature=1.0))
    inputs |= {
        "policy": tt.RemaskPolicy.llada(),
        "candidates": torch.full((2, 4), 50),
        "suppress_ids": torch.tensor([-1, 50, 7]),
        "valid_lens": torch.tensor([9, -3]),
    }
    with cuda_kernels():
        got = tt.remask(**inputs)
    assert got.candidate[0].ge(0).all() and got.candidate[1].eq(-1).all()


# --- the launcher -----------------------------------------------------------------------------------------------------


def launches(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[Any, ...]]:
    """What is launched for tensors without data, from which nothing can be read."""
    made: list[tuple[Any, ...]] = []

    def launch(kernel: cuda.Kernel, grid: int, block: int, shared: int, arguments: Any, **_: Any) -> None:
        made.append((kernel.name, dict(kernel.defines), grid, block))
        assert shared <= cuda.SHARED_LIMIT

    monkeypatch.setattr(cuda, "launch", launch)
    policy = options.pop("policy", tt.RemaskPolicy.twotower())
    names = ("step", "num_steps", "top_k", "seed", "offset", "initial_num_masked", "temperature", "top_p", "gate_bound")
    rows = [options.get(name) for name in names]
    whole, real = [0, 1, 0, 0, 0, -1], [options.get("temperature_of_all", 0.0), 1.0, 0.0]
    block = options.get("block", 16)
    logits = torch.empty(2, block, 131072, device="meta", dtype=options.get("dtype", torch.float32))
    tokens = torch.empty(2, block, device="meta", dtype=torch.int32)
    lengths = torch.empty(2, device="meta", dtype=torch.int32)
    ids = torch.empty(3, device="meta", dtype=torch.int32)
    last = [[], ids, [4], None, torch.empty(2, block, device="meta", dtype=torch.bool), lengths, tokens, None, 0, None]
    got = cuda_remask.remask(logits, tokens, MASK, *policy.encoded(), whole, real, *rows, *last)
    assert got[0].dtype == torch.int32 and got[3].dtype == torch.float32 and got[5].shape == (2,)
    return made


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    logit = {"LOGIT_TYPE": "type_float32", "POSTERIOR": "0"}
    select = ("remask_select_kernel", {"LONG": "0"}, 2, 512)
    scan, drawn = (("remask_scan_kernel", logit | {"SAMPLED": sampled}, 512, 256) for sampled in "01")
    assert launches(monkeypatch) == [scan, select]
    assert launches(monkeypatch, temperature_of_all=0.5) == [drawn, select]
    rows = torch.empty(2, device="meta")
    assert launches(monkeypatch, temperature=rows) == [drawn, select]
    assert launches(monkeypatch, top_p=rows) == [scan, select]  # the argmax and raw statistics need no filter
    threads = ("remask_filter_kernel", logit, 32, 768)
    assert launches(monkeypatch, temperature=rows, top_k=rows.long()) == [threads, drawn, select]
    assert launches(monkeypatch, top_p=rows, policy=tt.RemaskPolicy.dream()) == [threads, scan, select]
    half = launches(monkeypatch, dtype=torch.bfloat16)
    assert half[0][1] == {"LOGIT_TYPE": "type_bfloat16", "POSTERIOR": "0", "SAMPLED": "0"}


def test_what_other_policies_and_long_blocks_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed tokens are judged by the same kernels; the posterior has its own builds."""
    plain = launches(monkeypatch)
    assert launches(monkeypatch, policy=tt.RemaskPolicy.llada2(edit_threshold=0.9, remask_threshold=0.1)) == plain
    assert launches(monkeypatch, policy=tt.RemaskPolicy.diffusion_gemma()) == plain
    logit = {"LOGIT_TYPE": "type_float32", "POSTERIOR": "1"}
    scan = ("remask_scan_kernel", logit | {"SAMPLED": "0"}, 512, 256)
    posterior, rows = tt.RemaskPolicy.posterior(), torch.empty(2, device="meta")
    assert launches(monkeypatch, policy=posterior) == [scan, plain[1]]
    filtered = launches(monkeypatch, policy=posterior, top_p=rows)  # the argmax may be the mask
    assert filtered == [("remask_filter_kernel", logit, 32, 512), scan, plain[1]]
    for block, long in ((1365, "0"), (1366, "1")):
        assert launches(monkeypatch, block=block)[-1] == ("remask_select_kernel", {"LONG": long}, 2, 512)


def test_lists_of_tokens_are_not_copied_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        cuda_remask._listed((4, 5), torch.device("cuda"))


def test_float64_is_refused() -> None:
    message = "remask on cuda: expected float32, bfloat16 or float16 logits, got torch.float64"
    with cuda_kernels(), pytest.raises(NotImplementedError, match=message):
        tt.remask(torch.zeros(1, 2, 9).double(), torch.full((1, 2), MASK), mask_token_id=MASK)
