"""A model small enough for every test, as the specification and as a folder on disk with a tokenizer."""

import functools
import json
import string
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from twotower_kernels import TwoTowerModel
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference.model import TwoTower

BOS, EOS, MASK, VOCAB = 1, 2, 3, 24


@functools.cache
def small_model() -> TwoTower:
    """Two towers of random weights with every kind of layer, in float64: a batch's sums round as a single row's do."""
    torch.manual_seed(0)
    config = TwoTowerConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        hybrid_override_pattern="M*E-",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        conv_kernel=4,
        intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=8,
    )
    model = TwoTower(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    model.lm_head.weight.data *= 3  # confidences on both sides of the thresholds
    return model.double()


def save_small_model(folder: Path) -> Path:
    """Writes a folder as a shipped model's: the small model, and a tokenizer of single letters. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = small_model()
    config = {**vars(model.config), "torch_dtype": "float64"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    words = ["<pad>", "<bos>", "<eos>", "<mask>", *string.ascii_lowercase[: VOCAB - 4]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@functools.cache
def package_model() -> TwoTowerModel:
    """The small model as the package loads it."""
    with tempfile.TemporaryDirectory() as folder:
        return TwoTowerModel.from_pretrained(save_small_model(Path(folder)), dtype=torch.float64)
