"""The package's loader beyond what the specification's does: damage of any kind, memory, towers, layout, the bar."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.paths import GOLDEN, ROOT
from twotower_kernels import TwoTowerConfig, TwoTowerModel
from twotower_kernels.bench.checks.random_models import models, random_ids
from twotower_kernels.model import loading

TINY = GOLDEN / "tiny"
UP = "context_tower.layers.1.mixer.experts.{}.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model of every kind of layer, in one file."""
    path = tmp_path / "model"
    path.mkdir()
    model = models("ME*-", torch.float32).ours
    (path / "config.json").write_text(json.dumps({**vars(model.config), "torch_dtype": "float32"}))
    save_file(model.state_dict(), path / "model.safetensors")
    return path


def assert_same(model: TwoTowerModel, path: Path) -> None:
    weights, state = load_file(path / "model.safetensors"), model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    """safetensors takes the state dict as it is, although the experts in it share their memory."""
    model = TwoTowerModel.from_pretrained(folder)
    assert_same(model, folder)
    assert all(not p.is_meta and p.device.type == "cpu" for p in model.parameters())
    again = TwoTowerModel(model.config)
    assert str(again.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    ids = random_ids(2, 5)
    assert torch.equal(again.denoise(ids, again.prefill(ids), 0.5), model.denoise(ids, model.prefill(ids), 0.5))


def test_experts_are_stacked_and_shown_one_by_one(folder: Path) -> None:
    model = TwoTowerModel.from_pretrained(folder)
    experts = model.context_tower.layers[1].mixer.experts
    assert experts.up.shape == (8, 24, 32) and experts.down.shape == (8, 32, 24)
    assert experts.up.is_contiguous() and experts.down.is_contiguous()
    state = model.state_dict()
    for i in range(8):
        assert state[UP.format(i)].data_ptr() == experts.up[i].data_ptr()
    assert state["scale_shift_tables.3"].data_ptr() == model.scale_shift_tables.tables[3].data_ptr()
    assert set(state) == set(loading.targets(model))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_loaded_strictly(folder: Path, assign: bool) -> None:
    model = TwoTowerModel.from_pretrained(folder)
    good = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(good, assign=assign)
    assert all(torch.equal(value, good[key]) for key, value in model.state_dict().items())
    for change, message in (
        ({UP.format(3): None}, rf"Missing key.*{UP.format(3)}"),
        ({UP.format(8): torch.zeros(24, 32)}, rf"Unexpected key.*{UP.format(8)}"),
        ({"scale_shift_tables.4": torch.zeros(3, 32)}, r"Unexpected key.*scale_shift_tables\.4"),
        ({UP.format(2): torch.zeros(32, 24)}, rf"size mismatch for {UP.format(2)}: expected \[24, 32\], got \[32, 24"),
    ):
        bad = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            model.load_state_dict(bad, assign=assign)


def test_weights_loaded_in_inference_mode_can_be_changed_outside(folder: Path) -> None:
    with torch.inference_mode():
        model = TwoTowerModel.from_pretrained(folder)
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    assert not any(p.any() for p in model.parameters())


# --- dtypes, towers, backbones ---------------------------------------------------------------------------------------


def test_dtypes(folder: Path) -> None:
    """The config's unless told otherwise; sensitive weights never narrower than in the file."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float64)):
        for name, p in TwoTowerModel.from_pretrained(folder, dtype=dtype).named_parameters():
            kept = name.endswith(("gate.weight", "e_score_correction_bias", "A_log", "mixer.D", "dt_bias"))
            assert p.dtype == (torch.promote_types(expected, torch.float32) if kept else expected), name


def test_without_a_file_auto_is_float32(folder: Path) -> None:
    config = replace(TwoTowerModel.from_pretrained(folder).config, torch_dtype="auto")
    assert {p.dtype for p in TwoTowerModel(config).parameters()} == {torch.float32}


@pytest.mark.parametrize("towers", ["context", "denoiser"])
def test_one_tower_reads_its_own_keys_only(folder: Path, towers: str) -> None:
    """The other tower's may be missing, or in files of the wrong shape; an unknown key is still an error."""
    weights = load_file(folder / "model.safetensors")
    context = {key: value for key, value in weights.items() if key.startswith("context_")}
    own = context if towers == "context" else {key: value for key, value in weights.items() if key not in context}
    save_file(own, folder / "model.safetensors")
    assert_same(TwoTowerModel.from_pretrained(folder, towers=towers), folder)
    with pytest.raises(ValueError, match=r"key \S+ is missing"):
        TwoTowerModel.from_pretrained(folder)
    save_file({**own, "visual.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"key visual\.weight is not part of this model"):
        TwoTowerModel.from_pretrained(folder, towers=towers)


@pytest.mark.parametrize("towers", ["both", "context", "denoiser"])
def test_a_backbone_is_a_model_without_time(folder: Path, towers: str) -> None:
    """Both towers are it, in memory of their own, and the denoiser does the same at any time as at none."""
    weights = load_file(folder / "model.safetensors")
    backbone = {
        key.replace("context_tower", "backbone").replace("context_lm_head", "lm_head"): value
        for key, value in weights.items()
        if key.startswith("context_")
    }
    save_file(backbone, folder / "model.safetensors")
    model, ids = TwoTowerModel.from_pretrained(folder, towers=towers), random_ids(2, 5)
    assert not any(p.is_meta for p in model.parameters())
    if towers != "denoiser":
        assert torch.equal(model.forward_ar(ids), models("ME*-", torch.float32).ours.forward_ar(ids))
    if towers != "context":
        for t in (0.0, 0.3, 1.0):
            assert torch.equal(model.denoise(ids, model.empty_state(2), t), model.denoise(ids, model.empty_state(2)))
    if towers == "both":
        assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    save_file(backbone | {"t_block.1.bias": torch.zeros(96)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"key t_block\.1\.bias is not part of this model"):
        TwoTowerModel.from_pretrained(folder, towers=towers)


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(path: Path, change: bytes | None, position: int, flip: int) -> None:
    data = bytearray(path.read_bytes())
    if change is None:
        del data[position:]
    else:
        data[position] ^= flip
    path.write_bytes(data)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_an_error(tmp_path: Path, folder: Path, fraction: float) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    weights = broken / "model.safetensors"
    damaged(weights, None, int(fraction * weights.stat().st_size), 0)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        TwoTowerModel.from_pretrained(broken)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_header_is_an_error(tmp_path: Path, folder: Path, place: float, flip: int) -> None:
    """Any byte of it: its length, a key, a dtype, a shape, an offset. A change that means nothing (one JSON spelling
    of a space for another) loads the same weights."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    weights = broken / "model.safetensors"
    (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
    damaged(weights, b"", int(place * (8 + length)), flip)
    try:
        model = TwoTowerModel.from_pretrained(broken)
    except ValueError as error:
        assert "broken" in str(error)
    else:
        assert_same(model, folder)


HOSTILE = {
    "a path upwards": '{"weight_map": {"a": "../model.safetensors"}}',
    "an absolute path": '{"weight_map": {"a": "/etc/passwd"}}',
    "a number": '{"weight_map": {"a": 1}}',
    "a null byte": '{"weight_map": {"a": "model\\u0000.safetensors"}}',
    "the folder": '{"weight_map": {"a": "."}}',
    "nothing": '{"weight_map": {"a": ""}}',
    "no map": '{"weight_map": 3}',
    "depth": '{"weight_map": ' + "[" * 100_000,
    "a promise": '{"weight_map": {"a": "model.safetensors"}}',
    "no keys": '{"weight_map": {}}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_index_is_an_error(folder: Path, what: str) -> None:
    """Although good weights lie beside it."""
    (folder / "model.safetensors.index.json").write_text(HOSTILE[what])
    with pytest.raises(ValueError, match=r"model: key|index\.json: |promises key a here"):
        TwoTowerModel.from_pretrained(folder)


def test_the_index_must_be_a_file_of_shards_that_exist(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    (folder / "model.safetensors").rename(folder / "another.safetensors")
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors: this shard is named by .* but is missing"):
        TwoTowerModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_a_dtype_that_is_none_of_weights_is_an_error(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[UP.format(0)] = weights[UP.format(0)].to(dtype)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"key {UP.format(0)} has dtype \S+, expected one of float64, float32"):
        TwoTowerModel.from_pretrained(folder)


def test_everything_is_checked_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key's shape is wrong: no tensor was touched."""
    weights = load_file(folder / "model.safetensors")
    last = max(weights)
    save_file({**weights, last: torch.zeros(7)}, folder / "model.safetensors")
    monkeypatch.setattr(loading.checkpoint, "tensors", lambda *_: pytest.fail("read before it was checked"))
    with pytest.raises(ValueError, match=rf"key {last} has shape \[7\]"):
        TwoTowerModel.from_pretrained(folder)


# --- memory and the bar ----------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
import twotower_kernels as tt

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.zeros(8) @ torch.zeros(8)  # what torch itself takes on first use is not the loader's

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

for dtype, towers in ((torch.bfloat16, "both"), (torch.float32, "context")):
    peak, done, before = 0, False, anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    model = tt.TwoTowerModel.from_pretrained(sys.argv[1], dtype=dtype, towers=towers)
    done = True
    thread.join()
    print(max(peak, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB of bfloat16, mostly experts, in two shards."""
    path = tmp_path_factory.mktemp("large")
    sizes = dict(vocab_size=4096, hidden_size=512, hybrid_override_pattern="EEEE", n_routed_experts=24)
    sizes |= dict(num_experts_per_tok=2, moe_intermediate_size=480, moe_shared_expert_intermediate_size=512)
    (path / "config.json").write_text(json.dumps(sizes | {"torch_dtype": "bfloat16"}))
    model = TwoTowerModel(TwoTowerConfig(**sizes), device="meta", dtype=torch.bfloat16)
    weights = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in model.state_dict().items()}
    keys, weight_map = sorted(weights), {}
    for name, part in (("a.safetensors", keys[::2]), ("b.safetensors", keys[1::2])):
        save_file({key: weights[key] for key in part}, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")
def test_no_weight_is_held_twice(large: Path) -> None:
    """Anonymous memory at its peak, over what it was, is at most 1.1 times the weights: in the files' dtype, both
    towers; and converted to a wider one, one tower."""
    process = [sys.executable, "-c", MEASURE, str(large)]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        peak, weights = map(int, line.split())
        assert weights > 1.8e8
        assert 0.9 * weights < peak < 1.1 * weights


def test_the_bar_is_shown_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (None, False):
        TwoTowerModel.from_pretrained(folder, progress=progress)
        assert capsys.readouterr().err == ""
    TwoTowerModel.from_pretrained(folder, progress=True)
    assert "Loading model: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, False)])
def test_large_checkpoints_show_the_bar_in_a_terminal(
    folder: Path, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "LARGE", 1000)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    TwoTowerModel.from_pretrained(folder)
    assert ("100%" in capsys.readouterr().err) == shown
