"""Every run draws the same examples, and what a search finds is kept and replayed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

CONFTEST = """
from pathlib import Path
from tests import found
found.FOLDER = Path(__file__).parent / "found"
from tests.conftest import *
"""
PROPERTIES = """
import os
from pathlib import Path
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

numbers = st.lists(st.integers(), min_size=3) if "OTHERWISE" in os.environ else st.integers(0, 10**6)

@pytest.mark.parametrize("limit", [10**9, 1000])
@settings(max_examples=100 if "SEARCH" in os.environ else 1)
@given(x=numbers)
def test_small(x, limit):
    assert "OTHERWISE" in os.environ or "MENDED" in os.environ or x < limit

@settings(max_examples=50)
@given(n=st.integers(), x=st.floats(), text=st.text(), some=st.lists(st.sampled_from("abc")))
def test_draws(n, x, text, some):
    with Path(os.environ["DRAWN"]).open("a") as file:
        print(ascii((n, x, text, some)), file=file)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(PROPERTIES)
    return tmp_path


def run(folder: Path, *arguments: str, **variables: str) -> tuple[str, str]:
    """What pytest printed, and what was drawn."""
    drawn = folder / "drawn"
    drawn.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTHONPATH": str(ROOT), "DRAWN": str(drawn), **variables}
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={folder}", "-p", "no:xdist", *arguments, "test_it.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "error" not in done.stdout.splitlines()[-1], done.stdout + done.stderr
    return done.stdout, drawn.read_text() if drawn.exists() else ""


@pytest.mark.thorough
def test_the_same_examples_are_drawn_every_time(folder: Path) -> None:
    first = run(folder, "-k", "draws")[1]
    assert len(first.splitlines()) >= 20
    (folder / "constants.py").write_text("NUMBERS = [123456789, 987654321.5, 'a constant of some module']\n")
    again = run(folder, "-k", "draws", "-p", "constants", CI="true", PYTHONPATH=f"{ROOT}:{folder}")[1]
    assert again == first
    assert run(folder, "-k", "draws", "--hypothesis-profile=fuzz")[1] != first
    assert not (folder / ".hypothesis" / "examples").exists()


@pytest.mark.thorough
def test_what_is_found_is_kept_and_replayed(folder: Path) -> None:
    search = ("-k", "small", "--hypothesis-profile=fuzz")
    assert "1 failed, 1 passed" in run(folder, *search, SEARCH="1")[0]
    (path,) = (folder / "found").iterdir()
    kept = json.loads(path.read_text())
    assert kept["test"] == "test_it.py::test_small[1000]"
    assert {line.strip() for line in kept["example"][1:]} == {"x=1000,", "limit=1000,", ")"}
    said = run(folder, "-k", "small")[0]  # which draws 0 alone
    assert "1 failed, 1 passed" in said and "x=1000" in said
    assert "2 passed" in run(folder, "-k", "small", MENDED="1")[0]
    said = run(folder, "-k", "small", OTHERWISE="1")[0]
    assert "1 failed, 1 passed" in said and f"{path.name} is no longer replayed" in said
