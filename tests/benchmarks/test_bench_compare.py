"""The comparison of two commits: its arithmetic, and what it says of wrong arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from twotower_kernels.bench import compare
from twotower_kernels.bench.compare import ratios, table

CASE, OTHER = ("moe_gate", "N 16", "float64"), ("remask", "16 × 8", "float32")


def test_ratios_are_taken_within_each_round() -> None:
    base = [{CASE: 3.0, OTHER: 1.0}, {CASE: 30.0, OTHER: 1.0}, {CASE: 8.0, OTHER: 1.0}]
    head = [{CASE: 1.0}, {CASE: 20.0}, {CASE: 4.0}]
    assert ratios(base, head) == {CASE: (4.0, 2.0, 1.5, 3.0)}
    assert table(ratios(base, head), "before", "after").row_count == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["no-such-commit"], "expected two commits"),
        (["HEAD", "--rounds", "0"], "expected an integer from 1 to 1000, got '0'"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench.compare", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("fits", [True, False])
def test_a_commit_gets_these_benchmarks_where_they_fit(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, without what its own were; an older layout of the package keeps its own."""
    folder = tmp_path / "build" / "compare" / "abc"
    for path in (tmp_path / "bench" / "cases" / "new.py", folder / "bench" / "old.py"):
        path.parent.mkdir(parents=True)
        path.touch()
    if fits:
        (folder / "twotower_kernels" / "options").mkdir(parents=True)
        (folder / "twotower_kernels" / "options" / "flags.py").touch()
    built: list[Path] = []
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, cwd, check: built.append(cwd))
    assert compare.prepared("abc") == folder and built == [folder]
    names = {path.name for path in (folder / "bench").rglob("*.py")}
    assert names == ({"new.py"} if fits else {"old.py"})
    assert ("abc: older than this layout" in capsys.readouterr().err) == (not fits)
