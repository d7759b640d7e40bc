"""The rules of the house: the layout is the documentation, so the layout is tested."""

import ast
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import twotower_kernels as tt
from tests.paths import GOLDEN, ROOT

# One stem per family of ops, the same in every folder.
FAMILIES = ("adaln", "attention", "linear", "mamba2", "moe", "remask")
OPS = [(stem, op) for stem in FAMILIES for op in importlib.import_module(f"twotower_kernels.reference.{stem}").CASES]
GENERATED = {"build", "dist", "__pycache__"}


def files(*suffixes: str) -> list[Path]:
    """The repository's own files with these suffixes (all, without)."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or path.name == ".git":  # what lies elsewhere, too; in a worktree, a file
                continue
            if path.is_dir():
                hidden = path.name.startswith(".") and path.name != ".ci"
                if not hidden and path.name not in GENERATED and path.suffix != ".egg-info":
                    yield from walk(path)
            elif not suffixes or path.suffix in suffixes:
                yield path

    return list(walk(ROOT))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules_imported(path: Path) -> set[str]:
    """The modules that a Python file imports, by their full names; what it imports from a package counts as one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name(path)}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(path: Path) -> set[str]:
    """The top-level packages that a Python file imports."""
    return {module.split(".")[0] for module in modules_imported(path)}


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", ".ci/run"])
def test_the_house_has(path: str) -> None:
    assert (ROOT / path).is_file()


def test_the_gate_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_family_is_known_and_tested() -> None:
    """A stem with inputs to test is a family, or a part of one that was split, and a family has its tests."""
    for path in (ROOT / "reference").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "make_inputs" for node in tree.body):
            assert path.stem.split("_")[0] in FAMILIES, name(path)
    for stem in FAMILIES:
        assert (ROOT / "tests" / "specification" / f"test_{stem}.py").is_file(), f"reference/{stem}.py has no test"


def test_specification_and_kernels_know_nothing_of_each_other() -> None:
    """They share the options, which know nothing of either."""
    parts = {"reference", "bench"}  # of the package, but rooms of their own
    for path in (ROOT / "reference").rglob("*.py"):
        own = {module for module in modules_imported(path) if module.startswith(("twotower_kernels", "tests"))}
        if path == ROOT / "reference" / "__init__.py":  # imported as `reference`, it hands over to the package's own
            own.discard("twotower_kernels.short_names.shorten")
        assert all(module.startswith(("twotower_kernels.reference.", "twotower_kernels.options.")) for module in own), (
            name(path)
        )
    for path in (ROOT / "twotower_kernels" / "options").rglob("*.py"):
        own = {module for module in modules_imported(path) if module.startswith(("twotower_kernels", "tests"))}
        assert all(module.startswith("twotower_kernels.options.") for module in own), name(path)
    for path in (ROOT / "bench").rglob("*.py"):
        assert "tests" not in imported(path), name(path)
    for path in (ROOT / "twotower_kernels").rglob("*.py"):
        rooms = {module.split(".")[1] for module in modules_imported(path) if module.startswith("twotower_kernels.")}
        assert not rooms & parts and "tests" not in imported(path), name(path)


def test_files_fit_in_the_head() -> None:
    sizes = {
        name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(".py", ".cpp", ".cu", ".h")
    }
    assert {path: lines for path, lines in sizes.items() if lines > 500} == {}


# Written so that the patterns do not match themselves.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.:/>-])/(?:home|root|opt|work|tmp|Users)/\w",
    "something left for later": r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b",
    "a figure still to be filled in": r"@[@]\w+@[@]",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains(what: str) -> None:
    found = []
    for path in files():
        if path.suffix in (".safetensors", ".png", ".so"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := re.search(FORBIDDEN[what], line):
                found.append(f"{name(path)}:{number}: {match[0]}")
    assert found == []


def test_tolerances_hide_nothing() -> None:
    found = []
    for path in files(".py"):
        for match in re.finditer(r"\b[ar]tol\s*=\s*([\d.]+(?:e[+-]?\d+)?)", path.read_text(encoding="utf-8")):
            if float(match[1]) > 1e-2:
                found.append(f"{name(path)}: {match[0]}")
    assert found == []


# --- cases and inputs, shared by tests and benchmarks ----------------------------------------------------------------


def test_the_ops_are_the_public_ones() -> None:
    assert {stem: set(importlib.import_module(f"twotower_kernels.reference.{stem}").CASES) for stem in FAMILIES} == {
        "adaln": {"rms_norm", "adaln_norm", "gated_residual", "gated_residual_adaln_norm"},
        "attention": {"block_attention", "context_attention", "merge_attention", "append_kv"},
        "linear": {"linear"},
        "mamba2": {"mamba2_scan", "gated_rms_norm"},
        "moe": {"moe_gate", "moe_route", "moe_plan", "moe_experts"},
        "remask": {"remask"},
    }


@pytest.mark.parametrize(("stem", "op"), OPS, ids=[op for _, op in OPS])
def test_every_case_runs(stem: str, op: str) -> None:
    """`make_inputs` gives arguments the op takes, the same for the same seed, and the op has a docstring."""
    module = importlib.import_module(f"twotower_kernels.reference.{stem}")
    function = getattr(module, op)
    assert inspect.getdoc(function)
    small = [case for case in module.CASES[op] if not case.startswith("released")]
    assert small, f"{op}: every case is of released size"
    for case in small:
        inputs, again = module.make_inputs(op, case, seed=3), module.make_inputs(op, case, seed=3)
        inspect.signature(function).bind(**inputs)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, again[key], rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            function(**inputs)


# --- recorded data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "count"), [("policies", 106), ("masks", 49)])
def test_recorded_cases_are_complete(folder: str, count: int) -> None:
    cases = json.loads((GOLDEN / folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == count
    assert {case["file"] for case in cases} == {path.name for path in (GOLDEN / folder).glob("*.safetensors")}
    for case in cases:
        with safe_open(str(GOLDEN / folder / case["file"]), framework="pt") as file:
            assert set(file.keys()) == set(case["tensors"]), case["name"]


@pytest.mark.parametrize(
    ("folder", "shards", "generations"), [("tiny", 1, 6), ("tiny_bf16", 1, 0), ("grouped_router", 3, 6)]
)
def test_recorded_models_are_complete(folder: str, shards: int, generations: int) -> None:
    weights = sorted((GOLDEN / folder).glob("model*.safetensors"))
    assert len(weights) == shards
    for path in [*weights, GOLDEN / folder / "io.safetensors"]:
        with safe_open(str(path), framework="pt") as file:
            assert len(set(file.keys())) > 0
    assert len(json.loads((GOLDEN / folder / "generations.json").read_text(encoding="utf-8"))) == generations


# --- what the house's papers promise ------------------------------------------------------------------------------


def test_every_requirement_is_pinned() -> None:
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{path.name}: {line} is not pinned"


def test_version_and_licence_agree() -> None:
    from twotower_kernels import __version__

    assert '"Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")  # in a wheel: test_packaging.py
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog if ".dev" in __version__ else f"## [{__version__}]" in changelog


@pytest.mark.parametrize("page", [path for path in files(".md") if GOLDEN not in path.parents], ids=name)
def test_pages_tell_the_truth(page: Path) -> None:
    """Every `make` target a page names exists, and so does every file it links to."""
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z0-9]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def rows_of_ops() -> list[list[str]]:
    """The README's table of operations: op, CPU kernel, GPU kernel, specification, tests."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("|")]
    of_ops = [row for row in cells if re.fullmatch(r"`\w+`", row[0]) and len(row) == 5]
    return [row for row in of_ops if row[1].startswith("[")]  # that of what calls cost has numbers there


def test_readme_lists_exactly_the_ops() -> None:
    rows = rows_of_ops()
    assert {row[0].strip("`") for row in rows} == {op for _, op in OPS}
    stems = {op: stem for stem, op in OPS}
    for op, cpu_kernel, _, specification, tests in rows:
        stem = stems[op.strip("`")]
        assert f"[`reference/{stem}.py`]" in specification and f"[`tests/specification/test_{stem}.py`]" in tests
        assert re.match(rf"\[`csrc/cpu/{stem}\w*\.cpp`\]", cpu_kernel), f"{op}: {cpu_kernel}"


def test_readme_and_dispatcher_agree() -> None:
    """A backend that the table names for an op is registered for what the op calls, and no other is."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("twotower::")}
    for op, cpu_kernel, gpu_kernel, _, _ in rows_of_ops():
        name = f"twotower::{op.strip('`')}"
        assert name in registered, name
        for key, cell in (("CPU", cpu_kernel), ("CUDA", gpu_kernel)):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            assert has == (cell != "–"), f"{name}: the table says {cell} for {key}, the dispatcher {has}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), f"{name} has no fake"


def test_every_operator_is_checked() -> None:
    """Each registered operator is given to opcheck somewhere, by its name."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    assert tests.count("opcheck(") >= len(FAMILIES)
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("twotower::"):
            name = full.removeprefix("twotower::").split(".")[0]
            assert re.search(rf"\b{name}\b", tests), f"{name} is in no test of a kernel"


def test_everything_public_is_explained() -> None:
    for public in tt.__all__:
        thing = getattr(tt, public)
        if callable(thing):
            assert inspect.getdoc(thing), public


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{page}.md" for page in ("drop_in", "generate_blocks", "speculative", "transformers"))],
)
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page's Python, one block after the other, as a reader would paste it at the repository's root."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    exec("\n".join(blocks), {})
