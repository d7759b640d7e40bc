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
    "moe_latent_size": None,
}

# What else files of this family call a field; versions of transformers write or accept these names.
ALIASES = {
    "layers_block_type": "hybrid_override_pattern",
    "layer_types": "hybrid_override_pattern",
    "dtype": "torch_dtype",
    "attention_head_dim": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
    "num_local_experts": "n_routed_experts",
}

# Kinds of layers where they are listed by name, in today's words and in older ones.
NAMED_LAYERS = {
    "M": ("linear_attention", "mamba"),
    "*": ("full_attention", "attention"),
    "E": ("moe",),
    "-": ("mlp",),
}

# What a field of each annotation may hold, and how to say so; a bool is no number here.
KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("an integer of 32 bits", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a string", (str,)),
    int | None: ("an integer of 32 bits or null", (int, type(None))),
    int | tuple[int, ...]: ("an integer of 32 bits, or several", (int, tuple)),
    tuple[float, float]: ("two numbers", (tuple, list)),
}

# Bounds beyond any model: what a damaged file can cost.
MOST_BYTES, MOST_LAYERS, MOST_BLOCK = 2**20, 10_000, 2**16


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
    eos_token_id: int | tuple[int, ...] = 2  # one token, or all that end a text
    pad_token_id: int = 0
    block_size: int | None = None  # the block the denoiser was trained on, if known
    model_type: str = "nemotron_h"

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_channels(self) -> int:
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def numbers(self) -> int:
        """How many numbers one tower and its head have: counted, so that a file can be asked whether it holds them."""
        hidden, pattern = self.hidden_size, self.hybrid_override_pattern
        convolution = self.mamba_channels * (self.conv_kernel + self.use_conv_bias)
        shared = self.moe_shared_expert_intermediate_size if self.n_shared_experts else 0
        mixers = {
            "M": (2 * self.mamba_inner + self.mamba_channels + self.mamba_num_heads) * hidden
            + (convolution + 3 * self.mamba_num_heads + self.mamba_inner),
            "*": 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim * hidden,
            "E": self.n_routed_experts * ((2 * self.moe_intermediate_size + 1) * hidden + 1) + 2 * shared * hidden,
            "-": 2 * self.intermediate_size * hidden,
        }
        layers = sum(pattern.count(letter) * (hidden + mixers[letter]) for letter in set(pattern))
        return 2 * self.vocab_size * hidden + hidden + layers

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (words, kinds) = getattr(self, f.name), KINDS[f.type]
            if not _is_of(kinds, value) or (f.name == "time_step_limit" and len(value) != 2):
                raise ValueError(f"config: {f.name} must be {words}, got {_shown(value)}")
        self._check_pattern()
        self._check_numbers()
        if "E" in self.hybrid_override_pattern:
            self._check_experts()

    def _check_pattern(self) -> None:
        pattern = self.hybrid_override_pattern
        if not 0 < len(pattern) <= MOST_LAYERS:
            words = "is empty" if not pattern else f"must have at most {MOST_LAYERS} letters, got {len(pattern)}"
            raise ValueError(f"config: hybrid_override_pattern {words}")
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
        if (self.block_size or 0) > MOST_BLOCK:
            raise ValueError(f"config: block_size must be at most {MOST_BLOCK}, got {self.block_size}")
        for name in ("layer_norm_epsilon", "routed_scaling_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"config: {name} must be positive and finite, got {getattr(self, name)!r}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise ValueError(f"config: time_step_limit must be an interval in [0, inf], got {self.time_step_limit!r}")
        if self.torch_dtype not in ("float32", "bfloat16", "float16", "float64", "auto"):
            raise ValueError(
                f"config: torch_dtype must be a floating dtype's name or auto, got {_shown(self.torch_dtype)}"
            )

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
        known: dict[str, Any] = {}
        for name in [f.name for f in fields(cls)] + list(ALIASES):
            if raw.get(name) is None:
                continue
            field = ALIASES.get(name, name)
            value = _read(name, field, raw[name])
            if known.setdefault(field, value) != value:
                raise ValueError(f"config: {name} is {_shown(raw[name])}, at odds with another name of {field}")
        for name in ("vocab_size", "hidden_size", "hybrid_override_pattern"):
            if name not in known:
                raise ValueError(f"config: {name} is missing")
        pattern, layers = known["hybrid_override_pattern"], raw.get("num_hidden_layers")
        if isinstance(pattern, str) and layers is not None and layers != len(pattern):
            raise ValueError(
                f"config: num_hidden_layers is {_shown(layers)}, but hybrid_override_pattern has {len(pattern)} letters"
            )
        for name, only in FIXED.items():
            if raw.get(name, only) != only:
                raise ValueError(f"config: {name} must be {only!r}, got {_shown(raw[name])}")
        return cls(**known)

    @classmethod
    def from_file(cls, path: Path) -> "TwoTowerConfig":
        """Reads `config.json`; a bare `Infinity` in it is understood.

        Raises:
            FileNotFoundError, ValueError: naming the file, and what is wrong with it.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; expected a model folder with config.json")
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path}: not valid JSON: not a file of at most {MOST_BYTES} bytes")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _is_of(kinds: tuple[type, ...], value: Any) -> bool:
    """Whether a value is of these kinds. Integers have 32 bits, or 64 where a float is meant; a bool is none."""
    if isinstance(value, tuple | list) and tuple in kinds:
        return all(_is_of((int, float) if list in kinds else (int,), v) for v in value)
    if type(value) is int and int in kinds:
        return abs(value) < 2 ** (63 if float in kinds else 31)
    return type(value) in kinds


def _shown(value: Any) -> str:
    """The beginning of a value's repr."""
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # too many digits, nested too deeply
        return type(value).__name__


def _read(name: str, field: str, value: Any) -> Any:
    """The value in this class's words; what is no such value stays as it is, for the class to refuse."""
    if isinstance(value, list):
        value = [_float(v) for v in value]
    value = _float(value)
    if field == "hybrid_override_pattern" and name != field:
        letters = {kind: letter for letter, kinds in NAMED_LAYERS.items() for kind in kinds}
        if not isinstance(value, list):
            raise ValueError(f"config: {name} must be a list of kinds of layers, got {_shown(value)}")
        for position, kind in enumerate(value):
            if not isinstance(kind, str) or kind not in letters:
                raise ValueError(f"config: {name} has unknown kind {_shown(kind)} at position {position}")
        return "".join(letters[kind] for kind in value)
    if field == "torch_dtype" and isinstance(value, str):
        return value.removeprefix("torch.")
    if field == "time_step_limit" and _is_of((tuple, list), value) and len(value) == 2:
        return tuple(float(v) for v in value)
    return tuple(value) if field == "eos_token_id" and isinstance(value, list) else value


def _float(value: Any) -> Any:
    """transformers writes an infinity as an object of one word."""
    if (
        isinstance(value, dict)
        and set(value) == {"__float__"}
        and value["__float__"] in ("Infinity", "-Infinity", "NaN")
    ):
        return float(value["__float__"])
    return value
