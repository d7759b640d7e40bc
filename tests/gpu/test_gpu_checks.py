"""The checks that are made on a GPU, on the CPU: that they run, and that they can fail."""

import os
import subprocess
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
    for parts in (1, 2, 5):
        assert sorted(label for n in range(parts) for label in of_part(n, parts, labels)) == sorted(labels)
    assert all("released" in label for label in of_part(0, 3, labels))


def test_a_process_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        number = command[command.index("--part") + 1]
        return subprocess.CompletedProcess(command, int(number == "1"), stdout=f"said {number} {command[-1]}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_checks.in_processes(3, ["--only=tiny"]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [f"said {n} --only=tiny" for n in range(3)]


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
    -c*) echo h200 ;;
    *"$FAILS"*) exit 1 ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "sanitizer $2 $FAILS"
if [ "$2" = "$FAILS" ]; then echo "ERROR SUMMARY: 2 errors"; exit 1; fi
echo "ERROR SUMMARY: 0 errors"
"""


def gpu_script(folder: Path, part: str, fails: str = "nothing") -> tuple[int, list[str], str]:
    """Exit code, calls of Python, and output of bench/gpu.sh with a Python and a sanitizer that only tell."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    environment |= {"CALLS": str(folder / "calls"), "FAILS": fails}
    call = ["sh", str(ROOT / "bench" / "gpu.sh"), part]
    done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    return done.returncode, (folder / "calls").read_text().splitlines()[2:], done.stdout


def test_the_script_measures_every_family(tmp_path: Path) -> None:
    code, calls, _ = gpu_script(tmp_path, "ops")
    assert code == 0
    families = [call.split("--op ")[1].split()[0] for call in calls]
    assert sorted([*families, "model"]) == sorted(command.FILES)
    assert all("--device cuda" in call and call.split("--save ")[1].startswith("bench/results/h200") for call in calls)


def test_the_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    code, calls, output = gpu_script(tmp_path, "ops", fails="--op moe")
    assert code == 1 and len(calls) == 6 and "exit code 1" in output


@pytest.mark.parametrize(("fails", "code"), [("nothing", 0), ("tests.gpu_checks", 1), ("racecheck", 1)])
def test_the_script_checks_and_sanitizes(tmp_path: Path, fails: str, code: int) -> None:
    got, calls, output = gpu_script(tmp_path, "tests", fails)
    assert got == code and "tests.gpu_checks --jobs" in calls[0]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"sanitizer {tool}" in output


def test_the_script_knows_its_parts(tmp_path: Path) -> None:
    assert gpu_script(tmp_path, "everything")[0] == 2
