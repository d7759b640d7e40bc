"""The layers of a `BlockCache`: keys and values that stay where they are, and recurrent states to be looked at."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from twotower_kernels.integrations.transformers.cache_storage import Pages, Rows
from twotower_kernels.integrations.transformers.stored import Stored


class BlockLayer(CacheLayerMixin):
    """The keys and values of one attention layer.

    Args:
        batch, room: rows, and tokens that a row can hold.
        heads, dim: of keys and values; what an empty layer is given may have others.
        window: of a sliding layer: a call sees the last `window - 1` tokens before it. All are kept.
        page_size: tokens of a page; None: rows.
        grow: whether the room is doubled where it does not suffice.

    Attributes:
        lens: `[B]`, int64, tokens of each row that are in use.
        longest: the same on the host: of every row if they are `even`, else at least as much as the longest has.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        batch: int,
        room: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        window: int | None = None,
        page_size: int | None = None,
        grow: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.window, self.page_size, self.grow, self.first_room = window, page_size, grow, room
        self.is_sliding = window is not None
        self._allocate(batch, heads, (dim, dim))
        self.lens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest, self.even = 0, True
        self.peeking = False
        self.replacing: int | Tensor | None = None  # from which token on `update` is `replace`
        self.is_initialized = True

    def _allocate(self, batch: int, heads: int, dims: tuple[int, int]) -> None:
        place = batch, self.first_room, heads, dims, self.dtype, self.device
        self.storage = Rows(*place) if self.page_size is None else Pages(*place, self.page_size)

    @property
    def batch_size(self) -> int:
        return self.storage.batch

    # --- what a model does ----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The storage is there from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.replacing is not None:
            return self.replace(key_states, value_states, self.replacing)
        found = self.peek(key_states, value_states)
        if not self.peeking:
            self.lens.add_(key_states.shape[2])
            self.longest += key_states.shape[2]
        return found

    def peek(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `[B, Hkv, S, D]` behind the lengths, which stay; everything up to there, `[B, Hkv, T, D]`."""
        tokens = self._check(key_states, value_states)
        self._make_room(tokens)
        self.storage.reserve(self.longest if self.even else 0, self.longest + tokens)
        self.storage.write(key_states, value_states, self.longest if self.even else self.lens)
        return self._seen(tokens)

    def replace(self, key_states: Tensor, value_states: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Writes `[B, Hkv, S, D]` over tokens from `start` on, a number or `[B]`; all that are in use."""
        tokens = self._check(key_states, value_states)
        if self.window is not None and self.longest >= self.window:
            got = f"a window of {self.window} and {self.longest} tokens"
            raise NotImplementedError(f"twotower BlockCache: replace in a sliding layer beyond its window, got {got}")
        if isinstance(start, int) and self.even:
            right: bool | Tensor = 0 <= start <= self.longest - tokens
        else:
            right = ((self.lens - start >= tokens) & (self.lens >= self.lens - start)).all()
        _demand(right, "twotower BlockCache: expected to replace tokens that are in use, got others")
        self.storage.reserve(start if isinstance(start, int) else 0, self.longest)
        self.storage.write(key_states, value_states, start)
        return self._stored(self.longest, self.longest if self.even else self.lens)

    def _check(self, key_states: Tensor, value_states: Tensor) -> int:
        (batch, heads, tokens, dim), value_dim = key_states.shape, value_states.shape[3]
        if batch != self.batch_size:
            raise ValueError(f"twotower BlockCache: expected {self.batch_size} rows, got {batch}")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise NotImplementedError("twotower BlockCache: it has no gradient; expected a call under torch.no_grad()")
        if key_states.dtype != self.dtype and not torch.is_autocast_enabled(self.device.type):
            raise ValueError(f"twotower BlockCache: expected keys in {self.dtype}, got {key_states.dtype}")
        k, v = self.storage.kv
        if (heads, dim, value_dim) != (k.shape[2], k.shape[3], v.shape[3]):
            if self.longest:
                expected, got = (k.shape[2], k.shape[3], v.shape[3]), (heads, dim, value_dim)
                raise ValueError(f"twotower BlockCache: expected heads and widths of {expected}, got {got}")
            self._allocate(batch, heads, (dim, value_dim))
        return tokens

    def _make_room(self, tokens: int) -> None:
        if self.longest + tokens <= self.storage.room:
            return
        self._read_lengths()  # what the host assumed may be too much
        end = self.longest + tokens
        if end <= self.storage.room:
            return
        if not self.grow:
            got = f"{self.longest} tokens and {tokens} more"
            raise ValueError(f"twotower BlockCache: expected at most {self.storage.room} tokens, got {got}")
        self.storage.grow(max(end, 2 * self.storage.room))

    def _read_lengths(self) -> None:
        """What the host knows, from the device."""
        if not self.even:
            lens = self.lens.tolist()
            self.longest, self.even = max(lens), min(lens) == max(lens)

    def _seen(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What a call of so many tokens sees, its own included: of a sliding layer the last, if they lie in a row."""
        end, first = self.longest + tokens, self._left_behind()
        if not self.even or self.storage.table is not None:
            return self._stored(end, end if self.even else self.lens + tokens)
        return self.storage.k[:, first:end].transpose(1, 2), self.storage.v[:, first:end].transpose(1, 2)

    def _stored(self, tokens: int, lens: int | Tensor) -> tuple[Tensor, Tensor]:
        starts: int | Tensor | None = None
        if self.window is not None:
            starts = self._left_behind() if self.even else (self.lens - self.window + 1).clamp(min=0)
        table = self.storage.table
        return Stored(tokens, self.storage.k, table, lens, starts), Stored(tokens, self.storage.v, table, lens, starts)

    def _left_behind(self) -> int:
        """Tokens before the window."""
        return 0 if self.window is None else max(self.longest - self.window + 1, 0)

    # --- what transformers asks -----------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, T, D]`, what is in use, a view, as transformers reads a cache."""
        return self._seen(0)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("twotower BlockCache: keys lie in its storage; expected update, crop or reset")

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, T, Dv]`, a view."""
        return self._seen(0)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("twotower BlockCache: values lie in its storage; expected update, crop or reset")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.replacing is not None:
            return self.longest, 0
        if not self.even and self.longest + query_length > self.storage.room:
            self._read_lengths()  # as the update will
        first = self._left_behind() if self.even and self.storage.table is None else 0
        return self.longest + query_length - first, first

    def get_seq_length(self) -> Any:
        """Tokens in use, where the next one lies: a number, or of one row a tensor `[]` if the host does not know it.

        Raises:
            NotImplementedError: rows of different lengths; a model asks only if it is given no `position_ids`.
        """
        offset = self.offset()
        if isinstance(offset, Tensor):
            if len(offset) > 1:
                raise NotImplementedError(
                    "twotower BlockCache: rows of different lengths, expected a model that is given its position_ids"
                )
            return offset[0, 0]
        return offset

    def offset(self) -> int | Tensor:
        """Where the first query of a call lies: a number, or `[B, 1]`."""
        if self.replacing is not None:
            return self.replacing if isinstance(self.replacing, int) else self.replacing[:, None]
        return self.longest if self.even else self.lens[:, None]

    def get_max_length(self) -> int:
        return -1 if self.grow else self.storage.room

    def reset(self) -> None:
        self.lens.zero_()
        self.longest, self.even = 0, True
        self.storage.release(0)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes tokens at the end: minus their number, of all rows or `[B]`."""
        if isinstance(tokens_to_remove, int) and self.even:
            right: bool | Tensor = -self.longest <= tokens_to_remove <= 0
        else:
            right = ((self.lens + tokens_to_remove >= 0) & (self.lens >= self.lens + tokens_to_remove)).all()
        least = -self.longest if self.even else "minus a row's length"
        expected = f"expected minus the tokens to remove, {least} to 0"
        _demand(right, f"twotower BlockCache: {expected}, got {tokens_to_remove}")
        self.lens.add_(tokens_to_remove)
        if isinstance(tokens_to_remove, int):
            self.longest = max(self.longest + tokens_to_remove, 0)
        else:
            self.even = False
            if not self.lens.is_cuda:
                self._read_lengths()
        if self.even:
            self.storage.release(self.longest)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.storage.select(indices)
        self.lens = self.lens.index_select(0, indices.to(self.lens.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("twotower BlockCache: offloading is not served")


class StateLayer(LinearAttentionLayer):
    """The states of a convolution and a recurrence, as transformers keeps them; a peek computes them and keeps none."""

    peeking = False

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        if not self.peeking:
            return super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        previous = self.conv_states[state_idx]
        if previous is not None and self.has_previous_state[state_idx]:
            return torch.cat([previous, conv_states], dim=-1)
        missing = (conv_kernel_size or 0) - conv_states.shape[-1]
        return torch.nn.functional.pad(conv_states, (max(missing, 0), 0))

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return (
            recurrent_states if self.peeking else super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        raise NotImplementedError("twotower BlockCache: crop of a recurrent layer's states is not served")


class HybridLayer(BlockLayer, StateLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Keys and values, and states beside them."""

    is_croppable = False

    def __init__(self, *place: Any, number_of_states: int = 1, **options: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states)
        BlockLayer.__init__(self, *place, **options)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:  # type: ignore[override]
        if states:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        BlockLayer.reset(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, indices)  # type: ignore[arg-type]
        BlockLayer.batch_select_indices(self, indices)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        StateLayer.crop(self, tokens_to_remove)


def _demand(right: bool | Tensor, text: str) -> None:
    """An error on the host, or where only a GPU knows, a device assertion."""
    if isinstance(right, Tensor) and right.is_cuda:
        torch._assert_async(right, text)
    elif not right:
        raise ValueError(text)
