"""The shape of a TwoTower model: `config.json` of a checkpoint, read, completed with defaults and checked.

Both towers have the same shape, so one config describes both. Field names are those of the released file. Fields that
do not shape the computation are ignored, and settings that would make it another one are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")

# What stands behind each letter of the pattern, and the sizes such a layer cannot do without.
LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "M": ("Mamba-2", ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")),
    "*": ("attention", ("num_attention_heads", "num_key_value_heads", "head_dim")),
    "E": ("mixture of experts", ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")),
    "-": ("dense MLP", ("intermediate_size",)),
}

# Settings of the wider model family that this architecture has in one form only.
ONLY: dict[str, Any] = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
}

# How a field's annotation is said to a reader, and checked. In Python a bool is an int; in a config it is not.
_MEANING = {
    "int": ("an integer", lambda v: type(v) is int),
    "int | None": ("an integer or null", lambda v: v is None or type(v) is int),
    "float": ("a number", lambda v: type(v) in (int, float)),
    "bool": ("true or false", lambda v: type(v) is bool),
    "str": ("a string", lambda v: type(v) is str),
}


@dataclass(frozen=True)
class TwoTowerConfig:
    """The shape of one tower. See arXiv 2606.26493 for the model, and the released `config.json` for the names.

    Sizes of layer kinds that the pattern does not use may be left at 0.

    Args:
        hybrid_override_pattern: one letter per layer: M Mamba-2, * attention, E mixture of experts, - dense MLP.
        time_step_limit: the interval to which Mamba-2's step sizes are clamped.
        torch_dtype: what the weights are loaded in, unless the caller says otherwise.
        residual_in_fp32: keep the residual stream in float32 between layers of a narrower model.
        block_size: the block that the denoiser was trained on, where known.

    Raises:
        ValueError: a size missing that a layer in use needs, or a value of the wrong type, out of range, or at odds
            with another one. The message names the field.
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
    block_size: int | None = None

    @property
    def mamba_inner(self) -> int:
        """Channels that Mamba-2's scan puts out."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_channels(self) -> int:
        """Channels of its convolution: x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    def layers(self, letter: str) -> list[int]:
        """Indices of the layers of one kind."""
        return [i for i, kind in enumerate(self.hybrid_override_pattern) if kind == letter]

    def __post_init__(self) -> None:
        for f in fields(self):
            words, is_right = _MEANING.get(str(f.type), ("", None))
            value = getattr(self, f.name)
            if is_right is not None and not is_right(value):
                raise ValueError(f"config: {f.name} must be {words}, got {value!r}")
        self._check_ranges()
        self._check_pattern()
        if "M" in self.hybrid_override_pattern:
            self._check_multiple("mamba_num_heads", of="n_groups")
        if "*" in self.hybrid_override_pattern:
            self._check_multiple("num_attention_heads", of="num_key_value_heads")
        if "E" in self.hybrid_override_pattern:
            self._check_experts()

    def _check_ranges(self) -> None:
        for name in ("vocab_size", "hidden_size", "block_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"config: {name} must be positive, got {value}")
        for name in ("layer_norm_epsilon", "routed_scaling_factor"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"config: {name} must be positive and finite, got {value!r}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:  # NaN fails too
            raise ValueError(f"config: time_step_limit must be an interval in [0, inf], got {self.time_step_limit!r}")
        if self.torch_dtype not in DTYPES:
            raise ValueError(f"config: torch_dtype must be one of {', '.join(DTYPES)}, got {self.torch_dtype!r}")

    def _check_pattern(self) -> None:
        if not self.hybrid_override_pattern:
            raise ValueError("config: hybrid_override_pattern is empty")
        for position, letter in enumerate(self.hybrid_override_pattern):
            if letter not in LAYERS:
                known = ", ".join(f"{letter} ({kind})" for letter, (kind, _) in LAYERS.items())
                raise ValueError(
                    f"config: hybrid_override_pattern has unknown layer letter {letter!r} at position {position}; "
                    f"expected one of {known}"
                )
            kind, sizes = LAYERS[letter]
            for name in sizes:
                if getattr(self, name) < 1:
                    raise ValueError(f"config: {name} must be positive for {kind} layers, got {getattr(self, name)}")

    def _check_experts(self) -> None:
        groups, kept = self.n_group, self.topk_group
        if not 1 <= kept <= groups:
            raise ValueError(f"config: topk_group {kept} exceeds n_group {groups}, or one is not positive")
        self._check_multiple("n_routed_experts", of="n_group")
        eligible = kept * (self.n_routed_experts // groups)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds the {eligible} eligible experts"
            )
        if self.n_shared_experts not in (0, 1):
            raise ValueError(f"config: n_shared_experts must be 0 or 1, got {self.n_shared_experts}")
        if self.n_shared_experts == 1 and self.moe_shared_expert_intermediate_size < 1:
            raise ValueError(
                "config: moe_shared_expert_intermediate_size must be positive for a shared expert, "
                f"got {self.moe_shared_expert_intermediate_size}"
            )

    def _check_multiple(self, name: str, *, of: str) -> None:
        value, unit = getattr(self, name), getattr(self, of)
        if value % unit:
            raise ValueError(f"config: {of} {unit} does not divide {name} {value}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TwoTowerConfig:
        """A config from the parsed `config.json`. A field that is null counts as absent.

        Raises:
            ValueError: as the class does; or a setting that this architecture does not have.
        """
        given = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for f in fields(cls):
            if f.default is MISSING and f.name not in given:
                raise ValueError(f"config: {f.name} is missing")
        for name, value in ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(f"config: {name} must be {value!r}, got {raw[name]!r}")
        layers, pattern = raw.get("num_hidden_layers"), given["hybrid_override_pattern"]
        if layers is not None and isinstance(pattern, str) and layers != len(pattern):
            raise ValueError(
                f"config: num_hidden_layers is {layers}, but hybrid_override_pattern has {len(pattern)} letters"
            )
        if (limit := given.get("time_step_limit")) is not None:
            if not isinstance(limit, list | tuple) or [type(v) in (int, float) for v in limit] != [True, True]:
                raise ValueError(f"config: time_step_limit must be two numbers, got {limit!r}")
            given["time_step_limit"] = (float(limit[0]), float(limit[1]))
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> TwoTowerConfig:
        """Reads `config.json`, in which released files write a bare `Infinity`.

        Raises:
            FileNotFoundError: no such file. ValueError: not a JSON object, or as `from_dict`.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path}: no such file; expected a model folder with config.json") from None
        except (ValueError, RecursionError) as error:  # malformed JSON and malformed UTF-8 are ValueErrors
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw)
