"""`config.json`: the released fields are understood, and every contradiction is named; by both programs."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.paths import GOLDEN
from twotower_kernels.options import config as package
from twotower_kernels.reference import config as specification

Config = type[specification.TwoTowerConfig] | type[package.TwoTowerConfig]

RAW: dict[str, Any] = json.loads((GOLDEN / "tiny" / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(params=[specification, package], ids=["reference", "package"])
def config_class(request: pytest.FixtureRequest) -> Config:
    return request.param.TwoTowerConfig


def changed(**fields: Any) -> dict[str, Any]:
    """A good config with some fields replaced, or removed (`...`)."""
    return {name: value for name, value in {**RAW, **fields}.items() if value is not ...}


def test_a_bare_infinity_is_understood(config_class: Config, tmp_path: Path) -> None:
    assert "Infinity" in (GOLDEN / "tiny" / "config.json").read_text(encoding="utf-8")
    config = config_class.from_file(GOLDEN / "tiny" / "config.json")
    assert config.time_step_limit == (0.0, math.inf)


def test_the_released_shape_is_accepted(config_class: Config) -> None:
    """Nemotron-TwoTower-30B-A3B as published (arXiv 2606.26493): 52 layers, of which 23 M, 23 E and 6 *."""
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    config = config_class.from_dict(
        changed(
            hybrid_override_pattern=pattern,
            num_hidden_layers=52,
            vocab_size=131072,
            hidden_size=2688,
            num_attention_heads=32,
            head_dim=128,
            mamba_num_heads=64,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
            n_routed_experts=128,
            num_experts_per_tok=6,
            moe_intermediate_size=1856,
            moe_shared_expert_intermediate_size=3712,
        )
    )
    assert (config.mamba_inner, config.mamba_channels) == (4096, 6144)
    assert [pattern.count(letter) for letter in "ME*-"] == [23, 23, 6, 0]


def test_unknown_fields_are_ignored(config_class: Config) -> None:
    assert config_class.from_dict(changed(transformers_version="9.9")) == config_class.from_dict(RAW)


LAYERS = ("linear_attention", "moe", "full_attention", "mlp", "mamba", "attention")
SPELLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layers by name": (
        dict(hybrid_override_pattern=..., num_hidden_layers=..., layers_block_type=list(LAYERS)),
        dict(hybrid_override_pattern="ME*-M*"),
    ),
    "layers by type": (
        dict(hybrid_override_pattern=..., num_hidden_layers=6, layer_types=list(LAYERS)),
        dict(hybrid_override_pattern="ME*-M*"),
    ),
    "both names of the layers": (dict(layers_block_type=["mamba", "moe"] * 4, hybrid_override_pattern="ME" * 4), {}),
    "infinity as an object": (dict(time_step_limit=[0.0, {"__float__": "Infinity"}]), {}),
    "several ends": (dict(eos_token_id=[2, 11]), dict(eos_token_id=(2, 11))),
    "dtype": (dict(torch_dtype=..., dtype="bfloat16"), dict(torch_dtype="bfloat16")),
    "both names of the dtype": (dict(torch_dtype="bfloat16", dtype="torch.bfloat16"), dict(torch_dtype="bfloat16")),
    "torch's own name": (dict(torch_dtype="torch.float16"), dict(torch_dtype="float16")),
    "the file's dtype": (dict(torch_dtype="auto"), dict(torch_dtype="auto")),
    "older names": (
        dict(n_groups=..., mamba_n_groups=2, conv_kernel=..., mamba_d_conv=4, use_conv_bias=..., mamba_conv_bias=True)
        | dict(time_step_limit=..., mamba_dt_limit=[0.0, math.inf], head_dim=..., attention_head_dim=16)
        | dict(n_routed_experts=..., num_local_experts=8),
        {},
    ),
    "no latent experts": (dict(moe_latent_size=None), {}),
}


@pytest.mark.parametrize("what", SPELLED)
def test_the_same_in_other_words(config_class: Config, what: str, tmp_path: Path) -> None:
    """Versions of transformers write fields, layers, infinities and dtypes in several ways."""
    said, meant = SPELLED[what]
    if "layers_block_type" in said and "hybrid_override_pattern" in said and said["hybrid_override_pattern"] is not ...:
        meant = dict(hybrid_override_pattern=said["hybrid_override_pattern"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(**said)))
    expected = config_class.from_dict(changed(**(meant | {"num_hidden_layers": ...})))
    assert config_class.from_file(path) == expected == config_class.from_dict(changed(**said))
    for field, value in meant.items():
        assert getattr(expected, field) == value


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown letter": (dict(hybrid_override_pattern="MEM*EM*X"), r"hybrid_override_pattern.*'X' at position 7"),
    "lower case letter": (dict(hybrid_override_pattern="mEM*EM*E"), r"hybrid_override_pattern.*'m' at position 0"),
    "empty pattern": (dict(hybrid_override_pattern="", num_hidden_layers=0), r"hybrid_override_pattern is empty"),
    "pattern a list": (dict(hybrid_override_pattern=["M"]), r"hybrid_override_pattern must be a string"),
    "layers and pattern": (dict(num_hidden_layers=9), r"num_hidden_layers is 9.* has 8 letters"),
    "no vocabulary": (dict(vocab_size=...), r"vocab_size"),
    "vocabulary null": (dict(vocab_size=None), r"vocab_size"),
    "vocabulary zero": (dict(vocab_size=0), r"vocab_size.* 0"),
    "hidden size a string": (dict(hidden_size="64"), r"hidden_size.*'64'"),
    "hidden size a fraction": (dict(hidden_size=64.5), r"hidden_size.*64\.5"),
    "hidden size true": (dict(hidden_size=True), r"hidden_size.*True"),
    "heads negative": (dict(num_attention_heads=-4), r"num_attention_heads.*-4"),
    "heads not divisible": (
        dict(num_key_value_heads=3),
        r"num_key_value_heads 3 does not divide num_attention_heads 4",
    ),
    "mamba groups": (dict(n_groups=3), r"n_groups 3 does not divide mamba_num_heads 8"),
    "conv of width zero": (dict(conv_kernel=0), r"conv_kernel.* 0"),
    "top_k above the experts": (dict(num_experts_per_tok=9), r"num_experts_per_tok 9.* 8 "),
    "top_k above the eligible": (
        dict(num_experts_per_tok=3, n_group=4, topk_group=1),
        r"num_experts_per_tok 3.* 2 eligible",
    ),
    "expert groups": (dict(n_group=3), r"n_group 3 does not divide n_routed_experts 8"),
    "more groups than there are": (dict(n_group=2, topk_group=3), r"topk_group 3 exceeds n_group 2"),
    "two shared experts": (dict(n_shared_experts=2), r"n_shared_experts.* 2"),
    "shared expert without size": (dict(moe_shared_expert_intermediate_size=0), r"moe_shared_expert_intermediate_size"),
    "shared expert's size a string": (
        dict(moe_shared_expert_intermediate_size="96"),
        r"moe_shared_expert_intermediate_size.*'96'",
    ),
    "dense MLP without size": (dict(hybrid_override_pattern="-EM*EM*E", intermediate_size=0), r"intermediate_size.* 0"),
    "eps zero": (dict(layer_norm_epsilon=0.0), r"layer_norm_epsilon.*0\.0"),
    "eps NaN": (dict(layer_norm_epsilon=math.nan), r"layer_norm_epsilon.*nan"),
    "eps a string": (dict(layer_norm_epsilon="1e-5"), r"layer_norm_epsilon.*'1e-5'"),
    "scaling NaN": (dict(routed_scaling_factor=math.nan), r"routed_scaling_factor.*nan"),
    "scaling a string": (dict(routed_scaling_factor="2.5"), r"routed_scaling_factor.*'2\.5'"),
    "renormalisation a string": (dict(norm_topk_prob="false"), r"norm_topk_prob.*'false'"),
    "conv bias a string": (dict(use_conv_bias="no"), r"use_conv_bias.*'no'"),
    "residual a string": (dict(residual_in_fp32="false"), r"residual_in_fp32.*'false'"),
    "time steps reversed": (dict(time_step_limit=[1.0, 0.5]), r"time_step_limit.*1\.0, 0\.5"),
    "time steps NaN": (dict(time_step_limit=[math.nan, 1.0]), r"time_step_limit.*nan"),
    "time steps one number": (dict(time_step_limit=[0.0]), r"time_step_limit.*\[0\.0\]"),
    "unknown dtype": (dict(torch_dtype="int8"), r"torch_dtype.*'int8'"),
    "another activation": (dict(mlp_hidden_act="gelu"), r"mlp_hidden_act.*'gelu'"),
    "attention with bias": (dict(attention_bias=True), r"attention_bias.*True"),
    "tied embeddings": (dict(tie_word_embeddings=True), r"tie_word_embeddings.*True"),
    "block of size zero": (dict(block_size=0), r"block_size.* 0"),
    "block beyond reason": (dict(block_size=10**9), r"block_size must be at most 65536, got 1000000000"),
    "hidden size beyond 32 bits": (
        dict(hidden_size=2**45),
        r"hidden_size must be an integer of 32 bits.*35184372088832",
    ),
    "vocabulary beyond 32 bits": (
        dict(vocab_size=2**60),
        r"vocab_size must be an integer of 32 bits.*1152921504606846976",
    ),
    "a token of a thousand digits": (
        dict(pad_token_id=10**999),
        r"pad_token_id must be an integer of 32 bits, got 1000",
    ),
    "a million layers": (
        dict(hybrid_override_pattern="M" * 10**6, num_hidden_layers=...),
        r"hybrid_override_pattern must have at most 10000 letters, got 1000000",
    ),
    "a million named layers": (
        dict(hybrid_override_pattern=..., num_hidden_layers=..., layer_types=["moe"] * 10**6),
        r"hybrid_override_pattern must have at most 10000 letters, got 1000000",
    ),
    "time steps beyond float": (
        dict(time_step_limit=[0, 10**400]),
        r"time_step_limit must be two numbers, got \[0, 1000",
    ),
    "scaling beyond float": (dict(routed_scaling_factor=10**400), r"routed_scaling_factor must be a number, got 1000"),
    "time steps of true and false": (dict(time_step_limit=[False, True]), r"time_step_limit must be two numbers"),
    "time steps an object": (
        dict(time_step_limit={"__float__": "Infinity"}),
        r"time_step_limit must be two numbers, got",
    ),
    "no such number": (dict(time_step_limit=[0, {"__float__": "Aleph"}]), r"time_step_limit must be two numbers, got"),
    "an unknown kind of layer": (
        dict(hybrid_override_pattern=..., layers_block_type=["mamba", "sliding_attention"]),
        r"layers_block_type has unknown kind 'sliding_attention' at position 1",
    ),
    "a kind that is no word": (
        dict(hybrid_override_pattern=..., layer_types=[["moe"]]),
        r"layer_types has unknown kind \['moe'\] at position 0",
    ),
    "layers as one word": (
        dict(hybrid_override_pattern=..., layers_block_type="mamba"),
        r"layers_block_type must be a list of kinds of layers, got 'mamba'",
    ),
    "two patterns": (dict(layers_block_type=["mamba"] * 8), r"layers_block_type is \['mamba'"),
    "two dtypes": (dict(torch_dtype="float32", dtype="bfloat16"), r"dtype is 'bfloat16'"),
    "dtype an object": (dict(torch_dtype={"text": "bfloat16"}), r"torch_dtype must be a string, got \{'text'"),
    "no end": (dict(eos_token_id="</s>"), r"eos_token_id must be an integer of 32 bits, or several, got '</s>'"),
    "an end that is none": (dict(eos_token_id=[2, None]), r"eos_token_id must be an integer of 32 bits, or several"),
    "latent experts": (dict(moe_latent_size=64), r"moe_latent_size must be None, got 64"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_contradiction_is_named(config_class: Config, what: str) -> None:
    fields, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        config_class.from_dict(changed(**fields))


def test_fields_of_absent_layers_do_not_matter(config_class: Config) -> None:
    """A model without experts may carry any expert counts, as configs derived from a larger one do."""
    pure = changed(hybrid_override_pattern="M*M*M*M*", num_experts_per_tok=99, n_group=3)
    assert config_class.from_dict(pure).hybrid_override_pattern == "M*M*M*M*"


@pytest.mark.parametrize("text", ["", "{", "not json", '{"vocab_size": 256,}', "\udcff"], ids=repr)
def test_a_file_that_is_not_json_is_named(config_class: Config, tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        config_class.from_file(path)


def test_a_file_names_itself_its_kind_and_the_value(config_class: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(model_type="llama", hidden_size=2**45)))
    with pytest.raises(ValueError, match=rf"^{path}: .*hidden_size must be .*35184372088832") as caught:
        config_class.from_file(path)
    assert config_class is specification.TwoTowerConfig or "'llama'" in str(caught.value)


@pytest.mark.parametrize("fields", [f'"pad_token_id": 1{"0" * 10**5}', f'"x": {"[" * 10**5}'], ids=["digits", "depth"])
def test_what_json_cannot_hold_is_named(config_class: Config, tmp_path: Path, fields: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(f"{{{fields}}}")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: [^\n]*$"):
        config_class.from_file(path)


def test_only_files_of_some_size_are_read(config_class: Config, tmp_path: Path) -> None:
    """Not what never ends, what nobody writes, or what would fill the memory."""
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: not a file"):
        config_class.from_file(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: not a file"):
        config_class.from_file(path)
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: .*at most 1048576 bytes"):
        config_class.from_file(path)


def test_a_config_made_by_hand_is_checked_alike(config_class: Config) -> None:
    good = vars(config_class.from_dict(RAW))
    for field, value in (
        ("time_step_limit", 3),
        ("time_step_limit", (0.0, 1.0, 2.0)),
        ("eos_token_id", (2, 2**31)),
        ("vocab_size", 10**5000),
        ("layer_norm_epsilon", 10**400),
    ):
        with pytest.raises(ValueError, match=rf"^config: {field} must be [^\n]*$"):
            config_class(**good | {field: value})


def test_a_file_that_is_no_object_is_named(config_class: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        config_class.from_file(path)


def test_a_missing_file_is_named(config_class: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        config_class.from_file(tmp_path / "config.json")
