"""`twotower info`: what is installed, what kernels for GPUs cost at their first call, what a checkpoint needs."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower_kernels
from tests.gpu.build_kernels import cuda_modules
from tests.model.small_model import save_small_model, small_model
from tests.program.command_line import error_of, run
from twotower_kernels.cli import info
from twotower_kernels.cuda import build as cuda
from twotower_kernels.options.units import duration, size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_info_tells_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", folder) == 0
    out = capsys.readouterr().out
    facts = ("instruction set", "Triton", "NVRTC", "context tower", "128 K context", "on two devices")
    for fact in (twotower_kernels.__version__, torch.__version__, *facts):
        assert fact in out
    assert "adaln_norm" in out


@pytest.mark.parametrize("columns", [40, 80])
def test_info_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole words, at 40 columns in a list: every op with what there is of it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    rows: dict[str, list[str]] = {}
    for line in lines:
        words = line.split()
        if words and words[0] in info.ops():
            rows[words[0]] = words[1:]
        elif line.startswith("  ") and rows:
            rows[list(rows)[-1]] += words
    told = {name: " ".join(words).replace("CPU: ", "").replace("GPU: ", "") for name, words in rows.items()}
    assert told.keys() == info.ops().keys()
    assert told["block_attention"] == "yes built, not run differentiable"
    assert told["remask"].removesuffix(" -") == "yes built, not run"
    assert told["linear"].replace("- ", "") == "yes differentiable"


def test_info_asks_the_dispatcher() -> None:
    """An op that runs on the CPU says so; one that is only declared says that nothing serves it."""
    library = torch.library.Library("twotower", "FRAGMENT")
    try:
        library.define("declared_only(Tensor x) -> Tensor")
        found = info.ops()
    finally:
        library._destroy()
    assert found["declared_only"] == info.Op(cpu=False, gpu=False, differentiable=False)
    assert found["adaln_norm"].cpu and found["linear"].cpu
    assert found["block_attention"] == info.Op(cpu=True, gpu=True, differentiable=True)
    assert "declared_only" not in info.ops()


def test_sizes_are_those_of_the_loaded_model(folder: Path) -> None:
    """Parameters and bytes per tower, and what a state really holds."""
    model = small_model()
    context = sum(p.numel() for name, p in model.state_dict().items() if name.startswith("context_"))
    total = sum(p.numel() for p in model.state_dict().values())
    sizes = info.sizes(folder)
    assert sizes.parameters == {"context": context, "denoiser": total - context}
    assert sizes.weights == {"context": 8 * context, "denoiser": 8 * (total - context)}
    with torch.no_grad():
        state = model.prefill(torch.tensor([[5, 6, 7]]))
    assert sizes.kv_per_token == sum(t[0, 0].nbytes for kv in (state.k, state.v) for t in kv.values())
    assert sizes.state_per_row == sum(t[0].nbytes for part in (state.conv, state.ssm) for t in part.values())
    row = 2**17 * sizes.kv_per_token + sizes.state_per_row
    assert sizes.long_context == 8 * total + row
    assert sizes.long_context_apart == {"context": 8 * context + row, "denoiser": 8 * (total - context) + row}


def test_sizes_of_a_backbone_leave_out_layers_for_further_tokens(folder: Path, tmp_path: Path) -> None:
    """Its one tower is counted once, in the dtype that most of it has if the config leaves that open."""
    weights = load_file(folder / "model.safetensors")
    names = {"context_tower": "backbone", "context_lm_head": "lm_head"}
    backbone = {
        key.replace(start, names[start]): value.half()
        for key, value in weights.items()
        if (start := key.split(".")[0]) in names
    }
    save_file(backbone | {"mtp.norm.weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "auto"}))
    with pytest.warns(UserWarning, match="multi-token prediction"):
        sizes, whole = info.sizes(tmp_path), info.sizes(folder)
    assert sizes.parameters == {"backbone": whole.parameters["context"]}
    assert sizes.weights == {"backbone": 2 * whole.parameters["context"]}
    assert sizes.kv_per_token == whole.kv_per_token / 4  # float64 there


@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_sizes_of_one_tower(folder: Path, tmp_path: Path, tower: str) -> None:
    weights = load_file(folder / "model.safetensors")
    own = {key: value for key, value in weights.items() if key.startswith("context_") == (tower == "context")}
    save_file(own, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert info.sizes(tmp_path).parameters == {tower: info.sizes(folder).parameters[tower]}


def test_what_could_not_be_loaded_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 10**9}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert "1000000000 experts" in error_of(capsys, "info", tmp_path)


def test_info_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise ImportError("not built")

    monkeypatch.setattr("twotower_kernels.cpu.kernels", missing)
    assert run("info") == 0
    assert "none: not built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (118e9, "118 GB"), (5e15, "5e+03 TB")],
)
def test_sizes_are_readable(number: float, text: str) -> None:
    assert size(int(number)) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.000254, "0.254 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (2.345, "2.35 s")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- kernels for GPUs -------------------------------------------------------------------------------------------------

MS = r"[\d.e+-]+ m?s"  # on a machine that is busy, more than a second


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1e-3, "s": 1}[unit]


def test_without_a_gpu_one_kernel_is_measured() -> None:
    facts = info.gpu_kernels()
    assert re.fullmatch(r"\d+\.\d+, by cuda-core \d.*", facts["NVRTC"])
    told = rf"moe_plan for sm_90a compiled in ({MS}), read from the cache in ({MS})"
    found = re.fullmatch(told, facts["CUDA C++ kernels"])
    assert found and seconds(found[1]) > seconds(found[2]) > 0


def test_a_cache_that_cannot_be_used_is_said() -> None:
    cuda.cache_folder().mkdir(parents=True)
    cuda.cache_folder().chmod(0o777)
    with pytest.warns(UserWarning, match="others can write here"):
        assert info.gpu_kernels()["CUDA C++ kernels"].endswith("s, not kept")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU to compile for, and the sources that a quick compiler is given."""
    sources: list[str] = []

    def quick(source: str, defines: object, arch: str) -> bytes:
        sources.append(source)
        return f"{source} {defines} {arch}".encode()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_100a")
    monkeypatch.setattr(cuda, "compile", quick)
    return sources


def test_on_a_gpu_every_kernel_is_measured(gpu: list[str]) -> None:
    """Compiled once, and kept for whoever calls it first."""
    count = len(info.builds())
    facts = info.gpu_kernels()["CUDA C++ kernels"]
    assert re.fullmatch(rf"for sm_100a, {count} compiled in {MS}", facts)
    assert len(gpu) == len(list(cuda.cache_folder().iterdir())) == count
    facts = info.gpu_kernels()["CUDA C++ kernels"]
    assert re.fullmatch(rf"for sm_100a, {count} read from the cache in {MS}", facts)
    assert len(gpu) == count


def test_patience_ends(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel takes longer than the time allowed: the others are left to their first call, the kept ones read."""
    monkeypatch.setattr(info, "PATIENCE", 0.0)
    left = len(info.builds()) - 1
    wanted = f"1 compiled in {MS}, {left} still to compile at their first call"
    assert re.fullmatch(f"for sm_100a, {wanted}", info.gpu_kernels()["CUDA C++ kernels"])
    wanted = f"1 read from the cache in {MS}, 1 compiled in {MS}, {left - 1} still to compile at their first call"
    assert re.fullmatch(f"for sm_100a, {wanted}", info.gpu_kernels()["CUDA C++ kernels"])
    assert len(gpu) == 2


def test_every_kernel_is_in_the_list() -> None:
    modules = [importlib.import_module(f"twotower_kernels.{name}") for name in cuda_modules()]
    assert sorted(info.builds()) == sorted(build for module in modules for build in module.builds())


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise ImportError(cuda._advice("no cuda.core"))

    monkeypatch.setattr(cuda, "_core", missing)
    monkeypatch.setitem(sys.modules, "triton", None)
    facts = info.gpu_kernels()
    assert facts.keys() == {"Triton", "NVRTC"}
    for fact in facts.values():
        assert re.match(r"none: .* pip install 'twotower-kernels\[cuda1[23]\]' \(", fact)
    assert run("info") == 0
    assert "pip install" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("refused\nby a long log"), OSError(), MemoryError("no room")])
def test_a_compiler_that_fails_is_no_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(cuda, "compile", broken)
    fact = info.gpu_kernels()["CUDA C++ kernels"]
    assert fact == f"none: {str(error).splitlines()[0] if str(error) else repr(error)}"
    assert run("info") == 0
