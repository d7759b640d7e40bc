"""A cache of transformers whose keys and values stay where they are: appended to in place, never concatenated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, get_layer_types_and_kwargs

from twotower_kernels.integrations.transformers.cache_layers import BlockLayer, HybridLayer, StateLayer

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_STATES = {"linear_attention", "conv"}
_BOTH = {"hybrid", "hybrid_sliding"}


class BlockCache(Cache):
    """Keys and values for the `past_key_values` of a model of transformers, written in place.

    A step copies its own keys and values and nothing else, where a DynamicCache copies all of them; attention reads
    views of what is in use. Rows begin with one length, prompts of different lengths being padded on the left; `crop`
    may give each row one of its own. With these, with pages and while `replacing`, attn_implementation="twotower" alone
    reads the keys, in place too, and any other is refused.

    Lengths are counted on the device; the host knows them as long as it is told numbers. `update`, `peek`, `replace`
    and `crop` do not wait for the device, but where more than the room may be in use.

    Recurrent layers keep their states as transformers does, and can be peeked at; layers that keep nothing are passed
    over.

    Args:
        config: the model's.
        batch_size: B.
        room: tokens that a row can hold; storage of `[B, room, Hkv, D]` twice per layer is allocated at once.
        dtype, device: of the keys and values.
        grow: where there is no room, it is doubled, which copies all keys once; else it is an error.
        page_size: tokens of a page; None: no pages. With them a layer has `[P, page_size, Hkv, D]`, to grow copies
            nothing until pages are out, and rows that are selected or repeated share pages until they write to them.

    Raises:
        NotImplementedError: a layer that is neither attention nor recurrent. ValueError: in use, more tokens than there
            is room for.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        room: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        grow: bool = False,
        page_size: int | None = None,
    ) -> None:
        if batch_size < 1 or room < 1:
            got = f"{batch_size} and {room}"
            raise ValueError(f"twotower BlockCache: expected batch_size and room of at least 1, got {got}")
        if page_size is not None and page_size < 1:
            raise ValueError(f"twotower BlockCache: expected None or a page_size of at least 1, got {page_size}")
        config = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(config)
        if others := set(kinds) - _ATTENTION - _STATES - _BOTH - {"dummy"}:
            raise NotImplementedError(f"twotower BlockCache: layers of type {', '.join(sorted(others))} are not served")
        layers: list[Any] = []
        for kind, of_kind, of_layer in zip(kinds, options, config.per_layer_config, strict=False):
            if kind in _STATES:
                layers.append(StateLayer(**of_kind))
            elif kind == "dummy":
                layers.append(DummyLayer())
            else:
                heads = getattr(of_layer, "num_key_value_heads", None) or getattr(of_layer, "num_attention_heads", None)
                if not heads:
                    name = type(config).__name__
                    raise NotImplementedError(f"twotower BlockCache: {name} is that of a model without attention heads")
                dim = getattr(of_layer, "head_dim", None) or of_layer.hidden_size // of_layer.num_attention_heads
                place = batch_size, room, heads, dim, dtype, torch.device(device)
                of_kind["window"] = of_kind.pop("sliding_window", None)
                layer = HybridLayer if kind in _BOTH else BlockLayer
                layers.append(layer(*place, **of_kind, page_size=page_size, grow=grow))
        super().__init__(layers=layers)

    @property
    def _attention(self) -> list[BlockLayer]:
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]

    @property
    def lengths(self) -> Tensor:
        """`[B]`, int64: tokens of each row that are in use, padding included."""
        return self._attention[0].lens.clone()

    def peek(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As `update`, but the length stays: the next call writes over what this one wrote."""
        layer: Any = self.layers[layer_idx]
        return layer.peek(key_states, value_states)

    def replace(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, start: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes over tokens that are in use, as a dual cache does (Fast-dLLM, arXiv 2505.22618, section 3.2).

        Args:
            key_states, value_states: `[B, Hkv, S, D]`.
            start: the first token that is written over, a number or integers `[B]` on the device.

        Returns:
            All that are in use, for `attention`.
        """
        layer: Any = self.layers[layer_idx]
        return layer.replace(key_states, value_states, start)

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """While it lasts, `update` is `peek`: a model's call sees the context and itself and leaves nothing, as a
        denoising step wants it."""
        layers: list[Any] = [layer for layer in self.layers if isinstance(layer, BlockLayer | StateLayer)]
        for layer in layers:
            layer.peeking = True
        try:
            yield
        finally:
            for layer in layers:
                layer.peeking = False

    @contextmanager
    def replacing(self, start: int | Tensor) -> Iterator[None]:
        """While it lasts, `update` is `replace` from token `start` on, a number or integers `[B]` on the device: a
        model's call writes over its own keys and sees all that its mask lets it see.

        Raises:
            NotImplementedError: the model has recurrent layers.
        """
        if any(isinstance(layer, StateLayer) for layer in self.layers):
            raise NotImplementedError("twotower BlockCache: replacing the tokens of recurrent layers is not served")
        for layer in self._attention:
            layer.replacing = start
        try:
            yield
        finally:
            for layer in self._attention:
                layer.replacing = None

    # --- what transformers asks -----------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes tokens at the end.

        Args:
            tokens_to_remove: minus their number, at most 0; or integers `[B]` on the device, after which rows may have
                lengths of their own.

        Raises:
            ValueError: more than there are; where only a GPU knows, a device assertion. NotImplementedError: recurrent
                layers.
        """
        if any(isinstance(layer, StateLayer) for layer in self.layers):
            raise NotImplementedError("twotower BlockCache: crop of a recurrent layer's states is not served")
        for layer in self._attention:
            layer.crop(tokens_to_remove)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        layer = self.layers[layer_idx]
        layer = layer if isinstance(layer, BlockLayer) else self._attention[0]
        offset = layer.offset()
        return offset[0, 0] if isinstance(offset, Tensor) and len(offset) == 1 else offset

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state(layer_idx, super().get_conv_state(layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state(layer_idx, super().get_recurrent_state(layer_idx, state_idx))

    def _state(self, layer_idx: int, state: Tensor | None) -> Tensor | None:
        """While peeking a copy: models of one token write to the states themselves."""
        layer: Any = self.layers[layer_idx]
        return state.clone() if state is not None and layer.peeking else state
