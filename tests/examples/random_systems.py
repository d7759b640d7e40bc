"""Small random models of the four systems, in the form of tests/data/golden/systems: what they generate is written by
the plain programs of bench/baselines/diffusion_lms.py, in the way of the originals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.baselines import diffusion_lms

Config = Mapping[str, Any]
VOCABULARY = 211
MASK = 207
PROGRAMS: Mapping[str, type[diffusion_lms.Llama | diffusion_lms.Llada]] = {
    "sdar": diffusion_lms.Sdar,
    "llada": diffusion_lms.Llada,
    "llada2_moe": diffusion_lms.Llada2,
    "dream": diffusion_lms.Dream,
}
SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
)
CONFIGS: Mapping[str, Config] = {
    "sdar": SHARED | dict(head_dim=10, attention_bias=False),
    "dream": SHARED,
    "llada2_moe": SHARED
    | dict(
        head_dim=12,
        partial_rotary_factor=0.5,
        num_experts=12,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        moe_intermediate_size=20,
        num_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.7,
        use_qkv_bias=False,
        use_bias=False,
    ),
    "llada": dict(
        vocab_size=VOCABULARY,
        embedding_size=VOCABULARY,
        d_model=48,
        n_heads=6,
        n_kv_heads=6,
        n_layers=2,
        mlp_ratio=4,
        mlp_hidden_size=56,
        activation_type="silu",
        block_type="llama",
        rope=True,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        layer_norm_type="rms",
        weight_tying=False,
        include_bias=False,
        include_qkv_bias=False,
    ),
}


def random_weights(system: str, config: Config) -> dict[str, Tensor]:
    """Weights under the original's names; the head is steep, so that confidences differ."""
    weights: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False, scale: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns) * scale / columns**0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows) * 0.3

    def norm(name: str, size: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(size)
        if bias:
            weights[f"{name}.bias"] = torch.randn(size) * 0.3

    def mlp(name: str, hidden: int, size: int) -> None:
        matrix(f"{name}.gate_proj", size, hidden)
        matrix(f"{name}.up_proj", size, hidden)
        matrix(f"{name}.down_proj", hidden, size)

    if system == "llada":
        _llada(config, matrix, norm)
        return without_mask(weights)
    hidden, heads, kv_heads = (config[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dim = config.get("head_dim") or hidden // heads
    qkv_bias = {"sdar": config.get("attention_bias"), "dream": True, "llada2_moe": config.get("use_qkv_bias")}[system]
    matrix("model.word_embeddings" if system == "llada2_moe" else "model.embed_tokens", VOCABULARY, hidden, scale=6.0)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        norm(f"{name}.input_layernorm", hidden)
        norm(f"{name}.post_attention_layernorm", hidden)
        if system == "llada2_moe":
            matrix(f"{name}.attention.query_key_value", (heads + 2 * kv_heads) * dim, hidden, qkv_bias)
            matrix(f"{name}.attention.dense", hidden, heads * dim, config["use_bias"])
            norm(f"{name}.attention.query_layernorm", dim)
            norm(f"{name}.attention.key_layernorm", dim)
        else:
            for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                matrix(f"{name}.self_attn.{part}_proj", rows * dim, hidden, qkv_bias)
            matrix(f"{name}.self_attn.o_proj", hidden, heads * dim, bool(config.get("attention_bias")))
        if system == "sdar":
            norm(f"{name}.self_attn.q_norm", dim)
            norm(f"{name}.self_attn.k_norm", dim)
        if system != "llada2_moe" or i < config["first_k_dense_replace"]:
            mlp(f"{name}.mlp", hidden, config["intermediate_size"])
            continue
        experts, size = config["num_experts"], config["moe_intermediate_size"]
        matrix(f"{name}.mlp.gate", experts, hidden)
        weights[f"{name}.mlp.gate.expert_bias"] = torch.randn(experts) - 1
        weights[f"{name}.mlp.experts.w13_weight"] = torch.randn(experts, 2 * size, hidden) / hidden**0.5
        weights[f"{name}.mlp.experts.w2_weight"] = torch.randn(experts, hidden, size) / size**0.5
        if config["num_shared_experts"]:
            mlp(f"{name}.mlp.shared_experts", hidden, size * config["num_shared_experts"])
    norm("model.norm", hidden)
    if not config.get("tie_word_embeddings"):
        matrix("lm_head", VOCABULARY, hidden, scale=3.0)
    return without_mask(weights)


def without_mask(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a mask token that is not proposed: most of the originals fail then, or do not end."""
    for name, tensor in weights.items():
        if tensor.shape[0] == VOCABULARY and tensor.ndim == 2:
            weights[name][MASK] *= 0.02
    return weights


def _llada(config: Config, matrix: Any, norm: Any) -> None:
    hidden, bias = config["d_model"], config["include_bias"]
    kv_width = config["n_kv_heads"] * (hidden // config["n_heads"])
    matrix("model.transformer.wte", config["embedding_size"], hidden, scale=6.0)
    for i in range(config["n_layers"]):
        name = f"model.transformer.blocks.{i}"
        norm(f"{name}.attn_norm", hidden, bias)
        norm(f"{name}.ff_norm", hidden, bias)
        for part, rows in (("q", hidden), ("k", kv_width), ("v", kv_width)):
            matrix(f"{name}.{part}_proj", rows, hidden, bias or config["include_qkv_bias"])
        matrix(f"{name}.attn_out", hidden, hidden, bias)
        size = config["mlp_hidden_size"] or config["mlp_ratio"] * hidden
        matrix(f"{name}.ff_proj", size, hidden, bias)
        matrix(f"{name}.up_proj", size, hidden, bias)
        matrix(f"{name}.ff_out", hidden, size, bias)
    norm("model.transformer.ln_f", hidden, bias)
    if not config["weight_tying"]:
        matrix("model.transformer.ff_out", config["embedding_size"], hidden, bias, scale=3.0)


def write(
    folder: Path, system: str, cases: list[tuple[int, dict[str, Any]]], config: Config | None = None, rows: int = 1
) -> None:
    """A folder of this system: a forward pass, and a generation for every case, which is its prompt's length and the
    arguments of the plain program."""
    config = dict(CONFIGS[system]) | dict(config or {})
    weights = random_weights(system, config)
    program = PROGRAMS[system](config, weights, MASK)
    tokens = torch.randint(VOCABULARY, (2, 21))
    io, written = {"forward.input": tokens}, []
    with torch.no_grad():
        if isinstance(program, diffusion_lms.Llada):
            io["forward.logits"] = program(tokens)[0]
        else:
            io["forward.logits"] = program(tokens, None)
            if system != "dream":
                io["forward.block_causal5.logits"] = program(tokens, diffusion_lms.block_mask(21, 5))
    for i, (length, options) in enumerate(cases):
        prompt = torch.randint(MASK, (rows, length))
        io[f"case{i}.prompt"] = prompt
        io[f"case{i}.sequence"], nfe = program.generate(prompt, **options)
        written.append(options | {"nfe": nfe})
    document = dict(system=system, config=config, note=f"mask token {MASK}", cases=written)
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(document), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in io.items()}, folder / "io.safetensors")
