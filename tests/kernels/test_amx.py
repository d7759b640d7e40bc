"""AMX's tiles (csrc/cpu/amx.h): the emulated instruction's arithmetic, the configuration of a thread's tiles beside
PyTorch's own, and the permission to use them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import twotower_kernels as tt
from tests.kernels.kernel_checks import MACHINE_ISAS, instruction_set
from tests.paths import ROOT

# One product of tiles from files of 1024 bytes each, and what becomes of the configurations that it finds.
PROGRAM = """
#include <cstdio>
#include "cpu/amx.h"
using namespace tt::amx;
int main(int, char** files) {
    alignas(64) char tiles[3][1024];
    for (int t = 0; t < 3; ++t) {
        std::FILE* file = std::fopen(files[1 + t], "rb");
        if (!file || std::fread(tiles[t], 1, 1024, file) != 1024) return 1;
        std::fclose(file);
    }
    TileConfiguration others = TileConfiguration::whole(), found;
    others.rows[3] = 5;
    {
        const Tiles outer;
        tile_load<6>(tiles[0], 64);
        tile_load<1>(tiles[1], 64);
        tile_load<2>(tiles[2], 64);
        tile_dot<6, 1, 2>();
        tile_store<6>(tiles[0], 64);
        load_configuration(others);
        { const Tiles inner; }
        store_configuration(found);
        if (std::memcmp(&found, &others, 64)) return 2;
    }
    store_configuration(found);
    if (found.palette != 0) return 3;
    std::fwrite(tiles[0], 1, 1024, stdout);
    if (files[4]) tile_zero<0>();
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amx")
    (folder / "main.cpp").write_text(PROGRAM, encoding="utf-8")
    flags = ["-std=c++17", "-O2", "-march=native", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    defines = ["-DTT_ISA=amx", "-DTT_AMX", "-DTT_EMULATE"]
    subprocess.run(["c++", *flags, *defines, str(folder / "main.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


def bf16(values: np.ndarray) -> np.ndarray:
    """Words of pairs as the tiles hold them: [..., 2 n] float32, cut to bfloat16, in [..., n] words."""
    high = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return high.view(np.uint32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize("scale", [1.0, 1e-19, 1e-20])
def test_a_product_of_tiles_is_the_manuals(program: Path, tmp_path: Path, scale: float) -> None:
    """Bit for bit, in its order of summation, with subnormal numbers everywhere at the smallest scale."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((16, 32)) * scale * 4.0 ** rng.integers(-3, 3, (16, 32)) for _ in "ab")
    sums = (rng.standard_normal((16, 16)) * scale**2).astype(np.float32)
    words = bf16(a), bf16(b)
    for name, tile in zip(("sums", "a", "b"), (sums, *words), strict=True):
        tile.tofile(tmp_path / name)
    files = [tmp_path / name for name in ("sums", "a", "b")]
    got = np.frombuffer(subprocess.run([program, *files], check=True, capture_output=True).stdout, np.float32)

    parts = [[flushed(w.astype(np.uint32).view(np.float32)) for w in (x << 16, x & 0xFFFF0000)] for x in words]
    each = []
    for left, right in zip(*parts, strict=True):  # the even numbers, then the odd ones
        total = np.zeros((16, 16), np.float32)
        for k in range(16):
            exact = left[:, k : k + 1].astype(np.longdouble) * right[k].astype(np.longdouble) + total
            total = flushed(exact.astype(np.float32))
        each.append(total)
    expected = flushed(flushed(sums) + flushed(each[0] + each[1]))
    assert np.array_equal(got.reshape(16, 16).view(np.uint32), expected.view(np.uint32))


def test_tiles_without_a_configuration_end_the_program(program: Path, tmp_path: Path) -> None:
    """As on the processor, so that a kernel that forgot it is found by its first test."""
    np.zeros(256, np.float32).tofile(tmp_path / "zeros")
    files = [str(tmp_path / "zeros")] * 3
    assert subprocess.run([program, *files], capture_output=True).returncode == 0
    assert subprocess.run([program, *files, "forget"], capture_output=True).returncode < 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_our_products_and_pytorchs_in_turns(threads: int) -> None:
    """In the same threads, each of which keeps one configuration of its tiles: ours and oneDNN's. Whoever comes second
    finds the other's and must be right all the same; so a result is what it was before the other came."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 64, 48), (16, 96, 160), (33, 200, 70), (64, 32, 512), (7, 515, 33), (256, 128, 96)]
    given = [
        (torch.randn(m, k, generator=generator).bfloat16(), torch.randn(n, k, generator=generator).bfloat16())
        for m, k, n in shapes
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set("amx"):
            alone = [torch.nn.functional.linear(x, weight) for x, weight in given]
            ours = [tt.linear(x, weight) for x, weight in given]
            for step in range(1, 20):
                for i in range(len(given)):
                    x, weight = given[i * step % len(given)]
                    theirs = torch.nn.functional.linear(x, weight)
                    assert torch.equal(theirs, alone[i * step % len(given)])
                    x, weight = given[i]
                    assert torch.equal(tt.linear(x, weight), ours[i])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("avx512bf16" not in MACHINE_ISAS, reason="AMX is looked for where AVX512-BF16 is")
@pytest.mark.parametrize(("processor", "answer", "best"), [(1, 0, "amx"), (1, -1, "avx512bf16"), (0, 0, "avx512bf16")])
def test_permission_refused(tmp_path: Path, processor: int, answer: int, best: str) -> None:
    """By the system, which is asked once, or no such processor: the next set down is the best."""
    source = tmp_path / "main.cpp"
    source.write_text(
        f"""
#include <cstdio>
#include "cpu/isa.h"
static int asked;
extern "C" long syscall(long, long code, long feature) noexcept {{
    ++asked;
    return code == 0x1023 && feature == 18 ? {answer} : -1;
}}
namespace tt {{ bool processor_has_amx() {{ return {processor}; }} }}
int main() {{ std::printf("%s %d", tt::isa_name(tt::best_isa()), asked); }}
""",
        encoding="utf-8",
    )
    defines = [f"-DTT_HAS_{name}" for name in ("AVX2", "AVX512", "AVX512BF16", "AMX")]
    sources = [str(source), str(ROOT / "csrc" / "isa.cpp")]
    command = ["c++", "-std=c++17", f"-I{ROOT / 'csrc'}", *defines, *sources, "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    assert said == f"{best} {processor}"
