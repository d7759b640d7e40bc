"""The checks that are made on a GPU, on the CPU: that they run, and that they can fail."""

import json
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

from tests.gpu.test_capture import Recorder
from tests.paths import ROOT
from twotower_kernels.bench import command
from twotower_kernels.bench.checks import command as checks
from twotower_kernels.bench.checks import model, operations, processes
from twotower_kernels.bench.checks.operations import check, check_case, check_router
from twotower_kernels.bench.checks.processes import Tally
from twotower_kernels.bench.measure.device import LOST


@pytest.mark.parametrize("case", ["tiny", "odd", "sampled_filtered", "llada"])
@pytest.mark.parametrize("dtype", operations.DTYPES)
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


def test_every_check_is_in_one_share() -> None:
    labels = [label for label, _ in operations.of_operations("cuda")]
    assert len(labels) > 300 and len(set(labels)) == len(labels)
    for shares in (1, 2, 3, 4, 16):
        assert sorted(label for n in range(shares) for label in checks.of_share(n, shares, labels)) == sorted(labels)
    for number, dtype in enumerate(operations.DTYPES):
        large = checks.of_share(number, 16, labels)
        assert large and all("released" in label and label.endswith(str(dtype)) for label in large)
    assert checks.of_share(3, 4, ["adaln", "model, compiled"]) == ["model, compiled", "adaln"]


def test_devices_are_asked_what_they_have_kernels_for() -> None:
    """A processor everything, but the largest cases; a GPU what it has a kernel for, and its graphs; Triton's
    interpreter what Triton compiles."""
    found = {device: [label for label, _ in checks.tasks(device)] for device in ("cpu", "cuda")}
    assert [label for label in found["cuda"] if "through graphs" in label] and not any(
        "linear[" in x for x in found["cuda"]
    )
    assert any("linear[" in x for x in found["cpu"]) and not any("through graphs" in x for x in found["cpu"])
    refused = 0
    for label, run in operations.of_operations("cpu"):
        if run is operations.too_large:
            refused += 1
            assert "released" in label
    assert refused == 15
    interpreted = [label for label, _ in checks.tasks("cpu", interpreted=True)]
    assert interpreted and not any(word in label for label in interpreted for word in ("moe_gate", "released", "model"))


SHARE = """#!/bin/sh
# -m PROGRAM --device cuda --only=tiny --share NUMBER SHARES --first N
number=$7
for last; do :; done
first=$last
say() { if [ "$1" -ge "$first" ]; then echo "begins $1 check-$number-$1"; else return 1; fi; }
say 0 && echo held && echo "said $number $5 in 0"
say 1 && case $number in
    1) echo "FAILED check-1-1: GpuError: lost" && exit 77 ;;
    2) kill -SEGV $$ ;;
    3) exec sleep 60 ;;
    *) echo "refused check-$number-1: no kernel" ;;
esac
say 2 && if [ "$number" = 4 ]; then echo "FAILED check-4-2: off" && exit 1; else echo held; fi
"""


def test_what_ends_a_process_costs_its_own_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU that is lost, a crash, a check that says nothing any more; and one that only fails. What is found is
    counted, and saved."""
    python = tmp_path / "python"
    python.write_text(SHARE)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(processes, "HANGS", 2.0)
    tally = Tally("cuda", 16, tmp_path / "checks.json")
    assert processes.in_processes(5, [*checks.PROGRAM, "--device", "cuda", "--only=tiny"], tally) == 4
    tally.save()
    saved = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert (saved["checks"], saved["held"]) == (16, 9) and str(tally).startswith("9 of 16 checks held, 4 failed, 2 ref")
    assert "1 without a result" in str(tally)
    assert {entry["check"]: entry["why"].split(", or")[0] for entry in saved["failed"]} == {
        "check-1-1": "GpuError: lost",
        "check-2-1": "its process ended with -11",
        "check-3-1": "its process ended with -9",
        "check-4-2": "off",
    }
    assert sorted(entry["check"] for entry in saved["refused"]) == ["check-0-1", "check-4-1"]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith("said")) == [f"said {n} --only=tiny in 0" for n in range(5)]
    assert "FAILED check-1-1: the GPU is lost to its process" in "\n".join(lines)
    assert not any(line.startswith(("begins", "held")) for line in lines)


def test_a_lost_gpu_ends_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And an assertion that fails does not; with a first check, those before it are left out."""
    done: list[str] = []

    def check(name: str, error: type[BaseException] | None = None) -> tuple[str, Any]:
        def call() -> None:
            done.append(name)
            if error:
                raise error(name)

        return name, call

    errors = {"b": AssertionError, "c": torch.OutOfMemoryError, "d": RuntimeError}
    found = [check(name, errors.get(name)) for name in "abcde"]
    monkeypatch.setattr(checks, "lost", lambda device: done[-1] == "d")
    assert checks.run(found, "cuda") == LOST and done == ["a", "b", "c", "d"]
    out = capsys.readouterr().out
    assert "begins 0 a\nheld\n" in out and "begins 3 d\n" in out and "refused c: c\n" in out
    assert "FAILED b: AssertionError: b\n" in out and "FAILED d: RuntimeError: d\n" in out
    assert checks.run(found, "cuda", first=4) == 0 and done[-1] == "e"
    assert checks.run([check("f", KeyboardInterrupt)], "cuda") == processes.INTERRUPTED
    assert "interrupted in f" in capsys.readouterr().out


def test_the_command_checks_a_processor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; and says in a line what it cannot do."""
    words = ["--device", "cpu", "--only", "moe_plan[released", "--jobs", "1", "--save", str(tmp_path)]
    assert checks.main(words) == 0
    assert "3 of 3 checks held, 0 failed" in capfd.readouterr().out
    assert json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))["held"] == 3
    for words, message in ((["--device", "cpu", "--only", "no such"], "no check's label"), ([], "PyTorch sees none")):
        with pytest.raises(SystemExit) as ended:
            checks.main(words)
        assert ended.value.code == 2 and message in capfd.readouterr().err


@pytest.mark.parametrize("mode", model.generation.MODES)
def test_text_through_graphs_is_checked(mode: str) -> None:
    record = Recorder()
    model.check_text_through_graphs(mode, "cpu", record)
    assert record.recordings > 0


def test_the_models_checks_run() -> None:
    for label, run in model.of_the_model("cpu"):
        some = "recorded tensors of tiny", "recorded text 3 of tiny", "compiled", "ar of the shipped one"
        if label in [f"model, {name}" for name in some]:
            run()
        assert label.startswith("model, ")
    model.check_agreement("M*-M-*", torch.bfloat16, "cpu")


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
    assert any("bench.checks --device cuda --jobs 16" in call for call in calls)
    families = [family for call in calls for family in re.findall(r"--op (\w+)", call)]
    assert sorted([*families, "model"]) == sorted(command.FILES)
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")} == before


@pytest.mark.parametrize(
    "fails", ["setup.py", "bench.gpu_smoke", "bench.checks", "bench.gpu_model", "--op moe", "bench.gpu_switches"]
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
