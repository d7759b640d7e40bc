"""What one layer reads of the context, and what it leaves behind: small views, made by a `ContextState` per layer.

A mixer is a function of activations and of one of these, `forward(x, cache) -> (y, state)`: attention and Mamba-2 know
theirs, the other mixers have none. Without a cache, a text begins: there is no context, and attention is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class MambaState(NamedTuple):
    """A Mamba-2 layer's state after a block."""

    conv: Tensor  # [B, C, width-1], the newest column last
    ssm: Tensor  # [B, heads, head_dim, state] float32 (float64)


class MambaCache(NamedTuple):
    """Where a Mamba-2 layer starts: states of R storage rows, which are only read."""

    conv: Tensor  # [R, C, width-1]
    ssm: Tensor  # [R, heads, head_dim, state]
    state_index: Tensor | None = None  # [B] int64, the storage row of each row of the batch; None: its own
    block_lens: Tensor | None = None  # [B] int64, how many tokens of the block count; None: all
    return_state: bool = False  # also compute the state after the block
    keep: Callable[[Tensor, Tensor], None] | None = None  # takes what the scan reads, [B, S, C] and [B, S, heads]


class KVCache(NamedTuple):
    """What an attention layer sees beside its own block: the keys and values of R storage rows."""

    k: Tensor  # [R, T, Hkv, D]
    v: Tensor
    lengths: Tensor  # [B] int64, the tokens of context of each row; beyond them k and v are not read
    context_index: Tensor | None = None  # [B] int64, the storage row of each row of the batch; None: its own
    block_lens: Tensor | None = None  # [B] int64, how many tokens of the block count; None: all
    causal: bool = False  # a token sees the block up to itself
    append: Callable[[Tensor, Tensor], None] | None = None  # takes the block's own k and v [B, S, Hkv, D]


Cache = MambaCache | KVCache | None
