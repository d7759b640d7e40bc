"""The compiled module: what it links, what it needs, and that it leaks no instruction set into another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import kernel_checks
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, instruction_set
from tests.paths import ROOT
from twotower_kernels import cpu

LIBRARY = Path(cpu.kernels().__file__)
# A module of this name in front of the path stands for a machine without torch.
NO_TORCH = 'raise ImportError("torch is not installed here")\n'


def python(code: str, tmp_path: Path, **environment: str) -> str:
    """What `code` prints in a process of its own, in which `import torch` fails."""
    (tmp_path / "torch.py").write_text(NO_TORCH, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_module_imports_without_torch(tmp_path: Path) -> None:
    """And its loops are serial there, because there is no thread pool to share."""
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("twotower_kernels._C", {str(LIBRARY)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa(), module.max_threads())
try:
    import torch
except ImportError as error:
    print(error)
"""
    first, second = python(code, tmp_path).splitlines()
    assert first == f"{ISAS[-1]} 1"
    assert second == "torch is not installed here"


def test_the_wheel_builds_without_torch(tmp_path: Path) -> None:
    """`setup.py` as `pip wheel` runs it; only the plan is made, the compiler is the same one as everywhere."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "setup.py", source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    code = f"""
import runpy, sys
sys.argv = ["setup.py", "--name"]
names = runpy.run_path({str(source / "setup.py")!r})
from pathlib import Path
print(len(names["ninja_file"](Path("build"), Path("_C.so")).splitlines()))
print("torch" in sys.modules)
"""
    (source / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    lines = python(code, tmp_path).splitlines()
    assert int(lines[-2]) > 10
    assert lines[-1] == "False"


def test_nothing_of_torch_or_openmp_is_linked() -> None:
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"Shared library: \[(.+)\]", needed)
    assert libraries
    assert not [name for name in libraries if re.search("torch|c10|omp|cuda|python", name)]


def test_source_includes_neither_torch_nor_cuda() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r'#include\s+[<"](.+?)[>"]', path.read_text(encoding="utf-8"))
        assert not [name for name in includes if re.match("torch|ATen|c10|cuda|omp", name)], path.name


def test_no_instruction_set_leaks_into_another() -> None:
    """A function that the linker may merge across instruction sets is named for its own, or it is no function of an
    object compiled for a newer one. Weak symbols outside tt::<isa> in such an object would be such functions."""
    objects = sorted(ROOT.glob("build/temp*/*.*.o"))
    newer = [path for path in objects if path.suffixes[-2] not in (".baseline",)]
    assert bool(newer) == (len(ISAS) > 1), "build in place first: python setup.py build_ext --inplace"
    for path in newer:
        isa = path.suffixes[-2][1:]
        listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = re.findall(r"^[0-9a-f]+ [WVu] (.+)$", listed, flags=re.MULTILINE)
        weak = [name for name in weak if name != "DW.ref.__gxx_personality_v0"]  # where exceptions unwind: an address
        assert not [name for name in weak if f"tt::{isa}::" not in name], path.name


def test_one_thread_pool() -> None:
    """Kernels run in PyTorch's OpenMP pool: one library in the process, and PyTorch's number of threads."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    pools = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib(gomp|omp|iomp5)\b", line)}
    assert len(pools) == 1, pools
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert cpu.kernels().max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_can_be_chosen(isa: str) -> None:
    with instruction_set(isa):
        assert cpu.kernels().isa() == isa
    assert cpu.kernels().isa() == ISAS[-1]
    with pytest.raises(ValueError, match="expected one of isas"):
        cpu.kernels().set_isa("mmx")


def test_a_set_that_this_machine_lacks_gives_way_to_the_best_below(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "csrc" / "cpu" / "isa.h").read_text(encoding="utf-8")
    defined = re.search(r"#define TT_EACH_ISA\(X\)(.*avx.*)", source)
    assert defined and list(EVERY_ISA) == re.findall(r"X\((\w+)\)", defined[1])
    monkeypatch.setattr(kernel_checks, "ISAS", ISAS[:1])
    for name in EVERY_ISA:
        with instruction_set(name):
            assert cpu.kernels().isa() == ISAS[0]
    with pytest.raises(ValueError, match="mmx"), instruction_set("mmx"):
        pass


def test_a_missing_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "twotower_kernels._C", None)
    cpu.kernels.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"python setup\.py build_ext --inplace"):
            cpu.kernels()
    finally:
        cpu.kernels.cache_clear()


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        env={**os.environ, "CXX": "no-such-compiler"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no-such-compiler is not on the PATH" in done.stderr
