"""The report of a machine: what a part may do to it, what it must not say, and the page that it makes."""

import json
import os
import re
import socket
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks.test_bench_command import LIMITS
from tests.gpu.gpu_stand_in import gpu_stand_in
from tests.model.small_model import save_small_model
from tests.paths import ROOT
from tests.program.command_line import run
from twotower_kernels.bench import command as benchmarks
from twotower_kernels.bench import gpu_smoke
from twotower_kernels.bench.checks import command as checks
from twotower_kernels.bench.gpu_report import beside, command, machine, runner, writing
from twotower_kernels.bench.gpu_report.page import page
from twotower_kernels.bench.gpu_report.parts import BENCH, Part, parts
from twotower_kernels.bench.gpu_report.privacy import anonymous, cleaned
from twotower_kernels.bench.measure import ceilings

CHECKS = {"device": "cpu", "checks": 5, "held": 2, "seconds": 1.0, "refused": [{"check": "c[d]", "why": "no | kernel"}]}
CHECKS |= {"failed": [{"check": "a[b] torch.float32", "why": "AssertionError: off"}]}
# Programs in place of parts: `save` and `begun` are theirs to use.
HEAD = """
import json, os, signal, sys, time
folder = sys.argv[-1]
def save(value): json.dump(value, open(os.path.join(folder, "result.json"), "w"))
open(os.environ["CALLS"], "a").write(NAME + "\\n")
"""
HANGS = "signal.signal(signal.SIGINT, signal.SIG_IGN); save({'half': 1}); print('asleep', flush=True); time.sleep(60)"
PROGRAMS = {
    "machine": "save({'gpu': None, 'processor': 'a processor'})",
    "ceilings": f"save({asdict(LIMITS)!r})",
    "checks": f"save({CHECKS!r}); sys.exit(1)",
    "hangs": HANGS,
    "crashes": "print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "loses": "print('an illegal access'); sys.exit(77)",
    "waits": "print('waits'); time.sleep(60)",
}


def programs(*names: str) -> list[Part]:
    """Parts of these names, which run the programs above."""
    limits = {"hangs": 1.0}
    return [
        Part(name, f"the {name}", ["-c", f"NAME = {name!r}{HEAD}{PROGRAMS[name]}"], limits.get(name, 30), "result.json")
        for name in names
    ]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which every program adds its name; waiting is short."""
    monkeypatch.setattr(runner, "GRACE", 0.5)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def report_of(folder: Path) -> tuple[dict[str, Any], str]:
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md"}
    return json.loads((folder / "report.json").read_text("utf-8")), (folder / "report.md").read_text("utf-8")


def assert_well_formed(text: str) -> None:
    """Of a page: one title, tables whose rows have as many cells as their header, fences that are closed."""
    assert text.startswith("# ") and len(re.findall(r"^# ", text, re.MULTILINE)) == 1 and text.endswith("\n")
    pieces = text.split("\n```")
    assert len(pieces) % 2 == 1
    columns, before = 0, ""
    for line in "\n".join(pieces[::2]).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        if line.startswith("|"):
            assert line.endswith("|") and (cells == columns if columns else not before), line
            columns = cells
        else:
            assert not columns or not line, line  # a table ends with an empty line
            columns = 0
        before = line


# --- what a part may do -----------------------------------------------------------------------------------------------


def test_a_report_survives_its_parts(calls: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """One fails a check, one hangs, one crashes, one loses the GPU: each is named, and costs itself alone. Going on
    with the report tries again what did not come to its end, and nothing else."""
    names = ("machine", "ceilings", "checks", "hangs", "crashes", "loses")
    monkeypatch.setattr(command, "parts", lambda device: programs(*names))
    folder = tmp_path / "out"
    assert command.main(["--device", "cpu", "--out", str(folder)]) == 1
    report, text = report_of(folder)
    states = {entry["part"]: entry["state"] for entry in report["parts"]}
    assert list(states) == list(names) and not report["finished"]
    assert list(states.values()) == ["held", "held", "failed", "hung", "crashed", "crashed"]
    of = {entry["part"]: entry for entry in report["parts"]}
    assert of["hangs"]["result"] == {"half": 1} and of["hangs"]["said"] == ["asleep"]
    assert of["crashes"]["signal"] == "SIGSEGV" and of["crashes"]["said"] == ["before"]
    assert of["checks"]["result"] == CHECKS and beside.machine_of(report) is not None
    out = capsys.readouterr().out
    assert f"attached to an issue of twotower_kernels: {folder / 'report.json'}" in out and "--resume" in out
    assert_well_formed(text)
    for words in (
        "a[b] torch.float32",
        "no \\| kernel",
        "hung: ended",
        "crashed: SIGSEGV",
        "lost",
        "an illegal access",
    ):
        assert words in text

    assert calls.read_text().split() == list(names)
    monkeypatch.setitem(PROGRAMS, "hangs", "save({'whole': 1})")
    monkeypatch.setitem(PROGRAMS, "crashes", "save({'whole': 2})")
    monkeypatch.setitem(PROGRAMS, "loses", "save({'whole': 3})")
    assert command.main(["--device", "cpu", "--out", str(folder), "--resume"]) == 1  # a check has failed still
    report, text = report_of(folder)
    assert calls.read_text().split()[len(names) :] == ["hangs", "crashes", "loses"]
    assert [entry["part"] for entry in report["parts"]] == list(names) and report["finished"]
    assert "kept, held" in capsys.readouterr().out and "hung" not in text
    assert command.main(["--device", "cpu", "--out", str(folder), "--resume", "--part", "machine"]) == 0
    assert report_of(folder)[0] == report and len(calls.read_text().split()) == len(names) + 3


def test_an_interrupted_report_is_whole(calls: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """By Ctrl-C in its second part: what runs is ended, what there is is saved."""
    monkeypatch.setattr(command, "parts", lambda device: programs("machine", "waits", "checks"))

    def interrupted(*arguments: Any) -> bool:
        if arguments[1].name == "waits":
            raise KeyboardInterrupt
        return waited(*arguments)

    waited = runner._waited
    monkeypatch.setattr(runner, "_waited", interrupted)
    assert command.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == command.STOPPED
    report, text = report_of(tmp_path / "out")
    assert [entry["state"] for entry in report["parts"]] == ["held", "interrupted"] and not report["finished"]
    assert_well_formed(text)


def test_what_cannot_begin_is_told_in_a_line(
    calls: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "parts", lambda device: programs("machine"))
    folder = tmp_path / "out"
    assert run("gpu-report", "--device", "cpu", "--out", folder) == 0
    capsys.readouterr()
    for words, message in (
        ([], "holds a report already; --resume"),
        (["--part", "other"], "--part: expected machine, got other"),
        (["--resume", "--out", tmp_path / "none"], "--resume: expected a report in"),
        (["--device", "cuda"], "expected a GPU, PyTorch sees none"),
    ):
        words = ["--device", "cpu", "--out", folder, *words]
        assert run("gpu-report", *words) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    report = json.loads((folder / "report.json").read_text("utf-8"))
    (folder / "report.json").write_text(json.dumps(report | {"twotower_kernels": "0"}), encoding="utf-8")
    assert run("gpu-report", "--device", "cpu", "--out", folder, "--resume") == 2
    assert "expected twotower_kernels" in capsys.readouterr().err


# --- what it must not say ---------------------------------------------------------------------------------------------

HOME, USER, HOST = "/people/zaphod-b", "zaphod-b", "betelgeuse"
UUID = "GPU-1b2c3d4e-0a1b-2c3d-4e5f-0123456789ab"


def test_a_report_says_nothing_of_its_maker(calls: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither what parts print nor what they find."""
    folder = tmp_path / "somewhere of mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", HOME)
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example.org")
    installed = f"{HOME}/.venv/lib/python3.12/site-packages/torch/cuda/__init__.py"
    told = [f'File "{installed}", line 3', f"{USER}@{HOST} {UUID} at 00000000:65:00.0, 10.0.17.4", str(folder)]
    told += [f"no such file: /srv/{USER}/secret/kept.json; 3 GB/s and 1/2 µs", f"by {USER} on {HOST}: ~/x/y.py"]
    program = f"save({{'list': {told!r}, 'nested': {{'a': [{told!r}]}}}}); print(*{told!r}, sep='\\n')"
    monkeypatch.setitem(PROGRAMS, "machine", f"save({{'gpu': {told[1]!r}}})")
    monkeypatch.setitem(PROGRAMS, "crashes", program + "; sys.exit(9)")
    monkeypatch.setattr(command, "parts", lambda device: programs("machine", "crashes"))
    assert command.main(["--device", "cpu"]) == 1
    report, text = report_of(folder / command.FOLDER)
    for written in (json.dumps(report, ensure_ascii=False), text):
        for secret in (
            HOME,
            USER,
            HOST,
            UUID[4:],
            "65:00",
            "10.0.17.4",
            "somewhere of mine",
            "secret",
            "/srv",
            ".venv",
        ):
            assert secret not in written, secret
    said = "\n".join(report["parts"][1]["said"])
    assert 'File "torch/cuda/__init__.py", line 3' in said and "kept.json; 3 GB/s and 1/2 µs" in said
    assert_well_formed(text)


@pytest.mark.parametrize(
    "text",
    ["moe_experts[odd] torch.float32", "driver 580.95.05, VBIOS 96.00.74.00.01", "a/b, GB/s; 12/16", "B 1, S 16"],
)
def test_facts_stay_as_they_are(text: str) -> None:
    assert anonymous(text) == text


def test_numbers_that_json_lacks_are_texts() -> None:
    assert cleaned({"a": [float("inf"), float("nan"), 1.5, None, True]}) == {"a": ["inf", "nan", 1.5, None, True]}


# --- what it says ----------------------------------------------------------------------------------------------------

NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *ecc.mode.current,*) exit 6 ;;  # a driver that does not know them all
    *power.limit*) echo "700.00 W" ;;
    *driver_version*) echo "580.95.05" ;;
    *) exit 6 ;;
esac
"""


def test_the_parts_are_programs_that_there_are() -> None:
    """With the arguments that they take; those of a GPU are more."""
    readers = {BENCH: benchmarks.parser(), f"{BENCH}.checks": checks.parser("")}
    for device in ("cpu", "cuda"):
        found = parts(device)
        assert len({part.name for part in found}) == len(found)
        for part in found:
            assert part.words[0] == "-m"
            path = ROOT.joinpath(*part.words[1].split(".")[1:])
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
            if part.words[1] in readers:
                options = readers[part.words[1]].parse_args([*part.words[2:], "--save", "folder"])
                assert options.device == device
    assert {part.name for part in parts("cuda")} - {part.name for part in parts("cpu")} == {
        "smoke",
        "model",
        "switches",
    }


def test_the_page_of_a_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    """From what the programs save on the stand-in: facts of the card, first calls, times beside predictions."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    limits = replace(LIMITS, device="cuda")
    monkeypatch.setattr(ceilings, "measure", lambda device: limits)
    folder = save_small_model(tmp_path / "model")
    monkeypatch.setattr(writing.tt, "demo_path", lambda: folder)
    monkeypatch.setattr(writing, "BEGINNING", [1, 3])
    monkeypatch.setattr(writing, "NEW", 4)
    with gpu_stand_in():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200 NVL")
        save = ["--save", str(tmp_path)]
        assert machine.main(["--device", "cuda", *save]) == ceilings.main(["--device", "cuda", *save]) == 0
        assert gpu_smoke.main(["--only", "moe_plan", *save]) == 0
        words = ["--device", "cuda", "--op", "adaln", "--shapes", "small", "--batch", "1", "--seconds", "0"]
        assert benchmarks.main([*words, *save, "--name", "times", "--baselines", "best"]) == 0
        monkeypatch.setattr(writing.tt.TwoTowerModel, "generate", _generated)
        assert writing.main(["--device", "cpu", *save]) == 0
    steps = {"batch": 1, "context": 4096, "step seconds": 0.01, "commit seconds": 0.009, "experts hit per layer": 69.0}
    steps |= {"autoregressive step seconds": 0.003, "autoregressive experts hit per layer": 6.0}
    ways = [
        {"program": "moe layer", "way": "as shipped", "seconds": 1e-4},
        {"program": "x", "way": "y", "wrong": "bits"},
    ]
    given: dict[str, Any] = {
        "checks": CHECKS,
        "model": {"layers": "MEM*E", "results": [steps]},
        "switches": {"rows": ways},
    }
    for name in ("machine", "ceilings", "smoke", "writing"):
        given[name] = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    given["times of adaln"] = json.loads((tmp_path / "times.json").read_text("utf-8"))
    entries = [
        {"part": name, "title": name, "state": "held", "seconds": 1, "said": [], "result": value}
        for name, value in given.items()
    ]
    report = command.begun("cuda") | {"parts": cleaned(entries), "finished": True}
    text = page(json.loads(json.dumps(report)))
    assert_well_formed(text)
    assert given["machine"]["nvidia-smi"] == {"driver_version": "580.95.05", "power.limit": "700.00 W"}
    for words in ("700.00 W", "580.95.05", "those of H200 SXM", "moe_plan", "gated_residual_adaln_norm", "moe layer"):
        assert words in text, words
    for timed in beside.timed(report):
        assert 0 < timed.times.from_data_sheet < timed.times.predicted and timed.ratio is not None
    passes = {found.what: found for found in beside.steps(report)}
    assert passes["step, batch 1, context 4096"].measured == 0.01
    assert (
        passes["step, batch 1, context 4096"].predicted > passes["autoregressive step, batch 1, context 4096"].predicted
    )
    for mode, *_, predicted in beside.writing(report):
        if mode == "speculative":  # how much of a draft is accepted is not known beforehand
            assert predicted is None
        else:
            assert mode in ("mask_diffusion", "mock_ar", "ar") and predicted is not None and predicted > 0


def _generated(self: Any, prompts: Any, *, mode: str, max_new_tokens: int) -> Any:
    assert len(prompts) in (1, 4)
    return SimpleNamespace(seconds=0.5, tokens_per_nfe=1.5)


def test_a_part_runs_from_its_folder(tmp_path: Path) -> None:
    """A real one, in a process of its own: it finds this package, whatever lies in the folder around."""
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')")
    (found,) = [part for part in parts("cpu") if part.name == "machine"]
    entry = runner.run_part(found, tmp_path, print)
    assert entry["state"] == "held" and entry["result"]["torch"] == torch.__version__
    assert entry["result"]["versions"]["numpy"] and "gpu" in entry["result"]
    assert {path.name for path in tmp_path.iterdir()} == {"torch.py"}
