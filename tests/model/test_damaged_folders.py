"""Folders damaged at random cost one line: no traceback, no standstill, no memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.small_model import save_small_model
from tests.paths import ROOT

COUNT = 600


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_damage_is_one_line(tmp_path: Path) -> None:
    """By the package, by the specification and for `twotower info`; what loads all the same has the good weights."""
    good = save_small_model(tmp_path / "good")
    process = [sys.executable, "-m", "tests.model.damaged_folders", str(good), str(COUNT)]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    *wrong, counts = map(json.loads, done.stdout.splitlines())
    assert wrong == []
    for name, endings in counts.items():
        assert set(endings) == {"loaded", "ValueError", "FileNotFoundError"}, name
        assert sum(endings.values()) == COUNT and min(endings.values()) > COUNT / 30, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]
