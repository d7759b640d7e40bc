"""What measures a GPU, run on a stand-in: that it runs, what it times how, and what it saves."""

import importlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from tests.benchmarks.test_bench_command import LIMITS
from tests.gpu.gpu_stand_in import gpu_stand_in
from tests.gpu.test_capture import Recorder
from twotower_kernels import TwoTowerConfig
from twotower_kernels.bench import command, gpu_model, gpu_smoke, gpu_switches
from twotower_kernels.bench.cases.remask import best_of
from twotower_kernels.bench.checks.random_models import SIZES
from twotower_kernels.bench.measure import ceilings, gpu_clock, switches
from twotower_kernels.bench.measure.device import LOST, lost
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS
from twotower_kernels.cuda import build as cuda

FAMILIES = gpu_smoke.FAMILIES


def cases_of(family: str) -> dict[str, Any]:
    """An operation's named cases, by its name."""
    cases: dict[str, Any] = importlib.import_module(f"twotower_kernels.reference.{family}").CASES
    return cases


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device: replace(LIMITS, device=device))
    monkeypatch.setattr("twotower_kernels.bench.cases.remask.compiled_best_of", best_of)
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
    options = command.parser().parse_args(["--device", "cuda", "--baselines", "none"])
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
    assert sum(line.startswith("adaln_norm") and "WRONG, off by 0.1" in line for line in lines) == 3
    assert sum(line.startswith("gated_residual") and "FAILED, ZeroDivisionError" in line for line in lines) == 2
    assert sum(line.startswith("rms_norm") and "off by" in line for line in lines) == 1


def test_a_lost_gpu_is_left_to_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which begins behind the case that lost it, and counts on."""
    monkeypatch.setattr(tt, "adaln_norm", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(gpu_smoke, "lost", lambda: True)
    commands: list[list[str]] = []

    def becomes(path: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", becomes)
    with gpu_stand_in(), pytest.raises(SystemExit):
        gpu_smoke.main(["--only", "adaln_norm", "--only", "rms_norm", "--failed", "3"])
    names = [op for _, op, _ in gpu_smoke.cases()]
    (command,) = commands
    behind = names.index("adaln_norm") + 1
    assert command[3:] == ["--first", str(behind), "--failed", "4", "--only", "adaln_norm", "--only", "rms_norm"]
    capsys.readouterr()
    with gpu_stand_in():
        assert gpu_smoke.main(["--first", str(names.index("gated_residual")), "--only", "gated_residual"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith("gated_residual") for line in said)


def test_what_a_lost_gpu_leaves_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the command, which names what was not measured."""
    monkeypatch.setattr(tt, "gated_residual_adaln_norm", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(command, "lost", lambda device: device == "cuda")
    options = ["--device", "cuda", "--op", "adaln", "--op", "linear", "--shapes", "small", "--batch", "1"]
    with gpu_stand_in():
        assert command.main([*options, "--seconds", "0", "--save", str(tmp_path), "--name", "run"]) == LOST
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert [result["op"] for result in run["results"]] == ["adaln_norm"]
    assert [(s["op"], s["reason"]) for s in run["skipped"]][-1] == ("linear", "the GPU was lost to this process before")


def test_what_was_measured_is_on_the_disk_after_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is killed comes to no end at which it could write."""
    seen: list[int] = []
    real = command.measure

    def measure(*arguments: Any) -> Any:
        path = tmp_path / "run.json"
        seen.append(len(json.loads(path.read_text(encoding="utf-8"))["results"]) if path.exists() else 0)
        return real(*arguments)

    monkeypatch.setattr(command, "measure", measure)
    command.main(["--op", "adaln", "--shapes", "small", "--seconds", "0", "--save", str(tmp_path), "--name", "run"])
    assert seen == [0, 1, 2, 3, 4]


def test_a_gpu_that_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu_stand_in():
        assert not lost() and not lost("cpu")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
        assert lost() and not lost("cpu")


# --- what only measurement can decide ---------------------------------------------------------------------------------


def constants(**names: Any) -> Any:
    return SimpleNamespace(**names)


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launchers with a switch, and experts with two ways to stream."""
    found = {"triton.launch": constants(PDL=False), "cuda.build": constants(PDL=False)}
    found["triton.moe_tuning"] = constants(STREAMS={"deep": 1, "shallow": 2}, STREAM="deep")
    monkeypatch.setattr(switches, "_module", found.get)
    return found


def test_the_ways_are_those_that_there_are(both_ways: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = switches.ways()
    assert [way.name for way in ways] == ["as shipped", "PDL off", "PDL on", "STREAM deep", "STREAM shallow"]
    launch, build, moe = (both_ways[name] for name in ("triton.launch", "cuda.build", "triton.moe_tuning"))
    with ways[2].taken():
        assert launch.PDL and build.PDL and moe.STREAM == "deep"
    with ways[4].taken():
        assert not launch.PDL and moe.STREAM == "shallow"
    assert (launch.PDL, build.PDL, moe.STREAM) == (False, False, "deep")
    del both_ways["cuda.build"], both_ways["triton.moe_tuning"]
    assert [way.name for way in switches.ways()] == ["as shipped", "PDL off", "PDL on"]
    monkeypatch.setattr(switches, "_module", lambda name: constants())
    assert [way.name for way in switches.ways()] == ["as shipped"]


def test_every_way_is_compared_and_timed(both_ways: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gpu_stand_in() as record:
        assert gpu_switches.main(["--shapes", "small", "--seconds", "0", "--save", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "switches.json").read_text(encoding="utf-8"))["rows"]
    programs = {row["program"].split(",")[0] for row in rows}
    assert programs == {
        "moe layer", "mamba layer", "moe_experts", "moe_gate + moe_route", "gated_residual_adaln_norm", "mamba2_scan",
        "gated_rms_norm", "block_attention", "remask",
    }  # fmt: skip
    assert len(rows) == 5 * len(programs) and all(row["seconds"] > 0 for row in rows)
    assert record.recordings == 2 * len(rows)  # with and without what clears the cache
    assert "× as fast as shipped" in capsys.readouterr().out


def test_a_way_with_other_bits_is_named_and_not_timed(
    both_ways: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, launch = tt.mamba2_scan, both_ways["triton.launch"]
    monkeypatch.setattr(tt, "mamba2_scan", lambda **k: right(**k) * (1.01 if launch.PDL else 1))
    with gpu_stand_in():
        assert gpu_switches.main(["--shapes", "small", "--seconds", "0", "--save", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "switches.json").read_text(encoding="utf-8"))["rows"]
    wrong = {(row["program"].split(",")[0], row["way"]) for row in rows if "seconds" not in row}
    assert wrong == {("mamba layer", "PDL on"), ("mamba2_scan", "PDL on")}
    assert capsys.readouterr().out.count("WRONG: AssertionError: other bits than as shipped") == 2


def test_a_step_of_the_model_is_timed_every_way(
    both_ways: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_model, "config", lambda pattern: TwoTowerConfig(**SIZES, hybrid_override_pattern="M*E-"))
    with gpu_stand_in():
        assert gpu_model.main(["--save", str(tmp_path), "--size", "1,9"]) == 0
    (row,) = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))["results"]
    assert set(row["step seconds by way"]) == {"PDL off", "PDL on", "STREAM deep", "STREAM shallow"}
    assert "step, PDL on: " in capsys.readouterr().out


def test_a_size_that_fails_leaves_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_model, "config", lambda pattern: TwoTowerConfig(**SIZES, hybrid_override_pattern="M*E-"))
    drawn = gpu_model.random_state

    def too_large(model: Any, batch: int, context: int) -> Any:
        if context == 9:
            raise torch.OutOfMemoryError("too large")
        return drawn(model, batch, context)

    monkeypatch.setattr(gpu_model, "random_state", too_large)
    sizes = ["--size", "1,9", "--size", "1,10"]
    with gpu_stand_in():
        assert gpu_model.main(["--save", str(tmp_path), *sizes]) == 1
        run = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
        assert [row["context"] for row in run["results"]] == [10]
        assert "FAILED B 1, context 9: too large" in capsys.readouterr().out
        monkeypatch.setattr(gpu_model, "lost", lambda: True)
        assert gpu_model.main(sizes) == LOST


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


def test_what_only_measurement_decides_is_there_to_compare() -> None:
    """The kernels' own constants, under the names by which they are compared."""
    from twotower_kernels.triton import launch, moe_tuning

    ways = {way.name: way for way in switches.ways()}
    assert list(ways) == ["as shipped", "PDL off", "PDL on", *(f"STREAM {name}" for name in moe_tuning.STREAMS)]
    before = launch.PDL, cuda.PDL, moe_tuning.STREAM
    with ways["PDL on"].taken(), ways["STREAM shallow"].taken():
        assert (launch.PDL, cuda.PDL, moe_tuning.STREAM) == (True, True, "shallow")
    assert before == (launch.PDL, cuda.PDL, moe_tuning.STREAM)
