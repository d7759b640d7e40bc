"""The CUDA C++ kernels of remasking, run on a host: the CPU kernel's demands, and what is peculiar to them."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from reference.remask import CASES, make_inputs
from reference.remask_policy import RemaskPolicy
from tests import test_policies
from tests import test_remask_kernel as cpu_tests
from tests.remask_cases import MASK, assert_step_agrees, package, steps
from tests.replay_policies import implementation, replay
from tests.simt.overlay import cuda_kernels
from twotower_kernels import cuda, cuda_remask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in CASES["remask"] if not case.startswith("released") and case != "posterior"]


def supported(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a step without what the GPU refuses."""
    policy, logits = inputs["policy"], inputs["logits"]
    schedule = "truncated" if policy.schedule == "posterior" else policy.schedule
    changes = dict(renoise=False, edit_threshold=None, remask_threshold=None, schedule=schedule)
    logits = logits.float() if logits.dtype == torch.float64 else logits
    return inputs | {"policy": dataclasses.replace(policy, **changes), "logits": logits}


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("case", SMALL)
def test_every_case(case: str, build: str) -> None:
    with cuda_kernels(build=build):
        for dtype in DTYPES:
            assert_step_agrees(make_inputs("remask", case, dtype=dtype))


@settings(max_examples=200)
@given(inputs=steps().map(supported), layout=st.integers(0, 3))
def test_any_step(inputs: dict[str, Any], layout: int) -> None:
    with cuda_kernels():
        assert_step_agrees(inputs, layout=layout)


@settings(max_examples=40)
@given(inputs=steps().map(supported), layout=st.integers(0, 3))
def test_any_step_is_free_of_races(inputs: dict[str, Any], layout: int) -> None:
    with cuda_kernels(build="race"):
        assert_step_agrees(inputs, layout=layout)


@pytest.mark.parametrize("name", [name for name in test_policies.CASES if "posterior" not in name])
def test_recorded_steps_come_out(name: str) -> None:
    try:
        with cuda_kernels():
            assert replay(test_policies.CASES[name], implementation("package")) == []
    except NotImplementedError as error:
        assert "judges committed tokens" in str(error)
        assert name.split(".")[0] in ("llada21", "dinfer", "diffusion_gemma")


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
)
def test_the_draws_are_the_cpus(seed, offset, step, temperature, spread, dtype):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(1, 4, 2000, generator=generator)).to(dtype)
    options = dict(mask_token_id=MASK, num_steps=step + 2, step=step, seed=seed, offset=offset, temperature=temperature)
    tokens = torch.full((1, 4), MASK)
    with cuda_kernels():
        got = package(logits, tokens, **options)
    assert got.candidate.equal(package(logits, tokens, **options).candidate)


def test_known_answers_of_philox() -> None:
    with cuda_kernels():
        cpu_tests.test_known_answers_of_philox()


def test_rows_that_are_not_looked_at_are_not_read() -> None:
    with cuda_kernels():
        cpu_tests.test_rows_that_are_not_looked_at_are_not_read()


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


@pytest.mark.parametrize("temperature", [1e-50, 1e-44, 1e-39, 1e-30, 1e-3, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    """The smallest is 0 as a float, and nothing is usable; the inverse of the next two is infinite."""
    for policy in (RemaskPolicy.dream("entropy"), RemaskPolicy.twotower(0.8)):
        sizes = dict(batch=2, block=3, vocab=70, num_steps=3, seed=3, policy=policy)
        for filters in ({}, {"top_p": 0.9}):
            with cuda_kernels():
                assert_step_agrees(make_inputs("remask", sizes | filters | {"temperature": temperature}))


def test_a_row_alone_gets_the_same_bits() -> None:
    case = dict(batch=3, block=4, vocab=9000, num_steps=3, policy=RemaskPolicy.dream("entropy"), seed=torch.arange(3))
    inputs = make_inputs("remask", dict(case, temperature=torch.tensor([0.0, 1.0, 0.7]), top_k=30))
    with cuda_kernels():
        together = package(**inputs)
        for b in range(3):
            cut = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            alone = package(**cut)
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

    def launch(kernel: cuda.Kernel, grid: int, block: int, shared: int, arguments: Any) -> None:
        made.append((kernel.name, dict(kernel.defines), grid, block))
        assert shared <= cuda.SHARED_LIMIT

    monkeypatch.setattr(cuda, "launch", launch)
    policy = options.pop("policy", tt.RemaskPolicy.twotower())
    names = ("step", "num_steps", "top_k", "seed", "offset", "initial_num_masked", "temperature", "top_p", "gate_bound")
    rows = [options.get(name) for name in names]
    whole, real = [0, 1, 0, 0, 0, -1], [options.get("temperature_of_all", 0.0), 1.0, 0.0]
    logits = torch.empty(2, 16, 131072, device="meta", dtype=options.get("dtype", torch.float32))
    tokens = torch.empty(2, 16, device="meta", dtype=torch.int32)
    lengths = torch.empty(2, device="meta", dtype=torch.int32)
    ids = torch.empty(3, device="meta", dtype=torch.int32)
    last = [[], ids, [4], None, torch.empty(2, 16, device="meta", dtype=torch.bool), lengths, tokens, None]
    got = cuda_remask.remask(logits, tokens, MASK, *policy.encoded(), whole, real, *rows, *last)
    assert got[0].dtype == torch.int32 and got[3].dtype == torch.float32 and got[5].shape == (2,)
    return made


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    logit = {"LOGIT_TYPE": "type_float32"}
    scan, select = ("remask_scan_kernel", logit | {"SAMPLED": "0"}, 512, 256), ("remask_select_kernel", {}, 2, 512)
    assert launches(monkeypatch) == [scan, select]
    drawn = ("remask_scan_kernel", logit | {"SAMPLED": "1"}, 512, 256)
    assert launches(monkeypatch, temperature_of_all=0.5) == [drawn, select]
    rows = torch.empty(2, device="meta")
    assert launches(monkeypatch, temperature=rows) == [drawn, select]
    assert launches(monkeypatch, top_p=rows) == [scan, select]  # the argmax and raw statistics need no filter
    threads = ("remask_filter_kernel", logit, 32, 768)
    assert launches(monkeypatch, temperature=rows, top_k=rows.long()) == [threads, drawn, select]
    assert launches(monkeypatch, top_p=rows, policy=tt.RemaskPolicy.dream()) == [threads, scan, select]
    half = launches(monkeypatch, dtype=torch.bfloat16)
    assert half[0][1] == {"LOGIT_TYPE": "type_bfloat16", "SAMPLED": "0"}


def test_lists_of_tokens_are_not_copied_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        cuda_remask._listed((4, 5), torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": tt.RemaskPolicy.posterior()}, "expected another schedule, got 'posterior'"),
        ({"policy": tt.RemaskPolicy.llada2(edit_threshold=0.9)}, "expected a policy without edit_threshold"),
        ({"policy": tt.RemaskPolicy.llada2(remask_threshold=0.1)}, "expected a policy without remask_threshold"),
        ({"policy": tt.RemaskPolicy.diffusion_gemma()}, "expected a policy without renoise"),
        ({"logits": torch.zeros(1, 2, 9).double()}, "expected float32, bfloat16 or float16 logits, got torch.float64"),
        (
            {"logits": torch.zeros(1, 2000, 9), "tokens": torch.full((1, 2000), MASK)},
            "expected at most 1365 positions, got 2000",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {"logits": torch.zeros(1, 2, 9), "tokens": torch.full((1, 2), MASK), "mask_token_id": MASK}
    with cuda_kernels(), pytest.raises(NotImplementedError, match=f"remask on cuda: {message}"):
        tt.remask(**(inputs | change))
