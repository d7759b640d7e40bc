"""`twotower check`: a kernel of another's, in a file or a module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program.command_line import error_of, run

KERNEL = """
import torch

def good(x, weight=None, *, eps):
    y = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * weight.double()).to(x.dtype)

def bad(x, weight=None, *, eps):
    return good(x, weight, eps=eps) * 1.01

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "json.py"  # as a module that is loaded already is called
    path.write_text(KERNEL)
    return path


def test_a_kernel_in_a_file_is_checked(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--op", "rms_norm", "--examples", 5, "--dtype", "float32", "--json", tmp_path / "report")
    assert run("check", f"{file}:good", *options) == 0
    assert json.loads((tmp_path / "report").read_text())["ok"]
    assert run("check", f"{file}:bad", *options) == 1
    assert not json.loads((tmp_path / "report").read_text())["ok"]
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "rms_norm"), "--op: expected a kernel, MODULE:FUNCTION, got none"),
        (("--examples", "7"), "--examples: expected a kernel"),
        (("--seed", "0"), "--seed: expected a kernel"),
        (("FILE:good",), "--op: expected the op that"),
        (("FILE:number", "--op", "rms_norm"), "expected a function, got int"),
        (("FILE:other", "--op", "rms_norm"), "has no other"),
        (("nowhere.py:good", "--op", "rms_norm"), "nowhere.py: no such file"),
        (("no_such_module:good", "--op", "rms_norm"), "no such module"),
        (("good", "--op", "rms_norm"), "expected MODULE:FUNCTION or FILE.py:FUNCTION, got good"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: tuple[str, ...], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(capsys, "check", *(argument.replace("FILE", str(file)) for argument in arguments))
