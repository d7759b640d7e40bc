"""CUDA C++ kernels: all are in the table of builds, and what is kept on disk can be trusted."""

import ctypes
import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.gpu.build_kernels import cuda_modules
from tests.paths import ROOT
from tests.simt import executor
from twotower_kernels.cuda import build as cuda

PLAN = ("moe_plan", (), "sm_90a")


def test_every_source_is_built() -> None:
    """For every GPU: one build of each by tests/gpu/test_triton_builds.py, and every one by `make kernels`."""
    modules = [importlib.import_module(f"twotower_kernels.{name}") for name in cuda_modules()]
    built = {source for module in modules for source, _ in module.builds()}
    assert built == {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    for path in cuda.folder().glob("*.cu"):
        kernels = re.findall(r"__global__[^;{]*?\b(\w+)\(\s*(?:const|void|int)", path.read_text(encoding="utf-8"))
        assert kernels and all(name.endswith("_kernel") for name in kernels), path.name


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The cache is in an empty folder, and a compiler that is quick says what it compiled."""
    made: list[str] = []

    def quick(source: str, defines: object, arch: str) -> bytes:
        made.append(arch)
        return f"{source} {defines} {arch}".encode()

    monkeypatch.setattr(cuda, "compile", quick)
    monkeypatch.setattr(cuda, "_nvrtc_version", lambda: "13.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def kept() -> Path:
    (path,) = cuda.cache_folder().iterdir()
    return path


def test_a_kernel_is_compiled_once(compiled: list[str]) -> None:
    first = cuda.cubin(*PLAN)
    assert cuda.cubin(*PLAN) == first and compiled == ["sm_90a"]
    assert cuda.cache_folder().stat().st_mode & 0o777 == 0o700


def test_whatever_changes_the_result_is_in_the_key(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.cubin(*PLAN)
    cuda.cubin("moe_plan", (("A", "1"),), "sm_90a")
    cuda.cubin("moe_plan", (), "sm_80")
    monkeypatch.setattr(cuda, "_nvrtc_version", lambda: "13.1")
    cuda.cubin(*PLAN)
    assert len(compiled) == len(list(cuda.cache_folder().iterdir())) == 4


@pytest.mark.parametrize("header", ["cuda/warp.h", "common/remask_rule.h"])
def test_a_changed_header_is_in_the_key(
    header: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "csrc"
    for part in ("cuda", "common"):
        shutil.copytree(cuda.folder().parent / part, copy / part)
    cuda.cubin(*PLAN)
    monkeypatch.setattr(cuda, "folder", lambda: copy / "cuda")
    cuda.cubin(*PLAN)
    assert len(compiled) == 1
    with (copy / header).open("a") as file:
        file.write("// changed\n")
    cuda.cubin(*PLAN)
    assert len(compiled) == 2


def test_what_is_kept_is_known(compiled: list[str]) -> None:
    assert not cuda.is_kept(*PLAN)
    cuda.cubin(*PLAN)
    assert cuda.is_kept(*PLAN) and not cuda.is_kept("moe_plan", (), "sm_80")
    kept().write_bytes(kept().read_bytes()[:-1])
    assert not cuda.is_kept(*PLAN) and compiled == ["sm_90a"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "of another key"])
def test_a_damaged_file_is_compiled_anew(damage: str, compiled: list[str]) -> None:
    good = cuda.cubin(*PLAN)
    path = kept()
    content = path.read_bytes()
    if damage == "of another key":
        path.rename(path.with_suffix(".other"))
        cuda.cubin("moe_plan", (), "sm_80")
        content = next(other for other in cuda.cache_folder().glob("*.cubin")).read_bytes()
        compiled.clear()
    path.write_bytes({"truncated": content[:-1], "changed": content[:-1] + b"?", "empty": b""}.get(damage, content))
    compiled.clear()
    assert cuda.cubin(*PLAN) == good and compiled == ["sm_90a"]
    assert cuda.cubin(*PLAN) == good and compiled == ["sm_90a"]


def test_a_folder_that_others_can_write_is_not_used(compiled: list[str]) -> None:
    cuda.cache_folder().mkdir(parents=True)
    cuda.cache_folder().chmod(0o777)
    for _ in range(2):
        with pytest.warns(UserWarning, match="others can write here"):
            cuda.cubin(*PLAN)
    assert len(compiled) == 2 and not list(cuda.cache_folder().iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(compiled: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert cuda.cubin(*PLAN)


def test_a_file_that_cannot_be_written_is_no_error(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert cuda.cubin(*PLAN)
    assert not list(cuda.cache_folder().iterdir())


def test_nvrtc_compiles_and_names_what_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.compile(*PLAN)[:4] == b"\x7fELF"
    (tmp_path / "bad.cu").write_text("int f() { return unknown; }")
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)bad\.cu for sm_90a.*unknown"):
        cuda.compile("bad", (), "sm_90a")


@pytest.mark.parametrize("gone", ["cuda.core", "cuda.bindings.nvrtc"])
def test_what_to_install_is_said(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gone, None)
    monkeypatch.setitem(sys.modules, "cuda.core.experimental", None)
    if gone == "cuda.bindings.nvrtc":
        monkeypatch.delattr(importlib.import_module("cuda.bindings"), "nvrtc", raising=False)
    cuda._core.cache_clear()
    cuda._nvrtc_version.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install 'twotower-kernels\[cuda1[23]\]'"):
            cuda.compile(*PLAN)
    finally:
        cuda._core.cache_clear()
        cuda._nvrtc_version.cache_clear()


class Pair(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int64), ("pointer", ctypes.c_void_p)]


def launched(*before: Any, **options: Any) -> None:
    """Launches a kernel on a GPU, of which the driver alone says that it is there; run in a process of its own."""
    stand_in = dict(
        device=lambda device: nullcontext(),
        get_device_capability=lambda device: (9, 0),
        is_current_stream_capturing=lambda: False,
        current_stream=lambda device: SimpleNamespace(cuda_stream=7),
    )
    tensor = torch.zeros(2)
    tensor_there = SimpleNamespace(device=torch.device("cuda", 0), data_ptr=tensor.data_ptr)
    with patch.multiple(torch.cuda, **stand_in), patch.object(cuda, "Tensor", SimpleNamespace):
        arguments = (*before, tensor_there, None, True, 3, 2.5)
        cuda.launch(cuda.Kernel("moe_plan", "moe_plan_kernel"), 2, 64, 100, arguments, **options)
    print(f"{tensor.data_ptr():x}")


def with_fake_driver(folder: Path, code: str) -> list[str]:
    """What tests/simt/fake_driver.cpp is asked for by a process that runs `code`, line by line."""
    source = ROOT / "tests" / "simt" / "fake_driver.cpp"
    build = [executor.CXX, "-std=c++17", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"]
    subprocess.run(build, check=True)
    call = [sys.executable, "-c", f"from tests.gpu.test_cuda_builds import *; {code}"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_launch_reaches_the_driver(tmp_path: Path) -> None:
    """Through cuda-python as it is installed: the cubin, the kernel's name, the grid, and every argument in 8 bytes."""
    *prepared, launch, address = with_fake_driver(tmp_path, "launched()")
    assert prepared == ["current context", "load ELF", "kernel moe_plan_kernel"]
    config, arguments = launch.split(": ")
    assert config == "launch 2 blocks of 64 threads, 100 bytes, stream 0x7"
    assert arguments.split() == [address, "0", "1", "3", struct.pack(">d", 2.5).hex()]


def test_a_struct_is_passed_by_value(tmp_path: Path) -> None:
    """Its first eight bytes stand where the first argument is; what it points into says on which device."""
    launch = with_fake_driver(tmp_path, "pair = Pair(77); pair.tensors = {}; launched(pair)")[-2]
    assert launch.split(": ")[1].split()[0] == f"{77:x}"


def test_a_kernel_starts_early_if_it_may(tmp_path: Path) -> None:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is number 6 (CUDA driver API, CUlaunchAttributeID)."""
    said = with_fake_driver(
        tmp_path, "launched(after_last=True); cuda.PDL = True; launched(); launched(after_last=True)"
    )
    launches = [line.split(":")[0] for line in said if line.startswith("launch")]
    assert ["attribute 6 = 1" in launch for launch in launches] == [False, False, True]


def test_every_thread_has_a_context(tmp_path: Path) -> None:
    """Made current at its first launch, even of a kernel that another thread loaded; and a stream is made once."""
    twice = "[launched() for _ in range(2)]"
    said = with_fake_driver(tmp_path, f"import threading; {twice}; t = threading.Thread(target=lambda: {twice}); "
                            "t.start(); t.join(); print(cuda._config.cache_info().misses)")  # fmt: skip
    kinds = [line.split()[0] for line in said]
    assert kinds.count("load") == 1 and kinds.count("launch") == 4 and kinds.count("current") == 2
    assert kinds[0] == kinds[7] == "current"
    assert said[-1] == "1"


def test_nothing_is_loaded_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        cuda._loaded(cuda.Kernel("moe_plan", "moe_plan_kernel"), 0)
