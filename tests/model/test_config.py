"""`config.json`: the released fields are understood, and every contradiction is named; by both programs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.paths import GOLDEN
from twotower_kernels import config as package
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


def test_a_file_that_is_no_object_is_named(config_class: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        config_class.from_file(path)


def test_a_missing_file_is_named(config_class: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        config_class.from_file(tmp_path / "config.json")
