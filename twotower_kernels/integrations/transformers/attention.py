"""Attention as `AttentionInterface` asks for it, over the keys that a cache returned."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.integrations.transformers.mask_pieces import both_sides
from twotower_kernels.integrations.transformers.masks import Mask
from twotower_kernels.integrations.transformers.stored import Stored, least, most
from twotower_kernels.ops.attention import context_attention

# What models hand through to whoever may use it and changes nothing here: a mask says what is seen.
_HARMLESS = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`context_attention` for a layer of transformers.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: `[B, Hq, S, D]`.
        key, value: `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`, all that the cache returned, the queries' own included;
            heads are not repeated.
        attention_mask: what `mask` returned. None, where the queries' own keys are all there are, or for a layer that
            is not causal: all keys are seen.
        dropout: 0.
        scaling, softcap, s_aux: `scale`, `softcap` and `sinks` of `context_attention`.
        sliding_window: has to be the mask's, where one is causal; as in other implementations, the mask decides.
        others: known to change nothing, or None or False.

    Returns:
        `[B, S, Hq, Dv]`, and None for the weights.

    Raises:
        NotImplementedError, ValueError: anything else.
    """
    if dropout:
        raise NotImplementedError(f"twotower attention: dropout is not served, got {dropout}")
    for name, given in others.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise NotImplementedError(f"twotower attention: {name} is not served, got {_short(given)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen = _without_mask(query, key, causal, sliding_window) if attention_mask is None else attention_mask
    if not isinstance(seen, Mask):
        raise NotImplementedError(f"twotower attention: expected an attention_mask from mask, got {_short(seen)}")
    shape = query.shape[0], 1, query.shape[2], key.shape[2]
    if seen.shape != shape:
        raise ValueError(f"twotower attention: expected an attention_mask for {shape}, got one for {seen.shape}")
    if seen.causal and sliding_window is not None and (seen.window or key.shape[2]) > sliding_window:
        got = f"{sliding_window} and the attention_mask's {seen.window}"
        raise ValueError(f"twotower attention: expected sliding_window as in the attention_mask, got {got}")
    return _attend(query, key, value, seen, scale=scaling, softcap=softcap or 0.0, sinks=s_aux), None


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Mask, **softmax: Any) -> Tensor:
    """`[B, S, Hq, Dv]` of what a mask says, from keys as they lie."""
    q, (k, v, table), starts, lens = query.transpose(1, 2), _storage(key, value), seen.starts, seen.lens
    if isinstance(key, Stored) and seen.both_sides is not None:
        raise NotImplementedError("twotower attention: a sliding bidirectional mask over pages or uneven rows")
    if seen.both_sides is not None:
        sinks, of_rows = softmax.pop("sinks"), None if isinstance(lens, int) else lens
        attend: Any = partial(context_attention, causal=True, return_lse=True, **softmax)
        return both_sides(attend, q, k, v, seen.both_sides, starts, of_rows, sinks)
    rows: dict[str, Any] = {"block_table": table, "causal": seen.causal, "window": seen.window} | softmax
    if seen.pieces is not None:
        pieces = seen.pieces
        rows |= {"context_lens": pieces.lens, "context_starts": pieces.starts, "block_lens": pieces.block_lens}
        found: Any = context_attention(pieces.gather(q), k, v, context_index=pieces.rows, **rows)
        return pieces.scatter(found)
    rows |= {"context_lens": lens, "context_starts": starts, "block_lens": seen.block_lens}
    if isinstance(key, Stored):
        if not seen.causal:
            rows["context_lens"] = least(lens, key.lens)
        if key.starts is not None:
            rows["context_starts"] = key.starts if starts is None else most(starts, key.starts)
    result = context_attention(q, k, v, **rows)
    assert isinstance(result, Tensor)  # without the log-sum-exp
    return result


def _storage(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values, tokens before heads, or pages of them and their table."""
    if not isinstance(key, Stored) and not isinstance(value, Stored):
        return key.transpose(1, 2), value.transpose(1, 2), None
    if not isinstance(key, Stored) or not isinstance(value, Stored):
        raise NotImplementedError("twotower attention: expected keys and values from one BlockCache, got one of them")
    return key.memory, value.memory, key.table


def _without_mask(query: Tensor, key: Tensor, causal: bool, window: int | None) -> Mask:
    """What is seen where a model made no mask: nothing says which rows of a static cache are in use."""
    queries, keys = query.shape[2], key.shape[2]
    if causal and queries != keys:
        raise NotImplementedError(
            f"twotower attention: expected an attention_mask for {queries} queries of {keys} keys, got None, "
            "which does not say how many of the keys are in use"
        )
    return Mask(causal, window if causal else None, None, keys, None, (query.shape[0], 1, queries, keys))


def _short(given: Any) -> str:
    return f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
