"""The four examples: what the originals recorded, and random models of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.replay import main
from tests.examples.random_systems import write
from tests.paths import GOLDEN

SYSTEMS = GOLDEN / "systems"


def replayed(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = main([str(folder)])
    return code, capsys.readouterr().out.splitlines()


def test_everything_recorded_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = replayed(SYSTEMS, capsys)
    assert code == 0, "\n".join(lines)
    assert lines[-1] == "22 of 22 agree"
    assert sum(line.endswith(": agrees") for line in lines) == 22


def sdar(strategy: str, block: int, steps: int, tau: float | None = None, new: int = 30) -> dict[str, Any]:
    return dict(strategy=strategy, confidence_threshold=tau, gen_length=new, block_length=block, denoising_steps=steps)


def llada(cache: str | None, threshold: float | None = None, block: int = 12, steps: int = 18) -> dict[str, Any]:
    return dict(cache=cache, threshold=threshold, gen_length=36, block_length=block, steps=steps)


STRATEGIES = [
    (16, sdar("low_confidence_dynamic", 8, 4, 0.2)),
    (10, sdar("low_confidence_dynamic", 10, 7, 0.5)),
    (6, sdar("low_confidence_dynamic", 6, 3, 0.8)),
    (12, sdar("low_confidence_static", 12, 5)),
    (4, sdar("low_confidence_static", 4, 4)),
    (15, sdar("sequential", 5, 3)),
    (18, sdar("sequential", 9, 9)),
]
CACHES = [
    (11, llada(cache, threshold, block))
    for cache in (None, "prefix", "dual")
    for threshold, block in ((None, 12), (None, 36), (0.2, 12), (0.6, 18))
]
THRESHOLDS = [
    (16, dict(threshold=0.2, blocks=2, block_length=8)),
    (4, dict(threshold=0.6, blocks=3, block_length=4)),
    (20, dict(threshold=0.95, blocks=1, block_length=20)),
]
ALGORITHMS = [
    (length, dict(alg=alg, steps=steps, new_tokens=new))
    for alg in ("maskgit_plus", "topk_margin", "entropy")
    for length, steps, new in ((13, 9, 26), (5, 17, 10))
]
VARIATIONS: dict[str, tuple[str, list[tuple[int, dict[str, Any]]], dict[str, Any]]] = {
    "sdar": ("sdar", STRATEGIES, {}),
    "sdar, one key head, biases": ("sdar", STRATEGIES, dict(num_key_value_heads=1, attention_bias=True)),
    "sdar, tied, deep, another theta": (
        "sdar",
        STRATEGIES,
        dict(tie_word_embeddings=True, num_hidden_layers=5, rope_theta=1e6, head_dim=None),
    ),
    "llada": ("llada", CACHES, {}),
    "llada, grouped heads, biases": ("llada", CACHES, dict(n_kv_heads=2, include_bias=True)),
    "llada, tied, gelu, qkv bias": (
        "llada",
        CACHES,
        dict(weight_tying=True, activation_type="gelu", include_qkv_bias=True, mlp_hidden_size=None, n_layers=4),
    ),
    "llada2_moe": ("llada2_moe", THRESHOLDS, {}),
    "llada2_moe, one group, top 1, two shared, all of a head turned": (
        "llada2_moe",
        THRESHOLDS,
        dict(n_group=1, topk_group=1, num_experts_per_tok=1, num_shared_experts=2, partial_rotary_factor=1.0),
    ),
    "llada2_moe, no shared expert, no dense layer, biases": (
        "llada2_moe",
        THRESHOLDS,
        dict(num_shared_experts=0, first_k_dense_replace=0, use_qkv_bias=True, use_bias=True, n_group=6, topk_group=3),
    ),
    "dream": ("dream", ALGORITHMS, {}),
    "dream, tied, gelu": ("dream", ALGORITHMS, dict(tie_word_embeddings=True, hidden_act="gelu", rope_theta=1e6)),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_random_models_agree_with_plain_programs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(len(name))
    system, cases, config = VARIATIONS[name]
    write(tmp_path / system, system, cases, config)
    code, lines = replayed(tmp_path, capsys)
    assert code == 0, "\n".join(lines)
    assert len(lines) > len(cases)


@pytest.mark.parametrize("system, cases", [("llada", CACHES), ("llada2_moe", THRESHOLDS), ("dream", ALGORITHMS)])
def test_batches_agree(
    system: str, cases: list[tuple[int, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    write(tmp_path / system, system, cases, rows=3)
    code, lines = replayed(tmp_path, capsys)
    assert code == 0, "\n".join(lines)
