"""What measures a GPU, run on a stand-in: that it runs, what it times how, and what it saves."""

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from tests.benchmarks.test_bench_command import LIMITS
from tests.gpu.gpu_stand_in import gpu_stand_in
from tests.gpu.test_capture import Recorder
from tests.model.random_models import SIZES
from twotower_kernels import TwoTowerConfig, cuda
from twotower_kernels.bench import ceilings, command, gpu_clock, gpu_model, gpu_smoke, gpu_tuning
from twotower_kernels.bench.bench_remask import best_of
from twotower_kernels.bench.timing import ORIGINAL, OURS

FAMILIES = gpu_smoke.FAMILIES


def cases_of(family: str) -> dict[str, Any]:
    """An operation's named cases, by its name."""
    cases: dict[str, Any] = importlib.import_module(f"twotower_kernels.reference.{family}").CASES
    return cases


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device: replace(LIMITS, device=device))
    monkeypatch.setattr("twotower_kernels.bench.bench_remask.compiled_best_of", best_of)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["attention", "moe", "linear", "mamba2", "adaln", "remask"])
def test_every_family_is_measured(family: str, tmp_path: Path) -> None:
    options = ["--device", "cuda", "--op", family, "--shapes", "small", "--batch", "2", "--context", "40"]
    with gpu_stand_in() as record:
        assert command.main([*options, "--seconds", "0", "--save", str(tmp_path), "--name", family]) == 0
    run = json.loads((tmp_path / f"{family}.json").read_text(encoding="utf-8"))
    assert run["machine"]["gpu"] == "Stand-in"
    assert run["results"] and record.recordings > 0
    for result in run["results"]:
        assert {OURS, ORIGINAL} < set(result["seconds"])
        assert all(timed["graph"] and timed["calls"] >= 5 for timed in result["seconds"].values())


def test_the_usual_cases_are_made() -> None:
    """Of the sizes that a GPU is measured at, only the small families: the others take its memory."""
    options = command.parser().parse_args(["--device", "cuda", "--rivals", "none"])
    with gpu_stand_in():
        found = [case.sizes["rows"] for case in command.cases("adaln", options, command.SMALL)]
    assert sorted(set(found)) == [16, 64, 256, 1024]


def sleeps(seconds: float) -> Any:
    return lambda: time.sleep(seconds)


def test_what_clears_the_cache_is_not_counted() -> None:
    with gpu_stand_in():
        found = gpu_clock.on_gpu({"short": sleeps(1e-3), "long": sleeps(4e-3)}, 0.02, "cpu", Recorder())
    assert all(timing.graph and timing.calls >= 5 for timing in found.values())
    assert 1e-3 < found["short"].median < 3e-3 < found["long"].median


def test_what_waits_for_the_device_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a program raises where PyTorch is told to notice; it must not be recorded."""
    modes: list[str] = []

    def reads() -> None:
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    with gpu_stand_in():
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        record = Recorder()
        found = gpu_clock.on_gpu({"reads": reads}, 0, "cpu", record)
    assert not found["reads"].graph and found["reads"].calls == 5
    assert record.recordings == 0 and modes == ["error", "default"]


def test_what_a_graph_cannot_hold_is_called() -> None:
    def refuses(call: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with gpu_stand_in():
        found = gpu_clock.on_gpu({"some": lambda: None}, 0, "cpu", refuses)
    assert not found["some"].graph


def test_the_model_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(gpu_model, "config", lambda pattern: TwoTowerConfig(**SIZES, hybrid_override_pattern="M*E-"))
    monkeypatch.setattr(gpu_model, "SIZES", ((1, 20), (3, 7)))
    with gpu_stand_in() as record:
        gpu_model.main(["--save", str(tmp_path)])
    run = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert [(row["batch"], row["context"]) for row in run["results"]] == [(1, 20), (3, 7)]
    for row in run["results"]:
        assert 1 <= row["autoregressive experts hit per layer"] <= row["experts hit per layer"] <= 8
        assert row["floor seconds"] == pytest.approx(row["bytes"] / LIMITS.read / 1e9)
        step, commit, rates = row["step seconds"], row["commit seconds"], row["tokens per second at tokens per NFE"]
        assert rates["2"] == pytest.approx(row["batch"] * 16 / (8 * step + commit))
    assert record.recordings >= 6  # a step, a commit and a token, at each size
    assert "B  3, context      7: step" in capsys.readouterr().out


def test_the_sizes_of_the_model_are_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_model, "config", lambda pattern: TwoTowerConfig(**SIZES, hybrid_override_pattern="M*E-"))
    with gpu_stand_in():
        gpu_model.main(["--save", str(tmp_path), "--size", "2,9"])
    run = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert [(row["batch"], row["context"]) for row in run["results"]] == [(2, 9)]


def smoke(capsys: pytest.CaptureFixture[str], *ops: str) -> tuple[int, list[str]]:
    """Exit code and lines of the smoke test of some operations; the CPU answers for the GPU."""
    with gpu_stand_in():
        code = gpu_smoke.main([word for op in ops for word in ("--only", op)])
    return code, capsys.readouterr().out.splitlines()


def test_everything_is_called_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert {op for _, op, _ in gpu_smoke.cases()} == {op for family in FAMILIES for op in cases_of(family)}
    code, lines = smoke(capsys, "adaln_norm", "gated_residual", "moe_route", "moe_plan", "mamba2_scan", "append_kv")
    called = [line.split(",")[0] for line in lines if "first call" in line]
    assert code == 0 and set(called) >= {"adaln_norm", "moe_route", "moe_plan", "mamba2_scan", "append_kv"}
    assert any(line.startswith("NVRTC") for line in lines)


def test_a_wrong_or_failing_operation_is_named_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = tt.adaln_norm
    monkeypatch.setattr(tt, "adaln_norm", lambda *a, **k: 1.1 * right(*a, **k))
    monkeypatch.setattr(tt, "gated_residual", lambda *a, **k: 1 / 0)
    code, lines = smoke(capsys, "adaln_norm", "gated_residual", "rms_norm")
    assert code == 5  # three cases and two
    assert sum(line.startswith("WRONG adaln_norm") and "off by 0.1" in line for line in lines) == 3
    assert sum(line.startswith("FAILED gated_residual") and "ZeroDivisionError" in line for line in lines) == 2
    assert sum(line.startswith("rms_norm") for line in lines) == 1


def test_a_build_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert {source for source, _ in gpu_smoke.builds()} == {path.stem for path in cuda.folder().glob("*.cu")}
    assert gpu_smoke.compiled(("moe_plan", ()), "sm_90a") is None
    said = gpu_smoke.compiled(("moe_route", (("LOGIT", "unknown"),)), "sm_90a")
    assert said is not None and said.startswith("moe_route {'LOGIT': 'unknown'}: RuntimeError")


def test_a_model_is_cut_to_what_fits() -> None:
    assert gpu_model.largest(150 * 10**9) == gpu_model.RELEASED
    half = gpu_model.largest(75 * 10**9)
    assert gpu_model.RELEASED.startswith(half) and 20 < len(half) < 40
    with pytest.raises(SystemExit, match="no layer fits into 1 GB"):
        gpu_model.largest(10**9)


def test_what_only_measurement_decides_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    launch, tuning = gpu_tuning.kernels()
    before = launch.PDL, tuning.STREAM
    with gpu_tuning.chosen("shallow", True):
        assert (launch.PDL, tuning.STREAM) == (True, "shallow")
    with gpu_stand_in() as record:
        gpu_tuning.main(["--shapes", "small", "--seconds", "0"])
    lines = capsys.readouterr().out.splitlines()
    named = {tuple(line.split(" us")[0].rsplit(maxsplit=1)[0].strip().split(", ")) for line in lines}
    ways = {(stream, pdl) for stream in tuning.STREAMS for pdl in ("PDL off", "PDL on")}
    assert named == {(name, *way) for name in ("experts", "layer") for way in ways}
    assert record.recordings == 2 * len(lines) and before == (launch.PDL, tuning.STREAM)
