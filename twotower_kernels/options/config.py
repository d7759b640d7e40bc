"""The shape of a TwoTower model: `config.json` of a checkpoint, read, completed with defaults and checked.

Both towers have the same shape, so one config describes both. Field names are those of the released file; the names and
spellings under which versions of transformers write the same are understood. Fields that do not shape the computation
are ignored, and settings that would make it another one are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from twotower_kernels.options.files import read_json, shown

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
    "moe_latent_size": None,
}

# Other names of fields, as versions of transformers write or accept them (its NemotronHConfig).
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hybrid_override_pattern": ("layers_block_type", "layer_types"),
    "torch_dtype": ("dtype",),
    "head_dim": ("attention_head_dim",),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "time_step_limit": ("mamba_dt_limit",),
    "n_routed_experts": ("num_local_experts",),
}

# The letter of each kind of layer where a list names them, under today's names and the older ones.
BLOCK_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}

# How transformers spells the numbers that JSON has no words for.
_SPELLED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}

# Far beyond any model, and what keeps a damaged file from costing more than an error.
MOST_BYTES = 2**20  # of config.json
MOST_LAYERS = 10_000
MOST_BLOCK = 2**16


def _is_int(value: object) -> bool:
    """In Python a bool is an int; in a config it is not. The kernels count in 32 bits."""
    return type(value) is int and -(2**31) <= value < 2**31


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


# How a field's annotation is said to a reader, and checked.
_MEANING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer of 32 bits", _is_int),
    "int | None": ("an integer of 32 bits or null", lambda v: v is None or _is_int(v)),
    "int | tuple[int, ...]": (
        "an integer of 32 bits, or several",
        lambda v: _is_int(v) or (type(v) is tuple and all(map(_is_int, v))),
    ),
    "float": ("a number", _is_number),
    "tuple[float, float]": (
        "two numbers",
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(_is_number, v)),
    ),
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
        torch_dtype: what the weights are loaded in, unless the caller says otherwise. "auto": what most of a
            checkpoint's weights are stored in; float32 without one.
        eos_token_id: the token that ends a text, or all that do.
        residual_in_fp32: keep the residual stream in float32 between layers of a narrower model.
        mask_token_id: the token that stands for one still to be written. Released files do not say it; theirs is 3.
        block_size: the block that the denoiser was trained on, where known.
        model_type: the family that the file says it is of; for a reader.

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
    eos_token_id: int | tuple[int, ...] = 2
    pad_token_id: int = 0
    mask_token_id: int = 3
    block_size: int | None = None
    model_type: str = "nemotron_h"

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
            words, is_right = _MEANING[str(f.type)]
            if not is_right(value := getattr(self, f.name)):
                raise ValueError(f"config: {f.name} must be {words}, got {shown(value)}")
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
        if self.block_size is not None and self.block_size > MOST_BLOCK:
            raise ValueError(f"config: block_size must be at most {MOST_BLOCK}, got {self.block_size}")
        for name in ("layer_norm_epsilon", "routed_scaling_factor"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"config: {name} must be positive and finite, got {value!r}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:  # NaN fails too
            raise ValueError(f"config: time_step_limit must be an interval in [0, inf], got {self.time_step_limit!r}")
        if self.torch_dtype not in (*DTYPES, "auto"):
            known = ", ".join(DTYPES)
            raise ValueError(f"config: torch_dtype must be auto or one of {known}, got {shown(self.torch_dtype)}")

    def _check_pattern(self) -> None:
        pattern = self.hybrid_override_pattern
        if not pattern:
            raise ValueError("config: hybrid_override_pattern is empty")
        if len(pattern) > MOST_LAYERS:
            raise ValueError(
                f"config: hybrid_override_pattern must have at most {MOST_LAYERS} letters, got {len(pattern)}"
            )
        for position, letter in enumerate(pattern):
            if letter not in LAYERS:
                known = ", ".join(f"{letter} ({kind})" for letter, (kind, _) in LAYERS.items())
                raise ValueError(
                    f"config: hybrid_override_pattern has unknown layer letter {letter!r} at position {position}; "
                    f"expected one of {known}"
                )
        for letter in dict.fromkeys(pattern):
            kind, sizes = LAYERS[letter]
            for name in sizes:
                if getattr(self, name) < 1:
                    raise ValueError(f"config: {name} must be positive for {kind} layers, got {getattr(self, name)}")

    def _check_experts(self) -> None:
        groups, eligible_groups = self.n_group, self.topk_group
        if not 1 <= eligible_groups <= groups:
            raise ValueError(f"config: topk_group {eligible_groups} exceeds n_group {groups}, or one is not positive")
        self._check_multiple("n_routed_experts", of="n_group")
        eligible = eligible_groups * (self.n_routed_experts // groups)
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
        given = {f.name: value for f in fields(cls) if (value := _given(f.name, raw)) is not None}
        for f in fields(cls):
            if f.default is MISSING and f.name not in given:
                raise ValueError(f"config: {f.name} is missing")
        for name, value in ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(f"config: {name} must be {value!r}, got {shown(raw[name])}")
        layers, pattern = raw.get("num_hidden_layers"), given["hybrid_override_pattern"]
        if layers is not None and isinstance(pattern, str) and layers != len(pattern):
            raise ValueError(
                f"config: num_hidden_layers is {shown(layers)}, but hybrid_override_pattern has {len(pattern)} letters"
            )
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> TwoTowerConfig:
        """Reads `config.json`, in which released files write a bare `Infinity`.

        Raises:
            FileNotFoundError: no such file. ValueError: not a JSON object, or as `from_dict`. Both name the file.
        """
        try:
            raw = read_json(Path(path), most=MOST_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected a model folder with config.json") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            kind = f" of model_type {shown(raw['model_type'])}" if "model_type" in raw else ""
            raise ValueError(f"{path}: config{kind}: {str(error).removeprefix('config: ')}") from None


def _given(field: str, raw: dict[str, Any]) -> Any:
    """What a file says of a field, under whichever of its names. None: nothing.

    Raises:
        ValueError: two names that say two things; an unknown kind of layer.
    """
    said = {
        name: _understood(field, name, raw[name])
        for name in (field, *OTHER_NAMES.get(field, ()))
        if raw.get(name) is not None
    }
    (first, value), *others = said.items() or [(field, None)]
    for name, other in others:
        if other != value:
            raise ValueError(f"config: {first} is {shown(raw[first])}, but {name} is {shown(raw[name])}")
    return value


def _understood(field: str, name: str, value: Any) -> Any:
    """A field's value, in this class's spelling. What cannot be understood stays as it is, and fails its check."""
    value = [_number(v) for v in value] if isinstance(value, list) else _number(value)
    if name in OTHER_NAMES["hybrid_override_pattern"]:
        return _pattern(name, value)
    if field == "torch_dtype" and isinstance(value, str):
        return value.removeprefix("torch.")
    if field == "eos_token_id" and isinstance(value, list):
        return tuple(value)
    if field == "time_step_limit" and isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        return tuple(float(v) for v in value)
    return value


def _number(value: Any) -> Any:
    """`{"__float__": "Infinity"}` and its kind as the number; anything else as it is."""
    if isinstance(value, dict) and list(value) == ["__float__"] and isinstance(value["__float__"], str):
        return _SPELLED.get(value["__float__"], value)
    return value


def _pattern(name: str, value: Any) -> str:
    """One letter per layer, from the list that names each layer's kind."""
    if not isinstance(value, list):
        raise ValueError(f"config: {name} must be a list of kinds of layers, got {shown(value)}")
    for position, kind in enumerate(value):
        if not isinstance(kind, str) or kind not in BLOCK_TYPES:
            raise ValueError(
                f"config: {name} has unknown kind {shown(kind)} at position {position}; "
                f"expected one of {', '.join(BLOCK_TYPES)}"
            )
    return "".join(BLOCK_TYPES[kind] for kind in value)
