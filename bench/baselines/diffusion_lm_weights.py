"""Random weights of the four diffusion language models, under the originals' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]


def random_weights(system: str, config: Config, mask_token_id: int) -> dict[str, Tensor]:
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
        return _without_mask(weights, config["vocab_size"], mask_token_id)
    hidden, heads, kv_heads = (config[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dim = config.get("head_dim") or hidden // heads
    qkv_bias = {"sdar": config.get("attention_bias"), "dream": True, "llada2_moe": config.get("use_qkv_bias")}[system]
    matrix(
        "model.word_embeddings" if system == "llada2_moe" else "model.embed_tokens",
        config["vocab_size"],
        hidden,
        scale=6.0,
    )
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
        matrix("lm_head", config["vocab_size"], hidden, scale=3.0)
    return _without_mask(weights, config["vocab_size"], mask_token_id)


def _without_mask(weights: dict[str, Tensor], vocabulary: int, mask_token_id: int) -> dict[str, Tensor]:
    """With a mask token that is not proposed: most of the originals fail then, or do not end."""
    for name, tensor in weights.items():
        if tensor.shape[0] == vocabulary and tensor.ndim == 2:
            weights[name][mask_token_id] *= 0.02
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
        if config.get("attention_layer_norm"):
            norm(f"{name}.q_norm", hidden, bias)
            norm(f"{name}.k_norm", kv_width, bias)
        size = config["mlp_hidden_size"] or config["mlp_ratio"] * hidden
        matrix(f"{name}.ff_proj", size, hidden, bias)
        matrix(f"{name}.up_proj", size, hidden, bias)
        matrix(f"{name}.ff_out", hidden, size, bias)
    norm("model.transformer.ln_f", hidden, bias)
    if not config["weight_tying"]:
        matrix("model.transformer.ff_out", config["embedding_size"], hidden, bias, scale=3.0)
