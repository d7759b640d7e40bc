"""Who may import whom: docs/architecture.md says it, and every file is held to it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.house.test_house import modules_imported, name
from tests.paths import ROOT
from twotower_kernels import TwoTowerConfig, TwoTowerModel
from twotower_kernels.bench.checks.random_models import SIZES
from twotower_kernels.ops._library import CUDA

PACKAGE = "twotower_kernels"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EVERYTHING = "everything"


def table(first: str) -> dict[str, list[str]]:
    """The rows of the page's table whose first column is named so: the cells behind each row's name."""
    lines = iter(PAGE.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)  # the rule below the header
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        head, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[head.strip("`")] = cells
    return found


def names(cell: str) -> set[str]:
    """What a cell lists: names in backticks, "everything", or "–" for nothing."""
    found = set(re.findall(r"`([\w.]+)`", cell))
    assert found or cell in ("–", EVERYTHING), cell
    return found or ({EVERYTHING} if cell == EVERYTHING else set())


ROOMS = table("room")


def modules() -> dict[str, Path]:
    """Every module of the package by its full name; a package's `__init__` under the package's."""
    folders = [(ROOT / PACKAGE, PACKAGE), *((ROOT / part, f"{PACKAGE}.{part}") for part in ("reference", "bench"))]
    found = {}
    for folder, prefix in folders:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not (folder == ROOT / PACKAGE and parts[:1] in (("reference",), ("bench",))):  # links to the folders
                found[".".join((prefix, *parts))] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@cache
def all_imports_of(module: str) -> set[str]:
    return modules_imported(MODULES[module])


@cache
def imports_of(module: str) -> set[str]:
    """The modules of the package that a module names in an import, wherever it stands, annotations' included."""
    found = set()
    for imported in all_imports_of(module):
        if imported.split(".")[0] == PACKAGE:  # a module, or a name in one
            found.add(imported if imported in MODULES else imported.rpartition(".")[0])
    assert found <= MODULES.keys(), f"{module} imports {found - MODULES.keys()}, which is not there"
    return found - {module}


def loads_of(path: Path) -> Iterator[str]:
    """What of the package a file loads by its name: the first part of it behind the package's, or "*" if computed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            said = ast.unparse(node.args[0]).lstrip("f").strip("'\"").replace("{__package__}", PACKAGE)
            if said.startswith(f"{PACKAGE}."):
                room = said.removeprefix(f"{PACKAGE}.").split(".")[0]
                yield room if room.isidentifier() else "*"


def test_every_room_is_on_the_page() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_the_page_says(room: str) -> None:
    _, ours, loaded, others = ROOMS[room]
    inside = [module for module in MODULES if room_of(module) == room]
    wrong = []
    for module in inside:
        if names(ours) != {EVERYTHING}:
            rooms = {other: room_of(other) for other in imports_of(module)}
            wrong += [f"{module} imports {m}" for m, r in rooms.items() if r != room and r not in names(ours)]
        by_name = {room, *names(loaded), *(["*"] if names(loaded) else [])}
        wrong += [f"{module} loads {r} by its name" for r in loads_of(MODULES[module]) if r not in by_name]
        tops = {m.split(".")[0] for m in all_imports_of(module)} - sys.stdlib_module_names - {PACKAGE}
        if names(others) != {EVERYTHING}:
            wrong += [f"{module} imports {top}" for top in sorted(tops - names(others))]
        wrong += [f"{module} imports tests"] * ("tests" in tops)
    assert not wrong, "\n".join(wrong)


def test_the_page_allows_no_more_than_is_used() -> None:
    """A room that stopped importing another loses the right to it."""
    for room, (_, ours, _, others) in ROOMS.items():
        inside = [module for module in MODULES if room_of(module) == room]
        if names(ours) != {EVERYTHING}:
            used = {room_of(other) for module in inside for other in imports_of(module)} - {room}
            assert names(ours) <= used, f"{room} imports nothing of {names(ours) - used}"
        if names(others) != {EVERYTHING}:
            used = {m.split(".")[0] for module in inside for m in all_imports_of(module)}
            assert names(others) <= used, f"{room} imports nothing of {names(others) - used}"


def test_ops_load_their_launchers_alone() -> None:
    assert {launcher.split(".")[0] for launcher in CUDA.values()} == names(ROOMS["ops"][2])


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The shortest circle through each node that lies on one, once for each circle: "a -> b -> a"."""
    found = {}
    for start in sorted(graph):
        came, queue = {}, [start]  # a breadth-first search for the way back
        for node in queue:
            for other in sorted(graph[node]):
                if other not in came:
                    came[other] = node
                    queue.append(other)
        if start in came:
            way = [start]
            while len(way) == 1 or way[-1] != start:
                way.append(came[way[-1]])
            found.setdefault(frozenset(way), " -> ".join(reversed(way)))
    return list(found.values())


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": {"e"}}) == ["b -> c -> b", "e -> e"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_of_imports() -> None:
    found = circles({module: imports_of(module) for module in MODULES})
    assert not found, "\n".join(found)


def test_importing_the_package_loads_no_launcher() -> None:
    """The specification, the benchmarks and the program wait for whoever calls them, too."""
    program = f"import sys, {PACKAGE}; print(*(m for m in sys.modules if m.split('.')[0] == {PACKAGE!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    rooms = {room_of(module) for module in done.stdout.split()}
    assert rooms == {"__init__", "options", "quantization", "cpu", "ops", "generation", "model"}


FOLDERS = table("folder")


def test_every_folder_of_sources_is_on_the_page() -> None:
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_include_what_the_page_says(folder: str) -> None:
    wrong, allowed = [], {folder, *names(FOLDERS[folder][1])}
    for path in sorted((ROOT / "csrc" / folder).iterdir()):
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            target = (path.parent / included).resolve()
            if target.is_relative_to(ROOT / "csrc") and target.parent.name not in allowed:
                wrong.append(f"{name(path)} includes {included}")
    assert not wrong, "\n".join(wrong)


def test_states_lie_as_the_page_says() -> None:
    """Every tensor of a state that a model leaves behind, by axes and dtype, when two of three rows were selected."""
    torch.manual_seed(0)
    config = TwoTowerConfig(**SIZES | {"hybrid_override_pattern": "M*"})
    model = TwoTowerModel(config, dtype=torch.bfloat16)
    state = model.prefill(torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]]), torch.tensor([3, 2, 1])).select([2, 0])
    axes = {"B": 2, "R": 3, "T": state.longest, "Hkv": config.num_key_value_heads, "D": config.head_dim}
    axes |= {"C": config.mamba_channels, "width-1": config.conv_kernel - 1, "H": config.hidden_size}
    axes |= {"heads": config.mamba_num_heads, "head_dim": config.mamba_head_dim, "state": config.ssm_state_size}
    dtypes = {"int64": torch.int64, "the model's": torch.bfloat16, "float32, or float64": torch.float32}
    named = [(field, *cells[:2]) for head, cells in table("field").items() for field in re.findall(r"\w+", head)]
    assert {field for field, *_ in named} == {"lengths", "k", "v", "conv", "ssm", "last_hidden", "index"}
    for field, layout, dtype in named:
        value = getattr(state, field)
        tensors = list(value.values()) if isinstance(value, dict) else [value]
        assert len(tensors) == 1 and isinstance(value, dict) == (" per " in layout), field
        assert tensors[0].dtype == dtypes[dtype], field
        for axis, size in zip(layout.split("`")[1].strip("[]").split(", "), tensors[0].shape, strict=True):
            assert size == axes[axis] or (axis == "T" and size > axes[axis]), f"{field}: {axis} is {size}"
