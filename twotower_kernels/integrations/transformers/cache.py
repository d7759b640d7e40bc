"""A cache of transformers whose keys and values stay where they are: appended to in place, never concatenated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from twotower_kernels.ops.attention import append_kv

_LAYERS = {"full_attention", "sliding_attention"}  # a sliding layer's cache keeps every token


class BlockLayer(CacheLayerMixin):
    """The keys and values of one layer, `[B, room, Hkv, D]`, of which `length` tokens are in use."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, storage: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.batch_size, self.room = storage[:2]
        self.dtype, self.device = dtype, device
        self.k, self.v = (torch.zeros(storage, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        self.peeking = False
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, length, D]`, a view, as transformers reads a cache."""
        return self.k[:, : self.length].transpose(1, 2)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("twotower BlockCache: keys lie in its storage; expected update, crop or reset")

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, length, D]`, a view."""
        return self.v[:, : self.length].transpose(1, 2)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("twotower BlockCache: values lie in its storage; expected update, crop or reset")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The storage is there from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = self.peek(key_states, value_states)
        if not self.peeking:
            self.length += key_states.shape[2]
        return found

    def peek(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `[B, Hkv, S, D]` behind the length, which stays; everything up to there, `[B, Hkv, length + S, D]`."""
        batch, _, tokens, _ = key_states.shape
        if batch != self.batch_size:
            raise ValueError(f"twotower BlockCache: expected {self.batch_size} rows, got {batch}")
        if self.length + tokens > self.room:
            got = f"{self.length} tokens and {tokens} more"
            raise ValueError(f"twotower BlockCache: expected at most {self.room} tokens, got {got}")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise NotImplementedError("twotower BlockCache: it has no gradient; expected a call under torch.no_grad()")
        append_kv(self.k, self.v, key_states.transpose(1, 2), value_states.transpose(1, 2), self.length)
        end = self.length + tokens
        return self.k[:, :end].transpose(1, 2), self.v[:, :end].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.room

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if not -self.length <= tokens_to_remove <= 0:
            got = f"got {tokens_to_remove}"
            raise ValueError(f"twotower BlockCache: expected minus the tokens to remove, {-self.length} to 0, {got}")
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.k, self.v = (x.index_select(0, indices.to(x.device)) for x in (self.k, self.v))
        self.batch_size = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.k, self.v = (x.repeat_interleave(repeats, 0) for x in (self.k, self.v))
        self.batch_size *= repeats

    def offload(self) -> None:
        raise NotImplementedError("twotower BlockCache: offloading is not served")


class BlockCache(Cache):
    """Keys and values for the `past_key_values` of a model of transformers, written in place.

    A step copies its own keys and values and nothing else, where a DynamicCache copies all of them; attention reads
    views of what is in use. Rows share one length: prompts of different lengths are padded on the left.

    Args:
        config: the model's.
        batch_size: B.
        room: tokens that a row can hold; storage of `[B, room, Hkv, D]` twice per layer is allocated at once.
        dtype, device: of the keys and values.

    Raises:
        NotImplementedError: a layer that is not attention. ValueError: in use, more tokens than there is room for.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        room: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1 or room < 1:
            got = f"{batch_size} and {room}"
            raise ValueError(f"twotower BlockCache: expected batch_size and room of at least 1, got {got}")
        config = config.get_text_config(decoder=True)
        kinds, _ = get_layer_types_and_kwargs(config)  # without layers that read another's keys
        if others := set(kinds) - _LAYERS:
            raise NotImplementedError(f"twotower BlockCache: layers of type {', '.join(sorted(others))} are not served")
        layers: list[Any] = []
        for of_layer in config.per_layer_config[: len(kinds)]:
            heads = getattr(of_layer, "num_key_value_heads", None) or of_layer.num_attention_heads
            dim = getattr(of_layer, "head_dim", None) or of_layer.hidden_size // of_layer.num_attention_heads
            layers.append(BlockLayer((batch_size, room, heads, dim), dtype, torch.device(device)))
        super().__init__(layers=layers)

    @property
    def lengths(self) -> Tensor:
        """`[B]`, int64: tokens of each row that are in use, padding included."""
        first: Any = self.layers[0]
        return torch.full((first.batch_size,), first.length, dtype=torch.int64, device=first.device)

    def peek(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As `update`, but the length stays: the next call writes over what this one wrote."""
        layer: Any = self.layers[layer_idx]
        return layer.peek(key_states, value_states)

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """While it lasts, `update` is `peek`: a model's call sees the context and itself and leaves nothing, as a
        denoising step wants it."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.peeking = True
        try:
            yield
        finally:
            for layer in layers:
                layer.peeking = False
