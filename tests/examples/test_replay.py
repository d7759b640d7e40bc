"""The four examples: what the originals recorded, and random models of other sizes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from bench.baselines.diffusion_lm_weights import random_weights
from examples.dream import Dream
from examples.layers import Rotary, Weights
from examples.llada import Llada
from examples.llada2_moe import Llada2Moe
from examples.replay import main, mask_token_id
from examples.sdar import Sdar
from tests.examples.random_systems import CONFIGS, MASK, write
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
    (12, sdar("low_confidence_static", 12, 5, 0.85)),
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
    "llada, norms of queries and keys": ("llada", CACHES, dict(n_kv_heads=3, attention_layer_norm=True)),
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


def test_prompts_of_other_lengths_are_padded_in_front() -> None:
    """RoPE is relative: a padded row of Dream says what it says alone."""
    torch.manual_seed(2)
    config = CONFIGS["dream"]
    model = Dream(config, Weights(random_weights("dream", config, MASK)), MASK)
    prompts = [torch.randint(MASK, (1, length)) for length in (9, 4)]
    padded = torch.cat([F.pad(prompt, (9 - prompt.shape[1], 0), value=3) for prompt in prompts])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    options: dict[str, Any] = dict(alg="entropy", steps=6, new_tokens=12)
    together, _ = model.generate(padded, mask, **options)
    for row, prompt in enumerate(prompts):
        assert together[row, -12:].equal(model.generate(prompt, **options)[0][0, -12:])
    with pytest.raises(NotImplementedError, match="in front"):
        model.generate(padded, mask.flip(1), **options)


def test_a_threshold_of_dream_takes_more_steps_where_it_refuses() -> None:
    torch.manual_seed(3)
    config = CONFIGS["dream"]
    model = Dream(config, Weights(random_weights("dream", config, MASK)), MASK)
    prompt = torch.randint(MASK, (1, 5))
    never, always = (
        model.generate(prompt, alg="confidence_threshold", steps=4, new_tokens=12, threshold=tau) for tau in (2.0, 0.0)
    )
    assert not (never[0] == MASK).any() and not (always[0] == MASK).any()
    assert never[1] > always[1] == 4


def recorded_sdar() -> tuple[Sdar, list[dict[str, Any]], dict[str, torch.Tensor]]:
    folder = SYSTEMS / "sdar"
    document = json.loads((folder / "cases.json").read_text())
    weights = Weights(load_file(folder / "model.safetensors"))
    return Sdar(document["config"], weights, 299), document["cases"], load_file(folder / "io.safetensors")


def test_what_sdar_overwrites() -> None:
    """The original overwrites committed tokens where fewer masks than its quota are left: in one recorded case. In the
    others, tt.generate_blocks says the same."""
    model, cases, io = recorded_sdar()
    same = []
    for i, case in enumerate(cases):
        result = model.generate(io[f"case{i}.prompt"], **case | {"temperature": 1.0})
        same.append(result.sequences[0].equal(io[f"case{i}.sequence"][0]))
    assert same == [True, False, True, True, True]


def test_prompts_of_any_lengths_in_one_batch() -> None:
    model, _, _ = recorded_sdar()
    prompts = [torch.randint(299, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 17, 8)]
    options: dict[str, Any] = dict(
        gen_length=19, block_length=8, denoising_steps=4, strategy="low_confidence_dynamic", confidence_threshold=0.5
    )
    together = model.generate(prompts, **options)
    for row, prompt in enumerate(prompts):
        assert together.sequences[row].equal(model.generate(prompt[None], **options).sequences[0])


def damaged(tmp_path: Path, system: str = "dream") -> Path:
    folder = tmp_path / system
    shutil.copytree(SYSTEMS / system, folder)
    return folder


def rewrite(folder: Path, **fields: Any) -> None:
    document = json.loads((folder / "cases.json").read_text())
    (folder / "cases.json").write_text(json.dumps(document | fields))


@pytest.mark.parametrize("name", ["cases.json", "model.safetensors", "io.safetensors"])
def test_missing_and_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged(tmp_path)
    (folder / name).write_bytes(b"{" * 20)
    code, lines = replayed(tmp_path, capsys)
    assert code == 1 and lines[-1] == "0 of 1 agree" and name in lines[0] and lines[0].startswith("error: ")
    (folder / name).unlink()
    code, lines = replayed(tmp_path, capsys)
    assert code == 1 and lines == [f"error: {folder}: expected a file {name}, which is not there", "0 of 1 agree"]


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        code, lines = replayed(folder, capsys)
        assert code == 1 and lines[0].startswith(f"error: {folder}: expected") and lines[-1] == "0 of 0 agree"


def test_systems_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged(tmp_path)
    rewrite(folder, system="mystery")
    code, lines = replayed(folder, capsys)
    assert code == 1 and "dream as system, got 'mystery'" in lines[0]


@pytest.mark.parametrize(
    "document, token",
    [
        (dict(mask_token_id=7, config=dict(vocab_size=9, mask_token_id=5)), 7),
        (dict(note="mask token 6.", config=dict(vocab_size=9, mask_token_id=5)), 5),
        (dict(note="mask token 6.", config=dict(vocab_size=9, mask_token_id=50256)), 6),
        (dict(note="nothing said", config=dict(vocab_size=9)), 8),
    ],
)
def test_the_mask_token_is_found(document: dict[str, Any], token: int) -> None:
    assert mask_token_id(document) == token


def test_one_system_that_fails_is_no_other_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged(tmp_path, "llada")
    (damaged(tmp_path) / "cases.json").write_text("[]")
    code, lines = replayed(tmp_path, capsys)
    assert code == 1 and lines[-1] == "7 of 8 agree" and "expected an object, got list" in lines[0]


@pytest.mark.parametrize(
    "system, fields, said",
    [
        ("sdar", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type: expected .* got 'yarn'"),
        ("sdar", dict(hidden_act="xielu"), "hidden_act: expected .* got 'xielu'"),
        ("llada", dict(alibi=True), "alibi: expected False, got True"),
        ("llada", dict(block_type="sequential"), "block_type: expected 'llama', got 'sequential'"),
        ("llada2_moe", dict(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
        ("dream", dict(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0, got 0.5"),
        ("dream", dict(rms_norm_eps=None), "config: expected a field rms_norm_eps"),
    ],
)
def test_fields_that_are_not_served(
    system: str, fields: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path, system)
    config = json.loads((folder / "cases.json").read_text())["config"]
    rewrite(folder, config=config | fields)
    code, lines = replayed(folder, capsys)
    assert code == 1 and re.search(said, lines[0]), lines


@pytest.mark.parametrize(
    "system, case, said",
    [
        ("sdar", dict(strategy="entropy_bounded"), "entropy_bounded"),
        ("llada", dict(remasking="random"), "remasking: expected 'low_confidence', got 'random'"),
        ("llada", dict(temperature=0.5), "temperature: expected 0, got 0.5"),
        ("llada", dict(cache="triple"), "cache: expected .* got 'triple'"),
        ("llada", dict(nfe=5), "expected an NFE of 5, got 32"),
        ("dream", dict(alg="origin"), "alg"),
        ("dream", dict(alg="maskgit"), "maskgit"),
        ("dream", dict(alg_temp=0.3), "alg_temp"),
        ("dream", dict(steps=19), "tokens differ, the first at"),
        ("dream", dict(new_tokens=47), r"expected tokens \[1, 69\], got \[1, 68\]"),
    ],
)
def test_cases_that_do_not_agree(
    system: str, case: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path, system)
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    rewrite(folder, cases=[cases[0] | case])
    code, lines = replayed(folder, capsys)
    assert code == 1 and lines[-1] == "1 of 2 agree" and re.search(said, lines[1]), lines


def test_logits_and_experts_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged(tmp_path, "llada2_moe")
    rewrite(folder, cases=[])
    io = load_file(folder / "io.safetensors")
    io["forward.block_causal32.logits"][0, 0, 0] += 2e-3
    io["route.experts"][3] = torch.arange(4)
    save_file(io, folder / "io.safetensors")
    code, lines = replayed(folder, capsys)
    assert code == 1 and lines[-1] == "0 of 2 agree"
    assert "logits differ by 2.0e-03" in lines[0] and "1 of 256 tokens have other experts" in lines[1]


def recorded_llada(**fields: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The configuration with these fields, the weights, and tokens."""
    folder = SYSTEMS / "llada"
    config = json.loads((folder / "cases.json").read_text())["config"] | fields
    io = load_file(folder / "io.safetensors")
    return config, load_file(folder / "model.safetensors"), io["forward.input"]


def test_fields_of_llada_that_change_few_things() -> None:
    config, weights, tokens = recorded_llada()
    plain = Llada(config, Weights(weights), 299).forward(tokens)
    scaled = Llada(config | dict(scale_logits=True), Weights(weights), 299).forward(tokens)
    assert scaled.equal(plain / 8)  # the square root of d_model

    grouped = {re.sub(r"blocks\.2\.", "block_groups.0.2.", name): tensor for name, tensor in weights.items()}
    grouped = {re.sub(r"blocks\.([01])\.", r"block_groups.0.\1.", name): tensor for name, tensor in grouped.items()}
    assert Llada(config | dict(block_group_size=3), Weights(grouped), 299).forward(tokens).equal(plain)

    name = "model.transformer.wte.weight"
    normed = Llada(config | dict(input_emb_norm=True), Weights(weights | {name: weights[name] / 8}), 299)
    assert normed.forward(tokens).equal(plain)

    shifted = {name: tensor - 1 if "norm" in name or "ln_f" in name else tensor for name, tensor in weights.items()}
    gemma = Llada(config | dict(layer_norm_type="gemma_rms"), Weights(shifted), 299).forward(tokens)
    torch.testing.assert_close(gemma, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_model_that_proposes_masks_ends(cache: str | None, threshold: float | None) -> None:
    """The originals fail, or never end."""
    config, weights, tokens = recorded_llada()
    head = weights["model.transformer.ff_out.weight"]
    biased = weights | {"model.transformer.ff_out.bias": 1e3 * (torch.arange(len(head)) == 299)}
    model = Llada(config, Weights(biased), 299)
    with pytest.raises(RuntimeError, match="tokens: expected no masks after"):
        model.generate(tokens, steps=8, gen_length=16, block_length=8, cache=cache, threshold=threshold)


def test_other_norms_of_llada() -> None:
    config, weights, tokens = recorded_llada(layer_norm_type="default")
    model, x = Llada(config, Weights(weights), 299), torch.randn(2, 3, 64)
    weight, bias = torch.randn(64), torch.randn(64)
    named = Weights(dict(weight=weight, bias=bias))
    assert model.norm(x, named).equal(F.layer_norm(x, (64,), weight, bias))
    rms = Llada(config | dict(layer_norm_type="rms"), Weights(weights), 299)
    expected = F.rms_norm(x, (64,), weight, config["rms_norm_eps"]) + bias
    torch.testing.assert_close(rms.norm(x, named), expected)
    torch.testing.assert_close(rms.norm(x, Weights({})), F.rms_norm(x, (64,), None, config["rms_norm_eps"]))
    with pytest.raises(NotImplementedError, match="layer_norm_type: expected rms"):
        Llada(config | dict(layer_norm_type="amd_compatible"), Weights(weights), 299).forward(tokens)


def test_experts_may_lie_apart() -> None:
    """Checkpoints hold them one after the other, dInfer stacks them."""
    folder = SYSTEMS / "llada2_moe"
    config, tensors = json.loads((folder / "cases.json").read_text())["config"], load_file(folder / "model.safetensors")
    tokens = load_file(folder / "io.safetensors")["forward.input"]
    expected = Llada2Moe(config, Weights(tensors), 299).forward(tokens)
    for name in [name for name in tensors if name.endswith("w13_weight")]:
        prefix = name.removesuffix("w13_weight")
        gates_and_ups, downs = tensors.pop(name), tensors.pop(f"{prefix}w2_weight")
        for e, (matrix, down) in enumerate(zip(gates_and_ups, downs, strict=True)):
            gate, up = matrix.chunk(2)
            tensors |= {f"{prefix}{e}.gate_proj.weight": gate, f"{prefix}{e}.up_proj.weight": up}
            tensors[f"{prefix}{e}.down_proj.weight"] = down
    assert Llada2Moe(config, Weights(tensors), 299).forward(tokens).equal(expected)


def test_rotary_positions() -> None:
    """`linear` divides positions by its factor; theta may stand among the parameters of RoPE."""
    x, positions = torch.randn(2, 5, 3, 8), torch.arange(5)
    (plain,) = Rotary(dict(rope_theta=100.0), 8)(positions, x)
    (slower,) = Rotary(dict(rope_theta=100.0, rope_scaling=dict(rope_type="linear", factor=4.0)), 8)(4 * positions, x)
    torch.testing.assert_close(slower, plain)
    (named,) = Rotary(dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)), 8)(positions, x)
    assert named.equal(plain)
    (partly,) = Rotary(dict(rope_theta=100.0), 4)(positions.expand(2, 5), x)
    assert partly[..., 4:].equal(x[..., 4:]) and not partly[:, 1:, :, :4].equal(x[:, 1:, :, :4])
