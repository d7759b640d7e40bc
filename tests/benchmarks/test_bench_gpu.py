"""What measures a GPU, run on a stand-in: that it runs, what it times how, and what it saves."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_bench_command import LIMITS
from tests.gpu.gpu_stand_in import gpu_stand_in
from tests.gpu.test_capture import Recorder
from tests.model.random_models import SIZES
from twotower_kernels import TwoTowerConfig
from twotower_kernels.bench import ceilings, command, gpu_clock, gpu_model
from twotower_kernels.bench.bench_remask import best_of
from twotower_kernels.bench.timing import ORIGINAL, OURS


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


def test_a_model_is_cut_to_what_fits() -> None:
    assert gpu_model.largest(150 * 10**9) == gpu_model.RELEASED
    half = gpu_model.largest(75 * 10**9)
    assert gpu_model.RELEASED.startswith(half) and 20 < len(half) < 40
    with pytest.raises(SystemExit, match="no layer fits into 1 GB"):
        gpu_model.largest(10**9)
