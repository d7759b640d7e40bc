"""What is installed, and what the bootstrap says when it cannot go on."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import twotower_kernels
from tests.paths import ROOT
from twotower_kernels.bench.checks import recordings

RECORDED = [f"tests/data/golden/{name}" for name in recordings.INSTALLED]
COPIED = ["csrc/common", "csrc/cuda", *RECORDED]  # by setup.py, into the package


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without C++ sources, so that nothing is compiled."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("twotower_kernels", "reference", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for part in COPIED:
        shutil.copytree(ROOT / part, copy / part)
    return copy


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked in, built offline, as `pip wheel` does."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files_of(folder: Path) -> set[str]:
    """Of a folder of the repository, without what Python compiled."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_package_and_its_model(installed: Path) -> None:
    """And the specification and the benchmarks as parts of it, under no other name; no tests."""
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert f"\nVersion: {twotower_kernels.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert {path.name for path in installed.iterdir()} == {"twotower_kernels", metadata.parent.name}
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    demo = files_of(ROOT / "twotower_kernels" / "demo")
    assert "twotower_kernels/demo/model.safetensors" in demo
    assert demo <= names
    kernels = {f"twotower_kernels/{name}" for part in ("common", "cuda") for name in files_of(ROOT / "csrc" / part)}
    assert kernels and kernels <= names
    models = {
        name.replace("tests/data/golden", "twotower_kernels/recorded")
        for folder in RECORDED
        for name in files_of(ROOT / folder)
    }
    assert "twotower_kernels/recorded/tiny/model.safetensors" in models and models <= names
    for folder in ("reference", "bench"):
        parts = {f"twotower_kernels/{name}" for name in files_of(ROOT / folder) if not name.endswith(".sh")}
        assert f"twotower_kernels/{folder}/__init__.py" in parts
        assert parts <= names
    assert files_of(ROOT / "twotower_kernels" / "testing") <= names
    assert not any(path.is_symlink() for path in installed.rglob("*"))


def run_installed(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`twotower WORDS`, from the unpacked wheel, in an empty folder; with the compiled module of this checkout, which
    the wheel was built without."""
    for library in (ROOT / "twotower_kernels").glob("_C*.so"):
        shutil.copy(library, installed / "twotower_kernels")
    code = f"""
import runpy, sys
sys.modules["matplotlib"] = None  # not installed
sys.argv = ["twotower", *sys.argv[1:]]
import twotower_kernels
assert twotower_kernels.__file__.startswith({str(installed)!r})
runpy.run_module("twotower_kernels", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment | {"PYTHONPATH": str(installed)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_an_installed_benchmark_runs_anywhere(installed: Path, tmp_path: Path) -> None:
    options = "--op adaln --shapes small --seconds 0 --rivals none --save saved --name run"
    done = run_installed(installed, tmp_path, "bench", *options.split())
    assert done.returncode == 0, done.stderr
    assert "gated_residual_adaln_norm" in done.stdout
    assert "no picture: a picture needs matplotlib: pip install 'twotower-kernels[bench]'" in done.stdout
    assert json.loads((tmp_path / "saved" / "run.json").read_text(encoding="utf-8"))["machine"]["commit"] is None


@pytest.mark.thorough
def test_an_installed_report_runs_anywhere(installed: Path, tmp_path: Path) -> None:
    """Its checks find the recordings in the wheel."""
    done = run_installed(installed, tmp_path, "gpu-report", "--device", "cpu", "--part", "machine")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "twotower-gpu-report" / "report.json").read_text(encoding="utf-8"))
    assert report["parts"][0]["result"]["twotower_kernels"] == twotower_kernels.__version__
    code = "from twotower_kernels.bench.checks.command import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--device", "cpu", "--only", "recorded", "--share", "0", "1"],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nheld\n") == 7  # two models' tensors, five texts of one


def test_source_distribution_holds_what_is_compiled(source: Path, tmp_path: Path) -> None:
    """Headers, too, and the two folders as parts of the package, whose links no archive of this kind keeps."""
    code = "from setuptools import build_meta; print(build_meta.build_sdist(__import__('sys').argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("reference", "bench"):
        assert {f"twotower_kernels/{name}" for name in files_of(ROOT / folder) if name.endswith(".py")} <= names
    assert {name for part in COPIED for name in files_of(ROOT / part)} <= names
    assert {"setup.py", "pyproject.toml", "twotower_kernels/demo/model.safetensors"} <= names
    assert "graft csrc\n" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8")


def test_python_versions_agree() -> None:
    """The oldest one that the metadata, the linters, the README and the bootstrap name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
    for page in ("README.md", "scripts/bootstrap.sh", "requirements.txt"):
        said = re.findall(r"3\.\d+ or newer", (ROOT / page).read_text(encoding="utf-8"))
        assert said and set(said) == {"3.11 or newer"}, page


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
    assert f"{python} is Python 3.9.1, expected 3.11" in bootstrap(tmp_path, PYTHON=str(python))


def test_bootstrap_finds_no_suitable_interpreter(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin", new_enough=False)
    said = bootstrap(tmp_path, PYTHON="", PATH=str(python.parent))
    assert "no Python 3.11 or newer on the PATH (Python 3.9.1)" in said


def test_bootstrap_names_a_missing_venv_module(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin", new_enough=True)
    assert "lacks the venv module" in bootstrap(tmp_path, PYTHON=str(python))
