"""The sizes that the cases are made from: those of the released model, small ones, or those of any `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from twotower_kernels.bench.sizes.configs import config
from twotower_kernels.options.config import MOST_BYTES
from twotower_kernels.options.files import read_json, shown

# What else a field is called in the files of Hugging Face's models, and of LLaDA's.
SYNONYMS = {
    "hidden_size": ("d_model", "n_embd"),
    "num_attention_heads": ("n_heads", "n_head"),
    "num_key_value_heads": ("n_kv_heads",),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "ssm_state_size": ("mamba_d_state", "state_size"),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_top_k"),
    "moe_shared_expert_intermediate_size": ("shared_expert_intermediate_size",),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, by the names of `TwoTowerConfig`; block_size: tokens that are written at a time.

    Raises:
        ValueError: a size below 1, heads that their groups do not divide, or more experts per token than there are.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    block_size: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            _checked(field.name, getattr(self, field.name))
        for heads, groups in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
            if getattr(self, heads) % getattr(self, groups):
                expected = f"a multiple of {groups}, {getattr(self, groups)}"
                raise ValueError(f"{heads}: expected {expected}, got {getattr(self, heads)}")
        if self.num_experts_per_tok > self.n_routed_experts:
            expected = f"at most n_routed_experts, {self.n_routed_experts}"
            raise ValueError(f"num_experts_per_tok: expected {expected}, got {self.num_experts_per_tok}")

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba-2 layer's output."""
        return self.mamba_num_heads * self.mamba_head_dim

    @classmethod
    def from_file(cls, path: Path) -> tuple[Shapes, tuple[str, ...]]:
        """The sizes in a `config.json`, and the names of those that it lacks, which are the released model's.

        As in Hugging Face's files, a null is a size that is not given, there are as many key heads as query heads
        where it says nothing else, and these share the hidden size.

        Raises:
            ValueError: no JSON object is there, or a size is not usable; the message names file and field.
        """
        try:
            given = read_json(path, most=MOST_BYTES, otherwise="expected JSON")
        except FileNotFoundError:
            raise ValueError(f"{path}: expected a config.json: No such file") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(given).__name__}")
        found: dict[str, int] = {}
        for field in fields(cls):
            for name in (field.name, *SYNONYMS.get(field.name, ())):
                if given.get(name) is not None:
                    found[field.name] = _checked(f"{path}: {name}", given[name])
                    break
        if "num_attention_heads" in found:
            found.setdefault("num_key_value_heads", found["num_attention_heads"])
            if "hidden_size" in found:
                found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
        try:
            sizes = replace(RELEASED, **found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return sizes, tuple(f.name for f in fields(cls) if f.name not in found and f.name != "block_size")


def _checked(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:  # in Python, True is an int
        raise ValueError(f"{name}: expected an integer, 1 or more, got {shown(value)}")
    return value


RELEASED = Shapes(**{field.name: getattr(config(), field.name) for field in fields(Shapes)[:-1]})  # but block_size
SMALL = Shapes(
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=4096,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_groups=2,
    conv_kernel=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256,
)
