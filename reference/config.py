"""The released configuration: a dataclass with the field names of `config.json`, and what must hold between them."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LETTERS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}

# The fields that give each kind of layer its shape: positive integers, without a default that could be right.
SHAPE_FIELDS = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "-": ("intermediate_size",),
}

# What this architecture fixes: a config that says otherwise describes another model.
FIXED = {
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


# What a field of each annotation may hold, and how to say so; a bool is no number here.
KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a string", (str,)),
    int | None: ("an integer or null", (int, type(None))),
}


@dataclass(frozen=True)
class TwoTowerConfig:
    """One tower's shape (both towers share it). Field names are those of the released `config.json`.

    Raises:
        ValueError: a field missing for a layer kind in use, of the wrong type or range, or at odds with another.
    """

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0
    conv_kernel: int = 0
    use_conv_bias: bool = True
    intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    torch_dtype: str = "float32"
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    block_size: int | None = None  # the block the denoiser was trained on, if known

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_channels(self) -> int:
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.type in KINDS:
                value, (words, kinds) = getattr(self, f.name), KINDS[f.type]
                if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                    raise ValueError(f"config: {f.name} must be {words}, got {value!r}")
        self._check_pattern()
        self._check_numbers()
        if "E" in self.hybrid_override_pattern:
            self._check_experts()

    def _check_pattern(self) -> None:
        pattern = self.hybrid_override_pattern
        if not pattern:
            raise ValueError("config: hybrid_override_pattern is empty")
        for position, letter in enumerate(pattern):
            if letter not in LETTERS:
                raise ValueError(
                    f"config: hybrid_override_pattern has unknown layer letter {letter!r} at position {position}; "
                    f"expected one of {', '.join(f'{k} ({v})' for k, v in LETTERS.items())}"
                )
        for letter in sorted(set(pattern)):
            for name in SHAPE_FIELDS[letter]:
                if getattr(self, name) < 1:
                    raise ValueError(
                        f"config: {name} must be positive for {LETTERS[letter]} layers, got {getattr(self, name)}"
                    )
        if "*" in pattern:
            self._check_divides("num_key_value_heads", "num_attention_heads")
        if "M" in pattern:
            self._check_divides("n_groups", "mamba_num_heads")

    def _check_numbers(self) -> None:
        for name in ("vocab_size", "hidden_size", "block_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be positive, got {getattr(self, name)}")
        for name in ("layer_norm_epsilon", "routed_scaling_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"config: {name} must be positive and finite, got {getattr(self, name)!r}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise ValueError(f"config: time_step_limit must be an interval in [0, inf], got {self.time_step_limit!r}")
        if self.torch_dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"config: torch_dtype must be a floating dtype's name, got {self.torch_dtype!r}")

    def _check_experts(self) -> None:
        if self.n_group < 1 or self.topk_group < 1 or self.topk_group > self.n_group:
            raise ValueError(
                f"config: topk_group {self.topk_group} exceeds n_group {self.n_group}, or one is not positive"
            )
        self._check_divides("n_group", "n_routed_experts")
        eligible = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds the {eligible} eligible experts"
            )
        if self.n_shared_experts not in (0, 1):
            raise ValueError(f"config: n_shared_experts must be 0 or 1, got {self.n_shared_experts}")
        if self.n_shared_experts and self.moe_shared_expert_intermediate_size < 1:
            raise ValueError(
                "config: moe_shared_expert_intermediate_size must be positive when n_shared_experts is 1, "
                f"got {self.moe_shared_expert_intermediate_size}"
            )

    def _check_divides(self, small: str, large: str) -> None:
        if getattr(self, large) % getattr(self, small):
            raise ValueError(f"config: {small} {getattr(self, small)} does not divide {large} {getattr(self, large)}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TwoTowerConfig":
        """Builds a config from `config.json`'s dict; fields that do not shape the model are ignored.

        Raises:
            ValueError: as the class does, or for a setting that this architecture does not have.
        """
        for name in ("vocab_size", "hidden_size", "hybrid_override_pattern"):
            if raw.get(name) is None:
                raise ValueError(f"config: {name} is missing")
        known = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        pattern, layers = raw["hybrid_override_pattern"], raw.get("num_hidden_layers")
        if isinstance(pattern, str) and layers is not None and layers != len(pattern):
            raise ValueError(
                f"config: num_hidden_layers is {layers}, but hybrid_override_pattern has {len(pattern)} letters"
            )
        for name, only in FIXED.items():
            if raw.get(name, only) != only:
                raise ValueError(f"config: {name} must be {only!r}, got {raw[name]!r}")
        limit = known.get("time_step_limit", (0.0, math.inf))
        if not (isinstance(limit, list | tuple) and len(limit) == 2 and all(isinstance(v, int | float) for v in limit)):
            raise ValueError(f"config: time_step_limit must be two numbers, got {limit!r}")
        return cls(**known | {"time_step_limit": tuple(float(v) for v in limit)})

    @classmethod
    def from_file(cls, path: Path) -> "TwoTowerConfig":
        """Reads `config.json`; a bare `Infinity` in it is understood."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected a model folder with config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw)
