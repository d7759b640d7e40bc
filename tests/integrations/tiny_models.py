"""Models of transformers, small and random: one of each kind of layer that the adapter serves."""

import torch
import transformers
from torch import Tensor

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 5}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}

# A model's class without "ForCausalLM", and what its configuration has beyond the sizes.
MODELS: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": WINDOW,
    "Qwen3": {},
    "Gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "GptOss": {**WINDOW, "num_local_experts": 6, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen3Moe": MIXTURE,
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "Bamba": {**BAMBA, "attn_layer_indices": [1], "mamba_proj_bias": True},
    "NemotronH": {
        **MAMBA,
        "layers_block_type": ["mamba", "attention", "moe", "attention"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
}
# Other models with Mamba-2 layers.
HYBRID: dict[str, dict[str, object]] = {
    "FalconH1": {**BAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "GraniteMoeHybrid": {
        **BAMBA,
        "layers_block_type": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "use_bias": True},
    "Zamba2": {
        **{"mamba_d_state": 8, "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8},
        **{"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_shared_attention_adapter": False},
    },
}
PACKED = {"GptOss"}  # experts whose layout has to be packed first


def tiny(name: str, **more: object) -> transformers.PreTrainedModel:
    """The model in float32, every parameter random, also those that begin as zeros or ones."""
    settings = SIZES | (MODELS | HYBRID)[name] | more
    if name == "NemotronH":
        del settings["num_hidden_layers"]  # as many as it has types of blocks
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def diffusion_gemma() -> transformers.PreTrainedModel:
    """Of two sliding layers and a full one, with a canvas of 8 tokens."""
    text = (
        SIZES
        | WINDOW
        | {"num_hidden_layers": 3, "global_head_dim": 16, "num_global_key_value_heads": 1, "eos_token_id": 2}
    )
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    text |= {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24}
    vision = {"model_type": "gemma4_vision", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    torch.manual_seed(7)
    return transformers.DiffusionGemmaForBlockDiffusion._from_config(config, attn_implementation="sdpa").eval()


def padded_batch() -> tuple[Tensor, Tensor]:
    """Prompts of 11, 7 and 1 tokens, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, SIZES["vocab_size"], (3, 11), generator=generator)
    starts = torch.tensor([0, 4, 10])
    mask = (torch.arange(11) >= starts[:, None]).long()
    return ids * mask, mask
