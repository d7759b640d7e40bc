"""The build for 64-bit Arm: what its objects hold, and which sets a processor gets. `make arm64` runs it."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.arm64.emulated import Emulated
from twotower_kernels import cpu

pytestmark = pytest.mark.skipif("KERNEL_EMULATOR" not in os.environ, reason="make arm64 makes what is tested here")

EMULATOR, LIBRARY = os.environ.get("KERNEL_EMULATOR", ""), os.environ.get("KERNEL_LIBRARY", "")
BINUTILS = "aarch64-linux-gnu-"
OF_BF16 = r"\tbf(?:dot|mmla|mlal[bt]|cvt\w*)\t"


def objects() -> dict[str, list[Path]]:
    """The compiled kernels by their set."""
    found: dict[str, list[Path]] = {}
    for path in sorted((Path(LIBRARY).parents[2] / "temp").glob("*.*.o")):
        found.setdefault(path.suffixes[-2][1:], []).append(path)
    return found


@cache
def functions(path: Path) -> dict[str, list[str]]:
    """The instructions of each function of an object: "address<tab>name<tab>operands"."""
    listed = subprocess.run(
        [f"{BINUTILS}objdump", "-dC", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    )
    parts = re.split(r"^[0-9a-f]+ <(.+)>:\n", listed.stdout, flags=re.MULTILINE)
    return {name: body.strip().splitlines() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def loops(body: list[str]) -> Iterator[list[str]]:
    """What lies between each jump backwards and its target, where no return lies in between."""
    places = {line.split(":")[0].strip(): number for number, line in enumerate(body)}
    for number, line in enumerate(body):
        target = re.search(r"\t(?:b|b\.\w+|cbn?z|tbn?z)\t.*?\b([0-9a-f]+) <", line)
        begin = places.get(target[1], number) if target else number
        if begin < number and not any("\tret" in within for within in body[begin:number]):
            yield body[begin : number + 1]


def test_instructions_of_bf16_lie_in_their_own_set() -> None:
    """Elsewhere they would end a process on a processor without them."""
    found = objects()
    assert set(found) == {"baseline", "neonbf16"}
    for path in found["baseline"]:
        assert not [name for name, body in functions(path).items() if re.search(OF_BF16, "\n".join(body))], path.name
    for path in found["neonbf16"]:
        using = [name for name, body in functions(path).items() if re.search(OF_BF16, "\n".join(body))]
        assert using and all("tt::neonbf16::" in name for name in using), path.name


def test_no_instruction_set_leaks_into_another() -> None:
    """As tests/house/test_build.py has it of x86's: what the linker may merge is named for its set."""
    for path in objects()["neonbf16"]:
        listed = subprocess.run([f"{BINUTILS}nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = set(re.findall(r"^[0-9a-f]+ [WVu] (.+)$", listed, flags=re.MULTILINE))
        assert not [name for name in weak - {"DW.ref.__gxx_personality_v0"} if "tt::neonbf16::" not in name], path.name


@pytest.mark.parametrize(
    ("isa", "stem", "function", "instruction"),
    [
        ("baseline", "linear", r"multiply_tile<6, 4, float>", "fmla"),
        ("neonbf16", "linear", r"multiply_tile<6, 4, unsigned int>", "bfdot"),
        ("baseline", "attention", r"Panel<.*Plain<float> >::add_to<4>", "fmla"),
        ("neonbf16", "attention", r"Panel<.*Paired>::add_to<4>", "bfdot"),
        ("baseline", "moe_experts", r"skinny<float, tt::baseline::bf16>", "fmla"),
        ("neonbf16", "moe_experts", r"skinny<float, tt::neonbf16::bf16>", "bfdot"),
    ],
)
def test_products_stay_in_registers(isa: str, stem: str, function: str, instruction: str) -> None:
    """The loops with the most products are mostly these, and keep no vector of theirs on the stack."""
    (path,) = [path for path in objects()[isa] if path.name.startswith(f"{stem}.")]
    bodies = [body for name, body in functions(path).items() if re.search(function, name)]
    found = [loop for body in bodies for loop in loops(body)]
    most = max(found, key=lambda loop: sum(f"\t{instruction}\t" in line for line in loop) / len(loop))
    assert sum(f"\t{instruction}\t" in line for line in most) > len(most) / 2, "\n".join(most)
    assert not [line for line in most if re.search(r"\tst[rp]\tq.*\[sp", line)], "\n".join(most)


@pytest.mark.parametrize(
    ("processor", "sets"),
    [("cortex-a53", ["baseline"]), ("neoverse-n1", ["baseline"]), ("max", ["baseline", "neonbf16"])],
)
def test_a_processor_gets_the_sets_that_it_has(processor: str, sets: list[str]) -> None:
    """And every kernel that it gets runs there: on one of 2012, which has nothing beyond the first version of the
    architecture, too."""
    command = re.sub(r"-cpu \w+", f"-cpu {processor}", EMULATOR)
    assert processor in shlex.split(command)
    kernels = Emulated(command, LIBRARY)
    kernels.set_torch(None, None, cpu.DTYPES)
    try:
        assert kernels.isas() == sets and kernels.isa() == sets[-1]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, weight = torch.ones(20, 70, dtype=dtype), torch.eye(70, dtype=dtype)
            out = torch.zeros(20, 70, dtype=dtype)
            kernels.linear(x, weight, None, out)
            assert torch.equal(out, x)
            q, lse = torch.zeros(1, 5, 2, 16, dtype=dtype), torch.zeros(1, 5, 2)
            k, v, out = torch.ones_like(q), torch.ones_like(q), torch.zeros_like(q)
            kernels.block_attention(q, k, v, *[None] * 8, out, lse, 1.0, 0.0, -1, 0)
            assert torch.equal(out, v)
    finally:
        kernels.close()
