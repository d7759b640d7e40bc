"""Every kernel compiles for every GPU, without spills: here its hardest build, with `make kernels` every one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu import build_kernels
from tests.gpu.build_kernels import ARCHITECTURES, cuda_modules, faults, hardest, hardest_cuda, is_fuller, modules
from tests.paths import ROOT
from twotower_kernels.ops import _library

TABLE = ROOT / "build" / "kernels.json"


def test_every_kernel_builds_everywhere_without_spills() -> None:
    """In a process of its own: here Triton interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.build_kernels", str(TABLE), "--hardest"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    kernels = {row["kernel"] for row in table}
    assert kernels and all(name.endswith("_kernel") for name in kernels)
    for arch in ARCHITECTURES:
        assert {row["kernel"] for row in table if row["arch"] == f"sm_{arch}"} == kernels
    assert not faults(table)


def test_every_kernel_has_a_hardest_build() -> None:
    for arch in ARCHITECTURES:
        for name in modules():
            builds = list(importlib.import_module(f"twotower_kernels.triton.{name}").builds(arch))
            kinds = {(build.kernel.fn.__name__, bool(build.needs)) for build in builds}
            assert {(build.kernel.fn.__name__, bool(build.needs)) for build in hardest(builds)} == kinds
    for name in cuda_modules():
        cuda_builds = list(importlib.import_module(f"twotower_kernels.{name}").builds())
        assert {source for source, _ in hardest_cuda(cuda_builds)} == {source for source, _ in cuda_builds}


def test_the_hardest_build_is_the_largest() -> None:
    def build(name: str, type: str, needs: tuple[str, ...] = (), **constants: Any) -> Any:
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__=name))
        return SimpleNamespace(kernel=kernel, types={"x": type, "n": "i32"}, constants=constants, needs=needs)

    small, wide = build("a", "*bf16", BLOCK=64), build("a", "*fp32", BLOCK=64, FLAG=True)
    large, other = build("a", "*bf16", BLOCK=64, DIM=4, y=None), build("b", "*fp16", BLOCK=1)
    needy = build("a", "*bf16", ("wgmma",), BLOCK=16)
    assert hardest([small, wide]) == [wide] and hardest([small, needy, wide, other, large]) == [large, needy, other]
    plain, flagged = ("s", (("T", "double"), ("F", "0"))), ("s", (("T", "float"), ("F", "1")))
    assert hardest_cuda([plain, ("s", (("T", "float"), ("F", "0"))), flagged]) == [plain, flagged]
    assert hardest_cuda([("t", ()), plain]) == [("t", ()), plain]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, ""),
        ({"spills": 8}, "spills 8, expected at most 0"),
        ({"registers": 256}, "registers 256, expected at most 255"),
        ({"shared": 99 * 1024 + 1}, "shared 101377, expected at most 101376"),
        ({"missing": ["wgmma"]}, "without wgmma"),
    ],
)
def test_what_no_gpu_can_run_is_a_fault(row: dict[str, Any], said: str) -> None:
    good = {"kernel": "a", "arch": "sm_120", "registers": 255, "shared": 99 * 1024, "spills": 0, "missing": []}
    found = faults([good, good | row])
    assert len(found) == bool(said) and all(text.startswith(said) for text in found)


def test_a_fuller_table_is_kept_while_it_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = tmp_path / "kernels.json", tmp_path / "source.py"
    source.write_text("")
    monkeypatch.setattr(build_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(build_kernels, "SOURCES", ("*.py",))
    assert not is_fuller(path, [{"a": 1}])
    path.write_text('[{"a": 1}, {"a": 2}]')
    os.utime(source, (0, 0))
    assert is_fuller(path, [{"a": 1}])
    assert not is_fuller(path, [{"a": 3}]) and not is_fuller(path, [{"a": 1}, {"a": 2}])
    os.utime(path, (0, 0)), os.utime(source, (9, 9))
    assert not is_fuller(path, [{"a": 1}])


def test_every_file_of_kernels_is_built() -> None:
    modules_of_kernels = {target.split(":")[0] for target in _library.CUDA.values()}
    files = {name.removeprefix("triton.") for name in modules_of_kernels if name.startswith("triton.")}
    folder = ROOT / "twotower_kernels" / "triton"
    assert {stem for stem in files if "@triton.jit" in (folder / f"{stem}.py").read_text()} == set(modules())


def test_what_launchers_ask_for_compiles() -> None:
    """As far as Triton's own code: with the constants and alignments that it sees in the arguments."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.launch_kernels", "--typed"]
    launched = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    expected = {"adaln_norm_kernel", "up_kernel", "down_kernel", "combine_kernel", "gated_rms_norm_kernel"}
    expected |= {f"mamba2_{name}_kernel" for name in ("convolve", "states", "scan")}
    assert expected <= set(launched.split())
