"""What is installed, and what the bootstrap says when it cannot go on."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import twotower_kernels
from tests.paths import ROOT


def test_wheel_holds_the_package_and_its_model(tmp_path: Path) -> None:
    """Built from a copy, offline, as `pip wheel` does; the specification and the tests stay in the repository."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("twotower_kernels", "reference"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc" / "cuda", source / "csrc" / "cuda")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert f"\nVersion: {twotower_kernels.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert {name.split("/")[0] for name in names} == {"twotower_kernels", metadata.split("/")[0]}
    demo = {path.relative_to(ROOT).as_posix() for path in (ROOT / "twotower_kernels" / "demo").iterdir()}
    assert "twotower_kernels/demo/model.safetensors" in demo
    assert demo <= names
    kernels = {f"twotower_kernels/csrc_cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").iterdir()}
    assert kernels and kernels <= names


def test_demo_path_is_the_shipped_model() -> None:
    assert (twotower_kernels.demo_path() / "README.md").is_file()


def test_demo_path_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twotower_kernels, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"demo: the shipped model lacks config\.json, model\.safetensors"):
        twotower_kernels.demo_path()


def bootstrap(tmp_path: Path, **environment: str) -> str:
    """What `scripts/bootstrap.sh` says as it gives up."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "bootstrap.sh"), str(tmp_path / "venv"), "requirements.txt"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert not (tmp_path / "venv").exists()
    return done.stderr


def fake_python(folder: Path, *, new_enough: bool) -> Path:
    """A `python3` that says 3.9.1, or one that is new enough but cannot import ensurepip."""
    folder.mkdir()
    python = folder / "python3"
    answer = 'case "$2" in *version_info*) exit 0;; *) exit 1;; esac' if new_enough else "exit 1"
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\n{answer}\n')
    python.chmod(0o755)
    return python


def test_bootstrap_names_a_missing_interpreter(tmp_path: Path) -> None:
    assert "PYTHON=no-such-python: no such program" in bootstrap(tmp_path, PYTHON="no-such-python")


def test_bootstrap_names_an_interpreter_that_is_too_old(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin", new_enough=False)
    assert f"{python} is Python 3.9.1, but the pinned versions need 3.11" in bootstrap(tmp_path, PYTHON=str(python))


def test_bootstrap_finds_no_suitable_interpreter(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin", new_enough=False)
    said = bootstrap(tmp_path, PYTHON="", PATH=str(python.parent))
    assert "no Python 3.11 or newer on the PATH (Python 3.9.1)" in said


def test_bootstrap_names_a_missing_venv_module(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin", new_enough=True)
    assert "lacks the venv module" in bootstrap(tmp_path, PYTHON=str(python))
