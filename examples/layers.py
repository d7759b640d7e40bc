"""What the four models share beside the library's operations: fields and tensors by the originals' names, activations,
rotary positions, a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt

Config = Mapping[str, Any]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def field(config: Config, name: str) -> Any:
    """A field that the configuration must have."""
    if config.get(name) is None:
        raise ValueError(f"config: expected a field {name}, which is not there")
    return config[name]


def activation(config: Config, name: str) -> Activation:
    """The activation that a field asks for."""
    value = field(config, name)
    if value not in ACTIVATIONS:
        raise NotImplementedError(f"{name}: expected one of {', '.join(ACTIVATIONS)}, got {value!r}")
    return ACTIVATIONS[value]


def refuse(given: Config, **served: Any) -> None:
    """Raises NotImplementedError where a field is given and differs from the only value that is served."""
    for name, value in served.items():
        if given.get(name) is not None and given[name] != value:
            raise NotImplementedError(f"{name}: expected {value!r}, got {given[name]!r}")


class Weights:
    """A checkpoint's tensors by the originals' names, those below a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def below(self, name: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(self._prefix + name)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise ValueError(f"weights: expected a tensor {self._prefix}{name}, which is not there")
        return tensor

    def tied(self, name: str, other: str) -> Tensor:
        """One of two matrices that share their storage, whichever name it was saved under."""
        tensor = self.get(name)
        return self[other] if tensor is None else tensor

    def linear(self, x: Tensor, name: str) -> Tensor:
        return tt.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def mlp(self, x: Tensor, act: Activation) -> Tensor:
        """`down(act(gate(x)) · up(x))`."""
        return self.linear(act(self.linear(x, "gate_proj")) * self.linear(x, "up_proj"), "down_proj")


class Rotary:
    """RoPE (arXiv 2104.09864), half-split as in Llama, on the first `dim` channels of a head."""

    def __init__(self, config: Config, dim: int) -> None:
        options = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = options.get("rope_type", options.get("type", "default"))
        if kind not in ("default", "linear"):
            raise NotImplementedError(f"rope_type: expected 'default' or 'linear', got {kind!r}")
        theta = config.get("rope_theta") or field(options, "rope_theta")
        self.frequencies = 1 / theta ** (torch.arange(0, dim, 2).float() / dim)  # [dim / 2]
        if kind == "linear":
            self.frequencies = self.frequencies / field(options, "factor")

    def __call__(self, positions: Tensor, *heads: Tensor) -> list[Tensor]:
        """Queries or keys `[B, S, H, D]` turned to their positions, `[S]` or `[B, S]`."""
        angles = positions[..., None, None].float() * self.frequencies.to(positions.device)
        cos, sin, half = angles.cos(), angles.sin(), len(self.frequencies)  # [(B,) S, 1, dim / 2]
        turned = []
        for x in heads:
            c, s = cos.to(x.dtype), sin.to(x.dtype)
            first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            turned.append(torch.cat((first * c - second * s, second * c + first * s, rest), -1))
        return turned


class Cache:
    """Keys, which are rotated already, and values of every layer: storage for `length` tokens of each row."""

    def __init__(self, layers: int, rows: int, length: int, heads: int, dim: int, like: Tensor) -> None:
        self.k, self.v = (like.new_zeros(layers, rows, length, heads, dim) for _ in "kv")

    def append(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor, rows: Tensor | None = None) -> None:
        tt.append_kv(self.k[layer], self.v[layer], k, v, start, context_index=rows)
