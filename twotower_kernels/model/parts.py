"""Which of a model's weights are quantized, by the names of their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from twotower_kernels.model.layout import tower_of
from twotower_kernels.quantization import FORMATS

TOWERS = ("context", "denoiser")
# A key's end says which part it is of. The router, norms, A_log, D, dt_bias, the convolution, the time embedding and
# its tables are of none, and stay as they are.
PARTS = {
    "experts": r"\.mixer\.experts\..*",
    "shared": r"\.mixer\.shared_experts\..*",
    "attention": r"\.mixer\.[qkvo]_proj\.weight",
    "mamba": r"\.mixer\.(in|out)_proj\.weight",
    "mlp": r"\.mixer\.(up|down)_proj\.weight",
    "head": r"lm_head\.weight",
    "embeddings": r"\.embeddings\.weight",
}
ONLY_WHEN_NAMED = ("head", "embeddings")
Quantize = str | Mapping[str, str | None] | None


def part_of(key: str) -> str | None:
    """The part of a tower that a key is of."""
    return next((part for part, ending in PARTS.items() if re.search(ending + "$", key)), None)


def formats(quantize: Quantize) -> Callable[[str], str | None]:
    """The format of each key, None where it is not quantized.

    Args:
        quantize: a format for both towers; or formats (or None) by "context", "denoiser", or either with one of
            ".experts", ".shared", ".attention", ".mamba", ".mlp", ".head", ".embeddings", of which the longer name
            decides. Head and embeddings are quantized where they are named.

    Raises:
        ValueError: an unknown format or name. TypeError: neither a string, nor a mapping, nor None.
    """
    if quantize is None:
        return lambda key: None
    if isinstance(quantize, str):
        quantize = dict.fromkeys(TOWERS, quantize)
    if not isinstance(quantize, Mapping):
        raise TypeError(f"quantize: expected a format, a mapping to formats, or None, got {type(quantize).__name__}")
    names = [name for tower in TOWERS for name in (tower, *(f"{tower}.{part}" for part in PARTS))]
    for name, format in quantize.items():
        if name not in names:
            raise ValueError(f"quantize: expected names among {', '.join(names)}, got {name!r}")
        if format is not None and format not in FORMATS:
            raise ValueError(f"quantize: expected one of {FORMATS} or None for {name}, got {format!r}")
    chosen = dict(quantize)

    def of_key(key: str) -> str | None:
        part, tower = part_of(key), tower_of(key)
        if part is None or (part in ONLY_WHEN_NAMED and f"{tower}.{part}" not in chosen):
            return None
        return chosen.get(f"{tower}.{part}", chosen.get(tower))

    return of_key
