"""In a checkout `reference` and `bench` are other names of the package's own modules, never second copies of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

OTHERS = {"foreign"}  # imports what others wrote, which takes long or is not installed
STEMS = {
    folder: sorted(
        ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
        for path in (ROOT / folder).rglob("*.py")
        if path.stem not in OTHERS | {"__init__", "__main__"}
    )
    for folder in ("reference", "bench")
}


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which runpy's warning of a module that is loaded twice is an error."""
    command = [sys.executable, "-W", "error::RuntimeWarning", *arguments]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_a_module_is_the_same_under_both_names() -> None:
    """Whichever name is imported first, by whichever form of import; it keeps its own name and file."""
    code = f"""
import importlib, sys
for folder, stems in {STEMS!r}.items():
    for number, stem in enumerate(["", *("." + stem for stem in stems)]):
        names = [folder + stem, "twotower_kernels." + folder + stem]
        first, second = map(importlib.import_module, reversed(names) if number % 2 else names)
        assert first is second is sys.modules[names[0]], names
        assert first.__name__ == first.__spec__.name == names[1], first.__spec__
        assert "twotower_kernels" in first.__file__, first.__file__
    try:
        importlib.import_module(folder + ".nothing")
    except ModuleNotFoundError as error:
        assert error.name == folder + ".nothing"
    else:
        raise AssertionError("a module that is not there was found")
from bench import costs
from reference.attention import block_attention
import bench.costs, twotower_kernels.bench.costs, twotower_kernels.reference.attention
assert bench.costs is costs is twotower_kernels.bench.costs
assert block_attention is twotower_kernels.reference.attention.block_attention
print("the same")
"""
    done = python("-c", code)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("module", ["bench", "bench.compare", "bench.pictures", "reference.train_demo"])
def test_a_module_runs_as_a_program(module: str) -> None:
    done = python("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and done.stderr == ""


def test_other_folders_of_these_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    (tmp_path / "bench" / "costs.py").write_text("mine = True\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import twotower_kernels.bench.costs, bench.costs as c; c.mine"
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
