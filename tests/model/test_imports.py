"""The model's files import one another in one direction, annotations included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import twotower_kernels.model

FOLDER = Path(twotower_kernels.model.__file__).parent
PREFIX = "twotower_kernels.model"


def imports(path: Path) -> set[str]:
    """The files of the folder that one of them imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[2] for name in names if name.startswith(f"{PREFIX}.")}
    return found


def test_no_file_is_imported_by_what_it_imports() -> None:
    graph = {path.stem: imports(path) for path in FOLDER.glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # a circle is a CycleError
    assert set(order) == graph.keys()
    assert order.index("cache") < order.index("layers") < order.index("two_tower")
    assert order.index("state") < order.index("capture") < order.index("generate") < order.index("two_tower")


def test_options_know_no_model_and_no_operation() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (FOLDER.parent / "options").glob("*.py"))
    assert "twotower_kernels.model" not in text and "twotower_kernels.ops" not in text
