"""The compiled module: what it links, what it needs, and that it leaks no instruction set into another."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import kernel_checks
from tests.kernels.kernel_checks import EVERY_ISA, MACHINE_ISAS, instruction_set
from tests.paths import ROOT
from twotower_kernels import cpu

LIBRARY = Path(cpu.kernels().__file__)
# A module of this name in front of the path stands for a machine without torch.
NO_TORCH = 'raise ImportError("torch is not installed here")\n'
X86 = ["avx2", "avx512", "avx512bf16", "amx"]
PLAIN = ["avx2", "avx512"]  # the sets of kernels that use nothing newer
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are x86's")


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
    assert first == f"{MACHINE_ISAS[-1]} 1"
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
    assert bool(newer) == (len(MACHINE_ISAS) > 1), "build in place first: python setup.py build_ext --inplace"
    assert {path.suffixes[-2][1:] for path in newer} >= set(MACHINE_ISAS[1:])
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


@pytest.mark.parametrize("isa", MACHINE_ISAS)
def test_instruction_sets_can_be_chosen(isa: str) -> None:
    with instruction_set(isa):
        assert cpu.kernels().isa() == isa
    assert cpu.kernels().isa() == MACHINE_ISAS[-1]
    with pytest.raises(ValueError, match="expected one of isas"):
        cpu.kernels().set_isa("mmx")
    with pytest.raises(ValueError, match=r"instruction_set: expected one of baseline.*got .mmx."), cpu.use("mmx"):
        pass
    assert cpu.kernels().isa() == MACHINE_ISAS[-1]


def test_a_set_that_this_machine_lacks_gives_way_to_the_best_below(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "csrc" / "cpu" / "isa.h").read_text(encoding="utf-8")
    defined = re.search(r"#define TT_EACH_ISA\(X\)[\s\\]*(.*avx.*)", source)
    assert defined and list(EVERY_ISA) == re.findall(r"X\((\w+)\)", defined[1])
    monkeypatch.setattr(kernel_checks, "ISAS", MACHINE_ISAS[:1])
    for name in EVERY_ISA:
        with instruction_set(name):
            assert cpu.kernels().isa() == MACHINE_ISAS[0]
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


# --- the compiler -----------------------------------------------------------------------------------------------------


def compiler(folder: Path, answer: str) -> str:
    """The compiler of this machine behind a shell script, which answers some of its options ($option) by itself."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nfor option; do case "$option" in\n{answer}\nesac; done\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


def planned(cxx: str, change: str = "") -> subprocess.CompletedProcess[str]:
    """The instruction sets that setup.py would compile for, after a change of its `names`; those that ninja's files and
    the sources' macros have."""
    code = f"""
import re, runpy, sys
from pathlib import Path
sys.argv = ["setup.py", "--version"]
names = runpy.run_path("setup.py")
{change}
ninja = names["ninja_file"](Path("build"), Path("_C.so"))
print(*names["instruction_sets"]())
print(*sorted(set(re.findall(r"attention[.](\\w+)[.]o", ninja))))
print(*sorted(set(re.findall(r"-DTT_HAS_(\\w+)", ninja))))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TT_")} | {"CXX": cxx}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@on_x86
@pytest.mark.parametrize(
    ("refused", "known"), [("-mavx512bf16", 2), ("*-v4", 1), ("*-v3", 0), ("-mamx-tile", 3), ("-no-such", 4)]
)
def test_what_the_compiler_does_not_know_is_left_out(tmp_path: Path, refused: str, known: int) -> None:
    """And said, in one line, with the compiler's reason."""
    done = planned(compiler(tmp_path, f"{refused}) echo no $option here >&2; exit 1;;"))
    sets, objects, defines = (line.split() for line in done.stdout.splitlines()[-3:])
    assert sets == ["baseline", *X86[:known]]
    assert sorted(objects) == sorted(sets)
    assert sorted(defines) == sorted(name.upper() for name in X86[:known])
    told = [line for line in done.stderr.splitlines() if line.startswith("twotower_kernels")]
    assert len(told) == (known < len(X86))
    for line in told:
        assert f"does not know {X86[known]}: no -m" in line
        assert line.endswith(f"Left out: {', '.join(X86[known:])}.")


@on_x86
def test_an_assembler_that_is_too_old_is_noticed() -> None:
    """The compiler takes the option, and its assembler does not know the instruction."""
    done = planned(
        "c++",
        'sets = names["instruction_sets"].__wrapped__.__globals__["X86"]\n'
        'sets["avx512bf16"] = (sets["avx512bf16"][0], "no_such_instruction")',
    )
    assert done.stdout.splitlines()[-3] == "baseline avx2 avx512"
    assert "does not know avx512bf16: " in done.stderr


def test_another_processor_has_the_baseline_alone(tmp_path: Path) -> None:
    answer = """-dM) printf '#define __aarch64__ 1\\n#define __GNUC__ 12\\n'; exit 0;;"""
    done = planned(compiler(tmp_path, answer))
    assert done.stdout.splitlines()[-3:] == ["baseline", "baseline", ""]
    assert "does not know" not in done.stderr


def test_a_build_without_the_newest_set_runs(tmp_path: Path) -> None:
    """Headers, dispatch and detection follow the sets: without the newest, the best one left is chosen. A kernel that
    has the newest set is called through what bindings.cpp calls."""
    source = tmp_path / "main.cpp"
    source.write_text(
        """
#include <cstdio>
#include "cpu/isa.h"
namespace tt {
struct Called { const char** name; };
TT_KERNEL_BF16(kernel, Called)
TT_KERNEL(plain, Called)
#define TT_KERNEL_OF(set) namespace set { \\
    void kernel(const Called& to) { *to.name = #set; } \\
    void plain(const Called& to) { *to.name = #set; } }
TT_EACH_ISA(TT_KERNEL_OF)
}
int main() {
    for (int i = 0; i <= int(tt::best_isa()); ++i) {
        const char *newest, *plain;
        tt::set_isa(tt::Isa(i));
        tt::kernel({&newest});
        tt::plain({&plain});
        std::printf("%s %s %s\\n", tt::isa_name(tt::isa()), newest, plain);
    }
}
""",
        encoding="utf-8",
    )
    here = ["baseline", *[name for name in X86 if name in MACHINE_ISAS]]
    for count in range(len(X86) + 1):
        program = tmp_path / f"sets{count}"
        defines = [f"-DTT_HAS_{name.upper()}" for name in X86[:count]]
        command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *defines]
        sources = [str(source), *[str(ROOT / "csrc" / name) for name in ("isa.cpp", "amx.cpp")]]
        subprocess.run([*command, *sources, "-o", str(program)], check=True)
        said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
        sets = here[: count + 1]
        plain = [name if name in ("baseline", *PLAIN) else PLAIN[-1] for name in sets]
        assert said.splitlines() == [f"{a} {a} {b}" for a, b in zip(sets, plain, strict=True)]


@pytest.mark.parametrize(
    ("macros", "found"),
    [
        (r"#define __GNUC__ 9\n#define __GNUC_MINOR__ 3\n", "is g++ 9.3"),
        (r"#define __GNUC__ 4\n#define __clang_major__ 13\n#define __clang_minor__ 0\n", "is clang 13.0"),
        ("", "is neither"),
    ],
)
def test_an_old_compiler_is_named(tmp_path: Path, macros: str, found: str) -> None:
    said = refused(tmp_path, compiler(tmp_path, f"-dM) printf '{macros}'; exit 0;;"))
    assert "expected clang 14 or g++ 11, or newer" in said
    assert found in said


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    assert "no-such-compiler is not on the PATH" in refused(tmp_path, "no-such-compiler -m64")


def refused(tmp_path: Path, cxx: str) -> str:
    """The one line with which a build ends before it began."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        env={**os.environ, "CXX": cxx},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("twotower_kernels: ") and done.stderr.count("\n") == 1
    return done.stderr
