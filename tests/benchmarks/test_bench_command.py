"""The benchmark's command at small shapes, where every check of one program's output against another's really runs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from tests.paths import ROOT
from tests.program.command_line import run
from twotower_kernels.bench import command
from twotower_kernels.bench.cases import adaln, attention, linear, mamba2, moe, remask
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, PYTORCH, Case, measure
from twotower_kernels.bench.report.tables import others
from twotower_kernels.bench.sizes.shapes import RELEASED, SMALL, Shapes

LIMITS = ceilings.Ceilings(read=50, copy=60, fp64=80, fp32=200, fp16=3, bf16=400, launch=1e-5)
FAMILIES = dict(attention=attention, moe=moe, linear=linear, mamba2=mamba2, adaln=adaln, remask=remask)
# Of LLaDA-8B's kind: names of its own, and neither Mamba-2 layers nor experts.
DENSE = dict(d_model=96, n_heads=6, n_kv_heads=3, vocab_size=500, mlp_hidden_size=200, mask_token_id=3, head_dim=None)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measuring this machine's ceilings, and without compiling baselines."""
    monkeypatch.setattr(ceilings, "measure", lambda device: LIMITS)
    monkeypatch.setattr(remask, "compiled_best_of", remask.best_of)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def saved(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    options = ["--seconds", "0", "--save", str(folder), "--name", "run", *arguments]
    assert command.main(options) == code
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_baseline_agrees_at_small_shapes(family: str, tmp_path: Path) -> None:
    run = saved(tmp_path, "--op", family, "--shapes", "small", "--batch", "2", "--context", "40")
    assert run["results"]
    for result in run["results"]:
        assert {OURS, ORIGINAL} < set(result["seconds"]) and result["seconds"][OURS]["calls"] >= 3
        assert any(name.startswith(PYTORCH) for name in result["seconds"])
    assert run["skipped"] == []


def test_a_saved_run_says_what_was_measured(tmp_path: Path) -> None:
    run = saved(tmp_path, "--op", "attention", "--shapes", "small", "--context", "40", "--baselines", "original")
    assert {"processor", "threads", "clocks", "torch", "gpu", "commit", "date"} <= set(run["machine"])
    assert run["ceilings"] == vars(LIMITS)
    result = run["results"][0]
    assert result["op"] == "block_attention" and result["dtype"] == "bfloat16"
    assert result["sizes"] == dict(batch=1, block=16, context=40, heads=4, kv_heads=2, head_dim=64)
    assert (result["bytes"], result["flops"]) == (2 * (2 * 56 * 2 + 2 * 16 * 4) * 64, 4 * 16 * 56 * 4 * 64)
    assert set(result["seconds"]) == {OURS, ORIGINAL}
    seconds = result["seconds"][OURS]["median"]
    assert result["GB/s"] == pytest.approx(result["bytes"] / seconds / 1e9)
    assert result["TFLOP/s"] == pytest.approx(result["flops"] / seconds / 1e12)
    assert "vs original" in (tmp_path / "run.md").read_text(encoding="utf-8")


def test_without_choices_the_cases_are_the_usual_ones() -> None:
    """By default: goals too, which the command drops at other shapes."""
    found = list(attention.cases(shapes=SMALL))
    assert [case.sizes.get("context") for case in found] == [8192, 32768, 8192, 1024, 256, None, None]
    assert found[0].goals == (15, 4, 0.75)
    assert command.parser().parse_args(["--rivals", "none"]).baselines == ["none"]  # its name of before
    options = command.parser().parse_args(["--baselines", "none"])
    assert all(set(case.programs) == {OURS} for case in command.cases("adaln", options, SMALL))
    assert not any(any(case.goals) for case in command.cases("adaln", options, SMALL))
    assert any(any(case.goals) for case in command.cases("adaln", options, RELEASED))


# --- a kernel of one's own --------------------------------------------------------------------------------------------


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_context: Any, v_context: Any) -> Any:
    k, v = (torch.cat(pair, 1).repeat_interleave(2, 2) for pair in ((k_context, k), (v_context, v)))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def small_case() -> Case:
    return attention.over_context(1, 40, torch.float32, "cpu", shapes=SMALL)


def test_a_kernel_of_ones_own_is_checked_and_timed() -> None:
    result = measure(small_case().against("mine", softmax_attention), seconds=0)
    assert result.wrong == {} and result.ratio("mine") > 0
    assert result.best() != "mine"
    header, *rows = others([result])
    assert {OURS, ORIGINAL, result.best()}.isdisjoint(row[3] for row in rows)
    (row,) = (row for row in rows if row[3] == "mine")
    assert re.fullmatch(r"[\d.]+×", row[header.index("vs ours")])


def test_a_wrong_kernel_is_reported_and_not_timed() -> None:
    result = measure(small_case().against("mine", lambda q, **_: q), seconds=0)
    assert re.match("disagrees, relative error .*, expected at most 1e-02", result.wrong["mine"])
    assert "mine" not in result.timings and ORIGINAL in result.timings


def test_an_interruption_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def stops_at_the_second(case: Case, *arguments: Any) -> Any:
        measured.append(case.op)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(case, *arguments)

    monkeypatch.setattr(command, "measure", stops_at_the_second)
    run = saved(tmp_path, "--op", "adaln", "--op", "remask", "--shapes", "small", code=130)
    assert [result["op"] for result in run["results"]] == measured[:1]


def test_the_command_goes_on_after_a_wrong_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adaln.pytorch, "eager_adaln_norm", lambda x, *_, **__: -x)
    run = saved(tmp_path, "--op", "adaln", "--shapes", "small", "--batch", "2", code=1)
    assert len(run["results"]) == 3 and ORIGINAL not in run["results"][0]["seconds"]
    assert run["skipped"][0]["program"] == ORIGINAL and "disagrees, relative error" in run["skipped"][0]["reason"]
    assert "disagrees" in capsys.readouterr().out


# --- what cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'fla'"), NotImplementedError("no kernel"), torch.OutOfMemoryError("too big")]
)
def test_what_cannot_run_is_skipped(error: Exception) -> None:
    def fails(**_: Any) -> None:
        raise error

    assert measure(small_case().against("theirs", fails), seconds=0).skipped == {"theirs": str(error)}


def test_a_program_that_fails_is_wrong_and_not_skipped() -> None:
    result = measure(small_case().against("mine", lambda x: x).against("other", softmax_attention), seconds=0)
    assert re.match("TypeError: .*argument", result.wrong["mine"]) and result.skipped == {}
    assert "other" in result.timings


def test_a_failure_of_ours_ends_neither_the_run_nor_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(tt, "gated_residual_adaln_norm", broken)
    run = saved(tmp_path, "--op", "adaln", "--shapes", "small", "--batch", "2", code=1)
    assert [r["op"] for r in run["results"]] == ["adaln_norm", "adaln_norm"]
    assert {"program": OURS, "reason": "RuntimeError: broken"}.items() <= run["skipped"][0].items()


def test_the_best_pytorch_is_the_original_style_where_that_is_faster() -> None:
    result = measure(small_case(), seconds=0)
    slow = replace(result.timings[ORIGINAL], median=1.0)
    fast = replace(slow, median=1e-9)
    assert replace(result, timings={**result.timings, ORIGINAL: fast}).best() == ORIGINAL
    assert replace(result, timings={**result.timings, ORIGINAL: slow}).best() != ORIGINAL


def test_too_little_memory_skips_the_family(tmp_path: Path) -> None:
    """What PyTorch raises on a CPU, of the weights of more experts than any machine holds."""
    (tmp_path / "config.json").write_text(json.dumps(dict(num_local_experts=10**12)), encoding="utf-8")
    run = saved(
        tmp_path, "--op", "moe", "--op", "adaln", "--shapes", str(tmp_path / "config.json"), "--baselines", "none"
    )
    assert run["skipped"][0]["op"] == "moe" and "memory" in run["skipped"][0]["reason"]
    assert run["results"][0]["op"] == "adaln_norm"


def test_the_model_has_sizes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(tmp_path, "--op", "model", "--shapes", "small")
    assert [(s["op"], s["program"]) for s in run["skipped"]] == [("model", OURS)] and run["results"] == []
    assert "not timed, because" in capsys.readouterr().out


# --- shapes and options -----------------------------------------------------------------------------------------------


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_shapes_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, DENSE)
    found, missing = Shapes.from_file(path)
    dense = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=16, vocab_size=500)
    assert found == replace(RELEASED, **dense)
    assert "mamba_num_heads" in missing and "n_routed_experts" in missing and "head_dim" not in missing
    run = saved(tmp_path, "--op", "attention", "--op", "adaln", "--shapes", str(path), "--batch", "3", "--context", "9")
    assert f"{path} lacks mamba_num_heads" in capsys.readouterr().out.replace("\n", " ")
    assert {r["sizes"]["heads"] for r in run["results"] if r["op"] == "block_attention"} == {6}
    assert {r["sizes"]["hidden"] for r in run["results"] if "adaln" in r["op"]} == {96}
    assert {r["sizes"]["batch"] for r in run["results"]} == {3}


def test_the_released_sizes_are_those_of_the_released_file(tmp_path: Path) -> None:
    released = {name: value for name, value in vars(RELEASED).items() if name != "block_size"}
    assert Shapes.from_file(written(tmp_path, released)) == (RELEASED, ())


def test_other_names_and_convolutions(tmp_path: Path) -> None:
    found, _ = Shapes.from_file(written(tmp_path, dict(num_experts=32, num_experts_per_tok=4, mamba_d_conv=3)))
    assert (found.n_routed_experts, found.num_experts_per_tok, found.conv_kernel) == (32, 4, 3)
    case = mamba2.scan(1, 16, True, "cpu", shapes=replace(SMALL, conv_kernel=3))
    assert measure(case, seconds=0).wrong == {}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "expected JSON"),
        ([1], "expected a JSON object, got list"),
        (dict(hidden_size="big"), "hidden_size: expected an integer, 1 or more, got 'big'"),
        (dict(n_heads=0), "n_heads: expected an integer, 1 or more, got 0"),
        (dict(head_dim=True), "head_dim: expected an integer, 1 or more, got True"),
        (dict(n_heads=6, n_kv_heads=4), "num_attention_heads: expected a multiple of num_key_value_heads, 4, got 6"),
        (dict(num_experts=4), "num_experts_per_tok: expected at most n_routed_experts, 4, got 6"),
    ],
)
def test_a_bad_file_is_named(content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, content)
    error = refused(capsys, "--shapes", str(path))
    assert str(path) in error and said in error


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--op", "conv"], "invalid choice: 'conv'"),
        (["--shapes", "tiny"], "tiny: expected a config.json: No such file"),
        (["--batch", "0"], "--batch: expected an integer from 1 to 65536, got '0'"),
        (["--context", "1.5"], "--context: expected an integer from 1 to 16777216, got '1.5'"),
        (["--context", str(2**63)], "--context: expected an integer from 1 to 16777216, got '9223372036854775808'"),
        (["--seconds", "nan"], "--seconds: expected a finite number, 0 or more, at most 3600, got 'nan'"),
        (["--seconds", "1e400"], "--seconds: expected a finite number, 0 or more, at most 3600, got '1e400'"),
        (["--baselines", "mine"], "invalid choice: 'mine'"),
        (["--device", "cuda"], "expected a GPU, PyTorch sees none"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_twotower_bench_is_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: twotower bench ") and "--baselines" in out
    assert run("bench", "--batch", "0") == 2
    assert "expected an integer from 1" in capsys.readouterr().err


def test_ceilings_keep_the_better_of_two() -> None:
    other = replace(LIMITS, read=70, launch=2e-5)
    assert LIMITS.better_of(other) == other.better_of(LIMITS) == replace(LIMITS, read=70)
    assert (LIMITS.matrix(torch.float64), LIMITS.matrix(torch.float16), LIMITS.matrix(torch.bfloat16)) == (80, 200, 400)


def test_the_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/benchmarking.md").read_text(encoding="utf-8"), re.S | re.M
    )
    assert blocks
    exec("\n".join(blocks), {})
