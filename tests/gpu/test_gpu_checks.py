"""The checks that are made on a GPU, on the CPU: that they run, and that they can fail."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import gpu_checks, gpu_model_checks
from tests.gpu.test_capture import Recorder
from tests.gpu_checks import check, check_case, check_router, of_part
from tests.paths import ROOT
from twotower_kernels.bench import command
from twotower_kernels.bench.measure.device import LOST


@pytest.mark.parametrize("case", ["tiny", "odd", "sampled_filtered", "llada"])
@pytest.mark.parametrize("dtype", gpu_checks.DTYPES)
def test_steps_are_checked(case: str, dtype: torch.dtype) -> None:
    check_case("remask", "remask", case, {}, dtype, "cpu")


def test_the_router_is_checked() -> None:
    check_router("released", torch.bfloat16, "cpu")


def test_what_is_written_in_place_is_checked() -> None:
    check_case("attention", "append_kv", "indexed", {}, torch.float32, "cpu")


def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (lambda x: 2.001 * x, "2-norm of the error"),
        (lambda x: 2 * x + torch.rand_like(x), "differs from run to run"),
        (lambda x: 2 * x[:1], r"result 0: \[1\], expected \[5\]"),
        (lambda x: (2 * x, x), "shorter"),
    ],
)
def test_a_wrong_operation_is_noticed(ours: Any, message: str) -> None:
    inputs = {"x": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    check(double, double, inputs, "cpu")
    with pytest.raises((AssertionError, ValueError), match=message):
        check(ours, double, inputs, "cpu")


def test_every_check_is_in_one_part() -> None:
    labels = [label for label, _ in gpu_checks.of_operations("cuda")]
    assert len(labels) > 300 and len(set(labels)) == len(labels)
    for parts in (1, 2, 3, 4, 16):
        assert sorted(label for n in range(parts) for label in of_part(n, parts, labels)) == sorted(labels)
    for number, dtype in enumerate(gpu_checks.DTYPES):
        large = of_part(number, 16, labels)
        assert large and all("released" in label and label.endswith(str(dtype)) for label in large)
    assert of_part(3, 4, ["adaln", "model, compiled"]) == ["model, compiled", "adaln"]


PART = """#!/bin/sh
# -m tests.gpu_checks --part NUMBER PARTS ARGUMENTS... --first N
number=$4
for last; do :; done
first=$last
say() { if [ "$1" -ge "$first" ]; then echo "begins $1 check-$1"; else return 1; fi; }
say 0 && echo "said $number $6 in 0"
say 1 && case $number in 1) exit 77 ;; 2) kill -SEGV $$ ;; 3) exec sleep 60 ;; esac
say 2 && echo "said $number $6 in 2"
[ "$number" != 4 ]
"""


def test_what_ends_a_process_costs_its_own_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU that is lost, a crash, a check that says nothing any more; and one that only fails."""
    python = tmp_path / "python"
    python.write_text(PART)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu_checks, "HANGS", 2.0)
    assert gpu_checks.in_processes(5, ["--only=tiny"]) == 4
    lines = capsys.readouterr().out.splitlines()
    said = [f"said {n} --only=tiny in {check}" for n in range(5) for check in (0, 2)]
    assert sorted(line for line in lines if line.startswith("said")) == said
    failed = sorted(line.split(", or")[0] for line in lines if line.startswith("FAILED check-1: "))
    assert failed == [
        "FAILED check-1: its process ended with -11",
        "FAILED check-1: its process ended with -9",
        "FAILED check-1: the GPU is lost to its process",
    ]
    assert not any("check-0" in line or "check-2" in line for line in lines)


def test_a_lost_gpu_ends_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And an assertion that fails does not; with a first check, those before it are left out."""
    done: list[str] = []

    def check(name: str, error: type[BaseException] | None = None) -> tuple[str, Any]:
        def call() -> None:
            done.append(name)
            if error:
                raise error(name)

        return name, call

    found = [check("a"), check("b", AssertionError), check("c", RuntimeError), check("d")]
    monkeypatch.setattr(gpu_checks, "tasks", lambda device: iter(found))
    monkeypatch.setattr(gpu_checks, "lost", lambda device: done[-1] == "c")
    assert gpu_checks.run("cuda", [], 0, 1, announced=True) == LOST and done == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "begins 2 c\n" in out and "FAILED b: AssertionError" in out and "FAILED c: RuntimeError" in out
    assert gpu_checks.run("cuda", [], 0, 1, first=3) == 0 and done[-1] == "d"
    found.append(check("e", KeyboardInterrupt))
    assert gpu_checks.run("cuda", ["e"], 0, 1) == gpu_checks.INTERRUPTED
    assert "interrupted in e" in capsys.readouterr().out


@pytest.mark.parametrize("mode", gpu_model_checks.generation.MODES)
def test_text_through_graphs_is_checked(mode: str) -> None:
    record = Recorder()
    gpu_model_checks.check_text_through_graphs(mode, "cpu", record)
    assert record.recordings > 0


def test_the_models_checks_run() -> None:
    for label, run in gpu_model_checks.of_the_model("cpu"):
        if label in ("model, recorded tensors of tiny", "model, recorded text 3 of tiny", "model, compiled"):
            run()
        assert label.startswith("model, ")
    gpu_model_checks.check_agreement("M*-M-*", torch.bfloat16, "cpu")


# --- bench/gpu.sh -----------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
echo "python $*" >>"$CALLS"
case "$*" in
    *"$SLEEPS"*)
        echo "sleeping in $2"
        for folder; do [ "$previous" = --save ] && kept="$folder"; previous="$folder"; done
        trap 'echo "saved in time" >"${kept:-/dev/null}/interrupted.json"; exit 130' INT
        sleep 60 &
        wait $!
        ;;
    *"$FAILS"*) echo "failing" && exit 1 ;;
esac
while [ $# -gt 1 ]; do
    if [ "$1" = --save ]; then echo saved >"$2/result.json"; fi
    shift
done
"""
SANITIZER = """#!/bin/sh
echo "sanitizer $2, without a cache of memory: $PYTORCH_NO_CUDA_MEMORY_CACHING"
summary=ERROR
nothing="0 errors"
if [ "$2" = racecheck ]; then
    summary=RACECHECK
    nothing="0 hazards displayed (0 errors, 0 warnings)"
fi
if [ "$2" = "$FAILS" ]; then
    echo "========= $summary SUMMARY: 12 hazards displayed (2 errors, 10 warnings)"
else
    echo "========= $summary SUMMARY: $nothing"
fi
"""
# The limits are this test's own.
TIMEOUT = f"""#!/bin/sh
shift 5
exec {shutil.which("timeout")} --signal INT "$LIMIT" "$@"
"""
PROFILER = """#!/bin/sh
echo "profiled $*"
"""


def prepared(folder: Path, fails: str = "nothing", sleeps: str = "nothing", limit: int = 60) -> dict[str, str]:
    """The environment of bench/gpu.sh with programs that only tell."""
    programs = {"python": PYTHON, "compute-sanitizer": SANITIZER, "ncu": PROFILER, "timeout": TIMEOUT}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "FAILS": fails}
    environment |= {"CALLS": str(folder / "calls"), "SLEEPS": sleeps, "LIMIT": str(limit)}
    (folder / "temporary").mkdir()
    return os.environ | environment | {"OUT": str(folder / "out"), "JOBS": "16", "TMPDIR": str(folder / "temporary")}


def packed(folder: Path) -> dict[str, str]:
    """The archive's files; nothing else is in its folder, nor left behind elsewhere."""
    path = folder / "out" / "gpu.tar.gz"
    if not path.exists():
        return {}
    with tarfile.open(path) as archive:
        found = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isfile()}
        texts = {name: file.read().decode() for name, file in found.items() if file is not None}
    assert list(path.parent.iterdir()) == [path] and not list((folder / "temporary").iterdir())
    return texts


def gpu_script(
    folder: Path, part: str, fails: str = "nothing", sleeps: str = "nothing"
) -> tuple[int, list[str], dict[str, str]]:
    """Exit code, calls of Python, and the archive's files of bench/gpu.sh."""
    environment = prepared(folder, fails, sleeps, limit=60 if sleeps == "nothing" else 2)
    call = ["sh", str(ROOT / "bench" / "gpu.sh"), part]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=90)
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], packed(folder)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("whole_group", [False, True], ids=["script", "group"])
def test_an_interrupted_script_leaves_what_there_is(kind: signal.Signals, whole_group: bool, tmp_path: Path) -> None:
    """In the middle of its third part, what runs is told to come to its end, writes what it has, and is packed."""
    call = ["sh", str(ROOT / "bench" / "gpu.sh"), "all"]
    environment = prepared(tmp_path, sleeps="bench.gpu_model")
    log = tmp_path / "log"
    with log.open("w") as file:
        script = subprocess.Popen(call, env=environment, stdout=file, stderr=file, start_new_session=True)
    until = time.monotonic() + 60
    while "sleeping in" not in log.read_text():
        assert time.monotonic() < until and script.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(0.3)  # for the trap behind that line
    (os.killpg if whole_group else os.kill)(script.pid, kind)
    assert script.wait(30) == 128 + kind
    files = packed(tmp_path)
    assert {"smoke.log", "tests.log", "model.log", "setup.log"} <= set(files) and "ops.log" not in files
    assert files["interrupted.json"] == "saved in time\n" and "sleeping in" in files["model.log"]
    summary = files["summary.txt"].splitlines()
    assert [line.split(":")[0] for line in summary] == ["smoke", "tests", "interrupted", "model"]


def test_the_script_does_all_in_one_call(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")}
    code, calls, files = gpu_script(tmp_path, "all")
    assert code == 0
    assert {"setup.log", "summary.txt", "result.json", "smoke.log", "attention.log"} <= set(files)
    names = [line.split(":")[0] for line in files["summary.txt"].splitlines()]
    assert names == ["smoke", "tests", "model", "ops", "attention", "switches"]
    assert any("tests.gpu_checks --jobs 16" in call for call in calls)
    families = [family for call in calls for family in re.findall(r"--op (\w+)", call)]
    assert sorted([*families, "model"]) == sorted(command.FILES)
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")} == before


@pytest.mark.parametrize(
    "fails", ["setup.py", "bench.gpu_smoke", "tests.gpu_checks", "bench.gpu_model", "--op moe", "bench.gpu_switches"]
)
def test_the_script_goes_on_after_a_failure(fails: str, tmp_path: Path) -> None:
    """And says so, except of the CPU's kernels, which nothing here needs."""
    code, calls, files = gpu_script(tmp_path, "all", fails)
    assert code == (fails != "setup.py") and len(calls) == 7
    assert "failing" in "".join(files.values())
    assert len(files["summary.txt"].splitlines()) == 6


def test_the_script_interrupts_what_hangs_and_keeps_the_rest(tmp_path: Path) -> None:
    code, _, files = gpu_script(tmp_path, "all", sleeps="bench.gpu_model")
    assert code == 1 and "model: exit code 124" in files["summary.txt"]
    assert {"tests.log", "attention.log"} <= set(files)


def test_the_parts_fit_into_the_time() -> None:
    """What a call's parts may take together. The CPU's kernels are compiled beside the smoke test."""
    text = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    functions = dict(re.findall(r"^(\w+)\(\) \{\n(.*?)^\}", text, flags=re.DOTALL | re.MULTILINE))
    limits = {name: [int(n) for n in re.findall(r"limited (\d+)", body)] for name, body in functions.items()}
    seconds = {name: max(found) if name == "smoke" else sum(found) for name, found in limits.items() if found}
    seconds["sanitize"] *= len(re.findall(r"\w+check", text[text.index("for tool in") :].splitlines()[0]))
    for call, most in (("all", 540), ("more", 180)):
        (names,) = re.findall(rf'^{call}\) parts="([\w ]+)"', text, flags=re.MULTILINE)
        assert sum(seconds[name] for name in names.split()) <= most


@pytest.mark.parametrize("fails", ["nothing", "memcheck", "racecheck", "synccheck"])
def test_the_script_profiles_and_sanitizes(tmp_path: Path, fails: str) -> None:
    """racecheck has a summary of its own kind."""
    code, _, files = gpu_script(tmp_path, "more", fails)
    assert code == (fails != "nothing")
    assert "--clock-control none" in files["profile.log"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"sanitizer {tool}, without a cache of memory: 1" in files["sanitize.log"]


def test_the_script_knows_its_parts(tmp_path: Path) -> None:
    assert gpu_script(tmp_path, "everything")[0] == 64
