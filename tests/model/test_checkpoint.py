"""Folders of safetensors: what is read, and what is said about a folder that is damaged, incomplete or hostile. The
specification's loader and the package's are held to the same."""

import json
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.paths import GOLDEN
from twotower_kernels import TwoTowerModel
from twotower_kernels.model import checkpoint as package_checkpoint
from twotower_kernels.reference import checkpoint
from twotower_kernels.reference.model import TwoTower

Weights = dict[str, Tensor]
Loader = Callable[..., TwoTower | TwoTowerModel]
A_LOG = "denoiser_tower.layers.0.mixer.A_log"
EMBEDDINGS = "context_tower.embeddings.weight"
GATE = "context_tower.layers.1.mixer.gate.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_file(GOLDEN / "tiny" / "model.safetensors")


@pytest.fixture(params=[TwoTower, TwoTowerModel], ids=["reference", "package"])
def load(request: pytest.FixtureRequest) -> Loader:
    return request.param.from_pretrained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with its config, and no weights yet."""
    path = tmp_path / "model"
    path.mkdir()
    shutil.copy(GOLDEN / "tiny" / "config.json", path)
    return path


def save(folder: Path, *shards: Weights) -> None:
    """One file, or shards and their index."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(weights: Weights) -> tuple[Weights, Weights]:
    """Two shards: the context tower and all the rest."""
    context = {key: value for key, value in weights.items() if key.startswith("context_tower.")}
    return context, {key: value for key, value in weights.items() if key not in context}


def assert_same_weights(model: TwoTower | TwoTowerModel, weights: Weights) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key


# --- what is read ----------------------------------------------------------------------------------------------------


def test_one_file(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, weights)
    assert_same_weights(load(folder), weights)


def test_shards(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, *split(weights))
    assert_same_weights(load(str(folder)), weights)


def test_shards_may_be_links(load: Loader, folder: Path, weights: Weights) -> None:
    """Download caches keep a snapshot as links to files elsewhere."""
    save(folder, *split(weights))
    for path in folder.glob("*.safetensors"):
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)
    assert_same_weights(load(folder), weights)


def test_embedding_is_embeddings(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, {key.replace("embeddings.", "embedding."): value for key, value in weights.items()})
    assert_same_weights(load(folder), weights)


@pytest.mark.parametrize("head_first", [False, True], ids=["head last", "head first"])
def test_a_backbone_seeds_both_towers(load: Loader, folder: Path, weights: Weights, head_first: bool) -> None:
    """Whatever the order of its shards."""
    tower, _ = split(weights)
    backbone = {key.replace("context_tower.", "backbone."): value for key, value in tower.items()}
    head = {"lm_head.weight": weights["context_lm_head.weight"]}
    save(folder, *((head, backbone) if head_first else (backbone, head)))
    state = load(folder).state_dict()
    for key, value in tower.items():
        assert torch.equal(state[key], value), key
        assert torch.equal(state[key.replace("context_", "denoiser_")], value), key
    assert torch.equal(state["context_lm_head.weight"], head["lm_head.weight"])
    assert torch.equal(state["lm_head.weight"], head["lm_head.weight"])


def test_sensitive_weights_keep_their_width(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, weights)
    state = load(folder, dtype=torch.bfloat16).state_dict()
    assert state[EMBEDDINGS].dtype == torch.bfloat16
    for key in state:
        if key.endswith(("gate.weight", "e_score_correction_bias", "A_log", ".D", "dt_bias")):
            assert torch.equal(state[key], weights[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_auto_is_the_dtype_of_most_weights(load: Loader, folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "auto"}))
    save(folder, {key: value.to(dtype) if value.ndim > 1 else value for key, value in weights.items()})
    assert load(folder).state_dict()[EMBEDDINGS].dtype == dtype


def test_a_whole_file_beside_the_index_of_shards_that_are_gone(load: Loader, folder: Path, weights: Weights) -> None:
    """What saving once in shards and once whole leaves behind. It is read, and said."""
    save(folder, *split({key: value + 1 for key, value in weights.items()}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    save(folder, weights)
    with pytest.warns(UserWarning, match=r"index\.json: .*model-00002-of-00002\.safetensors.*model\.safetensors will"):
        model = load(folder)
    assert_same_weights(model, weights)


def test_shards_that_are_all_there_go_before_a_whole_file(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, {key: value + 1 for key, value in weights.items()})
    save(folder, *split(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_weights(load(folder), weights)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_layers_for_further_tokens_are_passed_over(load: Loader, folder: Path, weights: Weights, prefix: str) -> None:
    more = {
        f"{prefix}mtp.layers.0.norm.weight": torch.zeros(64),
        f"{prefix}mtp.layers.0.eh_proj.weight": torch.zeros(9),
    }
    save(folder, weights | more)
    with pytest.warns(UserWarning, match="2 keys of multi-token prediction"):
        model = load(folder)
    assert_same_weights(model, weights)


# --- what is refused -------------------------------------------------------------------------------------------------


HUGE = {
    "experts": (dict(n_routed_experts=10**9), "1000000000 experts"),
    "vocabulary": (dict(vocab_size=2**31 - 1), "2147483647"),
    "hidden size": (dict(hidden_size=2**31 - 1), "2147483647"),
    "width of experts": (dict(moe_intermediate_size=2**30), "1073741824"),
    "heads": (dict(num_attention_heads=2**30, num_key_value_heads=2**29), "8589934592"),
    "layers": (dict(hybrid_override_pattern="MEM*EM*E" * 1250, num_hidden_layers=10_000), "10000 layers"),
    "all of it": (
        dict(n_routed_experts=2**30, vocab_size=2**30, hidden_size=2**30, intermediate_size=2**30),
        "1073741824",
    ),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_a_config_asks_for_is_counted_first(load: Loader, folder: Path, weights: Weights, what: str) -> None:
    """Neither time nor memory is spent on sizes that the files do not have."""
    fields, value = HUGE[what]
    save(folder, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"^{folder}.*") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and time.process_time() - start < 2
    if load == TwoTowerModel.from_pretrained:  # the specification says how many numbers are asked for in all
        assert value in str(caught.value)


def test_no_folder(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        next(checkpoint.tensors(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        package_checkpoint.entries(tmp_path / "nowhere")


def test_no_weights(load: Loader, folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"model: neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(folder)


def without(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


def with_(**changed: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, **changed}


WRONG: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (without(A_LOG), rf"key {A_LOG} is missing"),
    "embeddings missing": (without(EMBEDDINGS), rf"key {EMBEDDINGS} is missing"),
    "transposed": (
        lambda w: {**w, GATE: w[GATE].T.contiguous()},
        rf"key {GATE} has shape \[64, 8\], expected \[8, 64\]",
    ),
    "one expert too many": (
        with_(**{"context_tower.layers.1.mixer.experts.8.up_proj.weight": torch.zeros(48, 64)}),
        r"key context_tower\.layers\.1\.mixer\.experts\.8\.up_proj\.weight is not part of this model",
    ),
    "unknown": (with_(**{"visual.weight": torch.zeros(1)}), r"key visual\.weight is not part of this model"),
    "integers": (lambda w: {**w, GATE: w[GATE].to(torch.int8)}, rf"key {GATE} has dtype torch\.int8"),
    "both spellings": (
        lambda w: {**w, "context_tower.embedding.weight": w[EMBEDDINGS].clone()},
        r"key context_tower\.embeddings?\.weight .*(?:twice|already)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_key_is_named(load: Loader, folder: Path, weights: Weights, what: str) -> None:
    change, message = WRONG[what]
    save(folder, change(weights))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "keep", [0, 4, 100, 0.5, -1], ids=["empty", "4 bytes", "100 bytes", "half", "all but one byte"]
)
def test_a_truncated_file_is_named(load: Loader, folder: Path, weights: Weights, keep: float) -> None:
    save(folder, *split(weights))
    path = folder / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(ValueError, match=rf"{path.name}: truncated"):
        load(folder)


def test_a_missing_shard_is_named(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, *split(weights))
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: .* missing"):
        load(folder)


def test_a_key_in_two_shards_is_named(load: Loader, folder: Path, weights: Weights) -> None:
    context, rest = split(weights)
    save(folder, context, {**rest, EMBEDDINGS: weights[EMBEDDINGS].clone()})
    with pytest.raises(ValueError, match=rf"(?s)model-0000[12].*{EMBEDDINGS}"):
        load(folder)


def test_a_key_that_the_index_promises_elsewhere_is_named(load: Loader, folder: Path, weights: Weights) -> None:
    save(folder, *split(weights))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EMBEDDINGS] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{EMBEDDINGS}"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "..", ".", ""]
)
def test_an_index_cannot_lead_out_of_the_folder(load: Loader, folder: Path, weights: Weights, name: str) -> None:
    """Even though the file is there, and good."""
    outside = folder.parent / "outside.safetensors"
    save_file(weights, outside)
    (folder / "sub").mkdir()
    name = name.format(outside=outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(ValueError, match=r"index\.json: key \S+ names .* not a file inside the folder"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff"], ids=repr
)
def test_an_index_that_is_none_is_named(load: Loader, folder: Path, text: str) -> None:
    (folder / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json: not an index"):
        load(folder)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_nothing_is_unpickled(load: Loader, folder: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    data = pickle.dumps(Trap(trace))
    pickle.loads(data)
    assert trace.exists()  # the trap works
    trace.unlink()
    (folder / name).write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=r"model\.safetensors"):
        load(folder)
    assert not trace.exists()
