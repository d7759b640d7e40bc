"""The struct that Python fills for `remask` is the one that its kernels read: names, order, types, size."""

import ctypes
import re

import pytest

from tests.paths import ROOT
from twotower_kernels import cpu
from twotower_kernels.cuda import build as cuda
from twotower_kernels.ops import remask_fields
from twotower_kernels.ops.remask_fields import Fields

KINDS = {"int64": ctypes.c_int64, "double": ctypes.c_double}  # everything else is a pointer
SHARED = [ROOT / "csrc" / "common" / f"remask_{name}.h" for name in ("policy", "arguments")]


def body(name: str) -> str:
    """What stands between the braces of a struct of the headers, without comments and methods."""
    text = "".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in SHARED)
    (found,) = re.findall(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)
    return re.sub(r"REMASK_METHOD[^{]*{[^}]*}", "", found)


def fields(struct: str, prefix: str = "", element: str = "") -> list[tuple[str, type]]:
    """Names and types of what is in it, in order; of a small struct inside, as `Fields` calls them."""
    found: list[tuple[str, type]] = []
    for declaration in filter(None, map(str.strip, body(struct).split(";"))):
        type_name, declared = re.fullmatch(r"((?:const )?\w+(?:<\w+>)?)\s*(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        for raw in declared.split(","):
            name = prefix + raw.replace("*", "").strip()
            inside = re.fullmatch(r"(Remask\w+)(?:<(\w+)>)?", type_name)
            if inside and inside[1] in ("RemaskOptions", "RemaskBounds"):
                found += fields(inside[1])
            elif inside:
                found += fields(inside[1], f"{name}_", inside[2])
            else:
                kind = element if type_name == "T" else type_name
                found.append((name, ctypes.c_void_p if "*" in raw else KINDS[kind]))
    return found


def test_fields_are_those_of_the_header() -> None:
    short = {"_all": "", "_data": "", "_ids": ""}  # the first of a small struct bears its name
    named = [(re.sub("|".join(f"{end}$" for end in short), "", name), kind) for name, kind in fields("Remask")]
    assert named == list(Fields._fields_) and len(named) > 90
    assert ctypes.sizeof(Fields) == 8 * len(named)


def test_another_size_is_refused() -> None:
    empty = Fields()
    with pytest.raises(ValueError, match=f"expected a struct of {ctypes.sizeof(empty)} bytes, got 8"):
        cpu.kernels().remask(ctypes.addressof(empty), 8)
    with pytest.raises(ValueError, match="expected a struct"):
        cpu.kernels().remask(0, ctypes.sizeof(empty))


def test_dtypes_are_numbered_alike_on_cpus_and_gpus() -> None:
    assert cpu.DTYPES[: len(cuda.DTYPES)] == cuda.DTYPES
    assert list(remask_fields.CODES) == list(cpu.DTYPES)
