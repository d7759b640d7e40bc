"""DiffusionGemma's decoder concatenates its canvas to the context of its encoder, in every layer and step; with a
`BlockCache` the canvas is written behind the context instead, in place."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from twotower_kernels.integrations.transformers.cache import BlockCache

_DECODER = "transformers.models.diffusion_gemma.modeling_diffusion_gemma.DiffusionGemmaDecoderTextAttention"
_METHOD = "append_to_cache"


def has_append(module: nn.Module) -> bool:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == _DECODER


def swap_append(module: Any) -> str:
    """Has a decoder's attention peek at a `BlockCache`; says so."""
    setattr(module, _METHOD, partial(_append, module))
    return "of a BlockCache, it writes behind the context in place"


def restore_append(module: nn.Module) -> None:
    vars(module).pop(_METHOD, None)


def _append(module: Any, cache: Any, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(cache, BlockCache):
        return cache.peek(key_states, value_states, module.layer_idx)
    found: tuple[Tensor, Tensor] = getattr(type(module), _METHOD)(module, cache, key_states, value_states)
    return found
