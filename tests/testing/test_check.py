"""What `check` says of kernels, right and wrong ones: its report, its refusals, the marker and the command."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twotower_kernels as tt
from tests.house.test_house import OPS
from tests.program.command_line import error_of, run
from twotower_kernels import testing
from twotower_kernels.testing.properties import assert_deterministic, assert_row_invariant, assert_untouched

pytest_plugins = ["pytester"]

FEW: dict[str, Any] = dict(examples=8)
KERNELS = """
import twotower_kernels as tt

def right(x, weight=None, *, eps):
    return tt.rms_norm(x, weight, eps=eps)

def wrong(x, weight=None, *, eps):
    return tt.rms_norm(x, weight, eps=2 * eps)
"""


def test_every_operation_is_there() -> None:
    assert set(testing.OPS) == {op for _, op in OPS} | {"block_causal_attention"}


@pytest.mark.thorough
@pytest.mark.parametrize("op", testing.OPS)
def test_our_kernels_hold(op: str) -> None:
    report = testing.check(op, getattr(tt, op), **FEW)
    assert report, f"\n{report}"
    assert not report.not_tried and not report.refused
    assert report.held["numbers"] == report.examples + report.cases and report.examples == 8


def off_by_one(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """A causal query sees the next key, too."""
    if not causal:
        return tt.block_attention(q, k, v)
    seen = k.shape[1] - 1
    first = tt.context_attention(q[:, :seen], k, v, causal=True, context_lens=seen + 1, block_lens=seen)
    return torch.cat([first, tt.block_attention(q, k, v)[:, seen:]], 1)


def test_a_report_says_what_was_tried_and_what_failed() -> None:
    report = testing.check("block_attention", off_by_one, examples=40)
    (failure,) = (found for found in report.failures if found.promise == "numbers")
    assert not report and failure.inputs["causal"] is True
    assert max(x.numel() for x in failure.inputs.values() if isinstance(x, Tensor)) <= 10, "not the smallest"
    assert None not in (failure.got, failure.naive, failure.exact)
    with torch.inference_mode():
        got = off_by_one(**failure.inputs)[tuple(failure.place or ())].item()
    assert got == failure.got and abs((failure.naive or 0) - (failure.exact or 0)) < abs(got - (failure.exact or 0))
    assert {"window", "context_lens", "k_context", "out"} <= set(report.not_tried) and report.tried["causal"] > 0
    text, facts = str(report), json.loads(report.to_json())
    assert "numbers       BROKEN" in text and "causal = True" in text and "not tried" in text
    assert facts["ok"] is False and facts["failures"][0]["inputs"]["q"]["dtype"] == "float32"


def test_the_same_seed_draws_the_same() -> None:
    reports = [str(testing.check("rms_norm", tt.rms_norm, examples=5, seed=seed)) for seed in (3, 3, 4)]
    assert reports[0] == reports[1] != reports[2]


def test_what_is_refused_is_no_failure() -> None:
    def only_float32(x: Tensor, *, eps: float) -> Tensor:
        if x.dtype != torch.float32:
            raise NotImplementedError("float32 only")
        if not x.numel() or not x.is_contiguous():
            raise RuntimeError("expected something contiguous")
        return tt.rms_norm(x, eps=eps)

    report = testing.check("rms_norm", only_float32, examples=30)
    assert report and report.refused["NotImplementedError: float32 only"] > 0
    assert any(said.startswith("empty tensors: RuntimeError") for said in report.refused)
    assert any(said.startswith("tensors that are ") for said in report.refused)
    report = testing.check("rms_norm", only_float32, dtypes=[torch.bfloat16], **FEW)
    assert not report and not report.failures and "nothing was tried" in str(report)


def test_what_raises_is_a_failure() -> None:
    def raises(x: Tensor, *, eps: float) -> Tensor:
        raise RuntimeError("no such\nthing")

    report = testing.check("rms_norm", raises, **FEW)
    assert [failure.promise for failure in report.failures] == ["runs"]
    assert report.failures[0].why == "RuntimeError: no such"


def test_what_a_kernel_demands_is_always_given() -> None:
    seen = []

    def demanding(q: Tensor, k: Tensor, v: Tensor, k_context: Tensor, v_context: Tensor, window: int) -> Tensor:
        seen.append((k_context, window))
        return tt.block_attention(q, k, v, k_context, v_context, window=window)

    assert testing.check("block_attention", demanding, **FEW)
    assert seen and all(context is not None and window is not None for context, window in seen)


@pytest.mark.parametrize(
    ("op", "kernel", "options", "error", "message"),
    [
        ("norm", tt.rms_norm, {}, ValueError, "op: expected one of block_attention, .* got 'norm'"),
        ("rms_norm", lambda x: x, {}, ValueError, "kernel: expected eps among its arguments, got x; the arguments of"),
        ("rms_norm", lambda x, eps, y: x, {}, ValueError, "kernel: expected a default of y, which is none of"),
        ("rms_norm", 3, {}, TypeError, "kernel: expected a function that names its arguments, got 3"),
        ("rms_norm", tt.rms_norm, {"examples": 0}, ValueError, "examples: expected at least 1, got 0"),
        ("rms_norm", tt.rms_norm, {"dtypes": [torch.int8]}, ValueError, "dtypes: expected some of torch.float64.*int8"),
    ],
)
def test_bad_arguments_are_named(op: str, kernel: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        testing.check(op, kernel, **options)


# --- the parts --------------------------------------------------------------------------------------------------------

INPUTS: dict[str, Any] = {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "eps": 1e-5}


def test_other_bits_in_a_second_call_are_found() -> None:
    calls: list[int] = []

    def drifts(x: Tensor, eps: float) -> Tensor:
        calls.append(0)
        return x + len(calls) * 1e-3

    assert_deterministic(tt.rms_norm, INPUTS)
    with pytest.raises(AssertionError, match=r"result 0 of call 1 has other bits: at \[0, 0\]"):
        assert_deterministic(drifts, INPUTS)


def test_rows_that_depend_on_the_batch_are_found() -> None:
    assert_row_invariant(tt.rms_norm, INPUTS, rows=["x"], part=slice(1, 3))
    with pytest.raises(AssertionError, match="result 0 has other bits in a smaller batch"):
        assert_row_invariant(lambda x, eps: x - x.mean(), INPUTS, rows=["x"])


def test_writes_to_inputs_and_around_them_are_found() -> None:
    assert torch.equal(assert_untouched(tt.rms_norm, INPUTS)[0], tt.rms_norm(**INPUTS))
    with pytest.raises(AssertionError, match="x was changed"):
        assert_untouched(lambda x, eps: x.add_(1), INPUTS)
    with pytest.raises(AssertionError, match="x: what lies around it was changed"):
        assert_untouched(lambda x, eps: x.as_strided((1,), (1,), x.storage_offset() - 1).zero_(), INPUTS)
    with pytest.raises(AssertionError, match="x: what lies around it was changed"):
        assert_untouched(lambda x, eps: x._base.zero_(), INPUTS, writes=["x"])


def test_hypothesis_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = sys.modules["twotower_kernels.testing.needs"]
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install 'twotower-kernels\[testing\]'"):
        importlib.reload(needs)
    monkeypatch.undo()
    importlib.reload(needs)


# --- the marker and the command ---------------------------------------------------------------------------------------


def test_the_marker_checks_what_a_test_returns(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['twotower_kernels.testing.pytest_plugin']")
    pytester.makepyfile(
        KERNELS
        + """
import pytest

@pytest.fixture
def twice():
    return 2

@pytest.mark.twotower_op("rms_norm", examples=4)
@pytest.mark.parametrize("kernel", [right, wrong])
def test_norm(kernel, twice):
    assert twice == 2
    return kernel

@pytest.mark.twotower_op("rms_norm")
def test_nothing():
    pass
"""
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--strict-markers")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*rms_norm, wrong on cpu: BROKEN*", "*expected the test to return a kernel, got None*"]
    )


def test_the_command_checks_a_function_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_the_test.py").write_text(KERNELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = ["--op", "rms_norm", "--examples", "4", "--dtype", "float32"]
    assert run("check", "mine_of_the_test:right", *options) == 0
    assert "rms_norm, right on cpu: all held" in capsys.readouterr().out
    assert run("check", tmp_path / "mine_of_the_test.py:wrong", *options, "--json", "report.json") == 1
    assert "numbers broken by" in capsys.readouterr().out
    assert json.loads(Path("report.json").read_text(encoding="utf-8"))["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["os:getcwd"], "--op: expected the op that os:getcwd is, one of block_attention,"),
        (["--op", "rms_norm"], "--op: expected a kernel, MODULE:FUNCTION, got none"),
        (["os", "--op", "rms_norm"], "expected MODULE:FUNCTION or FILE.py:FUNCTION, got os"),
        (["no_such_module:f", "--op", "rms_norm"], "no_such_module: no such module in"),
        (["none.py:f", "--op", "rms_norm"], "none.py: no such file"),
        (["os:nothing", "--op", "rms_norm"], "os:nothing: os has no nothing"),
        (["os:sep", "--op", "rms_norm"], "os:sep: expected a function, got str"),
        (["os:getcwd", "--op", "norm"], "op: expected one of"),
        (["os:getcwd", "--op", "rms_norm", "--device", "cuda:7"], "--device cuda:7: expected a GPU, PyTorch sees none"),
    ],
)
def test_the_command_says_what_it_expected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in error_of(capsys, "check", *arguments)


def test_partial_functions_are_kernels() -> None:
    assert testing.check("rms_norm", functools.partial(tt.rms_norm, eps=1e-5), **FEW).op == "rms_norm"
