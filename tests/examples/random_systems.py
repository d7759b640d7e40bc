"""Small random models of the four systems, in the form of tests/data/golden/systems: what they generate is written by
the plain programs of bench/baselines/diffusion_lms.py, in the way of the originals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.baselines import diffusion_lms
from bench.baselines.diffusion_lm_weights import random_weights

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


def write(
    folder: Path, system: str, cases: list[tuple[int, dict[str, Any]]], config: Config | None = None, rows: int = 1
) -> None:
    """A folder of this system: a forward pass, and a generation for every case, which is its prompt's length and the
    arguments of the plain program."""
    config = dict(CONFIGS[system]) | dict(config or {})
    weights = random_weights(system, config, MASK)
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
