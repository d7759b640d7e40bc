"""What is saved of a model is what was meant: all of it, or one tensor, in as many bytes as that has."""

import copy
import gc
import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from twotower_kernels import TwoTowerModel
from twotower_kernels.bench.checks.random_models import models

DOWN = "context_tower.layers.2.mixer.experts.31.down_proj.weight"
EXPERT = "denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"
HEADER = 30_000  # bytes for names and shapes


@pytest.fixture
def model() -> TwoTowerModel:
    return models("MEE-", torch.float32, n_routed_experts=32, n_group=1, topk_group=1).ours


def nbytes(model: TwoTowerModel) -> int:
    return sum(p.nbytes for p in model.parameters())


def assert_same(ours: TwoTowerModel, other: TwoTowerModel) -> None:
    state = other.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_safetensors_saves_and_loads_the_model(model: TwoTowerModel, tmp_path: Path) -> None:
    """`save_model` drops what shares a storage with something else: nothing does."""
    path = tmp_path / "model.safetensors"
    save_model(model, str(path))
    assert load_file(path).keys() == model.state_dict().keys()
    assert 0 <= path.stat().st_size - nbytes(model) < 2 * HEADER
    other = TwoTowerModel(model.config)
    assert load_model(other, str(path)) == (set(), [])
    assert_same(model, other)


def test_what_is_saved_is_a_checkpoint(model: TwoTowerModel, tmp_path: Path) -> None:
    save_model(model, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(asdict(model.config)))
    again = TwoTowerModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same(model, again)


def test_torch_saves_the_state_in_the_bytes_it_has(model: TwoTowerModel, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    entries = len(model.state_dict())
    assert 0 <= path.stat().st_size - nbytes(model) < 500 * entries  # each in an archive's entry of its own, aligned
    other = TwoTowerModel(model.config)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert_same(model, other)


@pytest.mark.parametrize(
    "key", [EXPERT, "context_tower.layers.2.mixer.experts.31.down_proj.weight", "scale_shift_tables.3"]
)
def test_one_tensor_is_saved_without_its_neighbours(model: TwoTowerModel, tmp_path: Path, key: str) -> None:
    piece = model.state_dict()[key]
    save_file({"piece": piece}, tmp_path / "piece.safetensors")
    assert torch.equal(load_file(tmp_path / "piece.safetensors")["piece"], piece)
    torch.save(piece, tmp_path / "piece.pt")
    assert torch.equal(torch.load(tmp_path / "piece.pt", weights_only=True), piece)
    for path in tmp_path.iterdir():
        assert piece.nbytes <= path.stat().st_size < piece.nbytes + 2000
    assert len(pickle.dumps(piece)) < piece.nbytes + 2000
    assert copy.deepcopy(piece).untyped_storage().nbytes() == piece.nbytes


@pytest.mark.parametrize("inference", [False, True])
def test_pieces_are_the_weights_themselves(model: TwoTowerModel, inference: bool) -> None:
    """Whoever changes one changes the model, as with any other entry of a state; and it outlives the model."""
    with torch.inference_mode(inference):
        state = model.state_dict()
    stacked = model.denoiser_tower.layers[1].mixer.experts.up
    state[EXPERT].fill_(7)
    assert torch.equal(stacked[3], torch.full_like(stacked[3], 7)) and not (stacked[2] == 7).any()
    stacked[3].mul_(2)
    assert bool((state[EXPERT] == 14).all())
    kept = state[EXPERT]
    del model, state, stacked
    gc.collect()
    fresh = [torch.zeros_like(kept) for _ in range(200)]
    assert bool((kept == 14).all()) and len(fresh) == 200


def test_a_model_without_memory_has_a_state(model: TwoTowerModel) -> None:
    state = TwoTowerModel(model.config, device="meta").state_dict()
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(value.is_meta for value in state.values())


def test_variables_stay_variables(model: TwoTowerModel) -> None:
    """With `keep_vars` the pieces are views that a gradient flows through."""
    model.denoiser_tower.layers[1].mixer.experts.up.requires_grad_()
    model.state_dict(keep_vars=True)[EXPERT].sum().backward()
    gradient = model.denoiser_tower.layers[1].mixer.experts.up.grad
    assert gradient is not None and gradient[3].eq(1).all() and not gradient[2].any()
