"""Small configurations of every causal language model of transformers, for `tests.transformers_sweep`: sizes by the
names that most models have, and what single models need beside them."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from tests.integrations.tiny_models import SIZES

LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
DECODER = {name: {"layers": 2, "attention_heads": 4, "ffn_dim": 48} for name in ("decoder", "encoder")}
SETTINGS: Mapping[str, Any] = {
    **SIZES,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 5, "tie_word_embeddings": False},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "d_model": 32, "eos_token_id": 2},
    **LATENT,
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 2, "mamba_d_state": 8},
    **{"n_group": 2, "topk_group": 1, "rotary_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{f"{side}_{name}": size for side, sizes in DECODER.items() for name, size in sizes.items()},
}

ALL_HEADS = {"num_key_value_heads": 4}  # as latent attention has them
INDEXED = {**ALL_HEADS, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
SHARED = {
    **PER_LAYER,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SMALL_PICTURES = {"image_size": 32, "patch_size": 16}
SMALL_SOUNDS = {
    "num_blocks": 2,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 32,
}
QWEN4 = {
    **{"num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"]},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
    **{"indexer_compress_ratio": 2, "shared_expert_intermediate_size": 16, "hc_lowrank": 8},
}
LAYERS: Mapping[str, Mapping[str, Any]] = {
    "axk1": ALL_HEADS,
    "axk2": INDEXED,
    "bailing_hybrid": {**ALL_HEADS, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3], "local_attention_window_len": 8},
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_v2": ALL_HEADS,
    "deepseek_v3": ALL_HEADS,
    "deepseek_v32": INDEXED,
    "dots3_note": INDEXED,
    "dots3_note_text": INDEXED,
    "gemma3": {"vision_config": SMALL_PICTURES, "mm_tokens_per_image": 4},
    "gemma3n_text": SHARED,
    "gemma4": {"text_config": PER_LAYER},
    "gemma4_text": PER_LAYER,
    "git": {"vision_config": SMALL_PICTURES},
    "got_ocr2": {"vision_config": {**SMALL_PICTURES, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 48}},
    "glm4_moe_lite": ALL_HEADS,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_chunk_size": 8},
    "kimi_linear": {**ALL_HEADS, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**ALL_HEADS, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "minicpm3": ALL_HEADS,
    "phi4_multimodal": {"vision_config": SMALL_PICTURES, "audio_config": SMALL_SOUNDS},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48},
    "xlstm": {"num_heads": 4, "hidden_size": 256},
    "xmod": {"default_language": "en_XX"},
    "youtu": ALL_HEADS,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

# What is not run, and why.
WITHOUT: Mapping[str, str] = {
    "blt": "its configuration lacks the number of layers that its own cache asks for",
    "gemma3n": "its pictures need another library, timm",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "reads the keys of the model that it assists"),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "its `generate` fails for want of a start token, as a decoder alone"
    ),
}


def configuration(kind: str, layers: int) -> PreTrainedConfig:
    """Of a model type, small, with so many layers where the table says nothing of them."""
    classes = CAUSAL[kind]
    of_model = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    return _config(of_model.config_class, layers, LAYERS.get(kind, {}))


def _config(of_config: Any, layers: int, own: Mapping[str, Any]) -> PreTrainedConfig:
    """Those within it, of texts, pictures and sounds, are small as well."""
    fields, renamed = of_config.__dataclass_fields__, getattr(of_config, "attribute_map", {})
    sizes = {name: value for name, value in SETTINGS.items() if name in fields or name in renamed}
    sizes |= {name: layers for name in ("num_hidden_layers", "n_layer") if name in sizes}
    sizes = {name: value for name, value in sizes.items() if renamed.get(name) not in sizes}
    within = {name: getattr(of_config(), name, None) for name in getattr(of_config, "sub_configs", {})}
    for name, default in within.items():
        if default is not None and not isinstance(own.get(name, {}), PreTrainedConfig):
            sizes[name] = _config(type(default), layers, own.get(name, {}))
    return of_config(**sizes | {name: value for name, value in own.items() if name not in within})
