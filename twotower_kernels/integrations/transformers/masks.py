"""The masks of transformers as the attention kernels take them: which keys a row sees, not a matrix of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from twotower_kernels.integrations.transformers.mask_pieces import Pieces, of_chunks, of_sequences

# A pattern is a function or a closure over some, and a closure is known by its code, which all of its kind share.
_BOTH = and_masks(causal_mask_function).__code__
_EITHER = or_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__
_BOTH_SIDES = sliding_window_bidirectional_overlay(1).__code__
_CHUNKED = chunked_overlay(1, torch.empty(0)).__code__
_BLOCKWISE = blockwise_overlay(torch.empty(0)).__code__
_PACKED = packed_sequence_mask_function(torch.empty(0)).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, torch.empty(0)).__code__

# What transformers says beyond the pattern: how other implementations may build or leave out their matrix.
_HARMLESS = {
    "allow_is_bidirectional_skip",
    "allow_is_causal_skip",
    "config",
    "device",
    "dtype",
    "local_size",  # said again by the pattern
    "use_vmap",
}


_OF_TENSORS = {name for name in dir(Tensor) if not name.startswith("_")}


class NotATensor(NotImplementedError, AttributeError):
    """A model computes with its mask. An AttributeError, too, for those who only ask what it has."""

    def __init__(self, name: str) -> None:
        super().__init__(f"twotower mask: expected a model that hands its mask on, got one that asks for its {name}")


@dataclass(frozen=True, eq=False)
class Mask:
    """What the queries of a call see of the keys that a cache returned, those of the call itself included.

    Attributes:
        causal: the last `block_lens` of a row's `lens` keys are the queries' own, and each query sees those up to it.
        window: with `causal`, the last keys that a query sees, its own included; None: all.
        starts, lens: `[B]`, where in the cache's rows the keys begin and end that are seen at all; None: they begin at
            0. Without padding, lens is a number or a tensor `[]`.
        block_lens: `[B]`, queries of each row that are no padding on the right; the others get 0. None: all.
        shape: of the matrix that it stands for, `[B, 1, queries, keys]`.
        pieces: chunks or packed sequences of each row, which see nothing of each other; they have starts, lens and
            block_lens of their own.
        both_sides: not causal: the keys that a query sees before its own, and behind it.
    """

    causal: bool
    window: int | None
    starts: Tensor | None
    lens: Tensor | int
    block_lens: Tensor | None
    shape: tuple[int, int, int, int]
    pieces: Pieces | None = None
    both_sides: int | None = None

    @property
    def ndim(self) -> int:
        """As many as a prepared mask has, by which transformers knows one."""
        return 4

    def contiguous(self) -> "Mask":
        """Itself: `generate` asks every prepared mask for it."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _OF_TENSORS:
            raise NotATensor(name)
        raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        raise NotATensor("elements")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotATensor(getattr(function, "__name__", repr(function)))


@dataclass(frozen=True)
class _Pattern:
    """What a pattern of transformers says; `chunk` keys, counted from `begins` on, or the number of each `sequence`."""

    causal: bool = True
    window: int | None = None
    both_sides: int | None = None
    chunk: int | None = None
    begins: Tensor | None = None
    sequences: Tensor | None = None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    **options: Any,
) -> Mask:
    """A mask for `attention`, as `AttentionMaskInterface` asks for it.

    Served are causal, sliding causal, chunked causal and bidirectional patterns, with padding on the left, on the right
    or both; sliding bidirectional ones of all queries at once; and packed sequences. Whether the 2-D mask has holes is
    read from it, a host read per mask on a GPU; in a graph's capture, a device assertion. How many sequences are packed
    is read, too.

    Args:
        batch_size, q_length, kv_length: B, queries of the call, keys that the cache will return.
        q_offset, kv_offset: positions of the first query and the first key. `q_offset` may be a tensor `[]`, as static
            caches have it, or `[B, 1]`, as a `BlockCache` of rows of different lengths has it, and is not read by the
            host.
        mask_function: the pattern.
        attention_mask: `[B, n]`, by positions from 0 on; what lies beyond n is not seen. A `Mask` is returned as it is.

    Raises:
        NotImplementedError: another pattern, a mask of other dimensions, a 2-D mask with holes, unknown options.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    for name, value in options.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise NotImplementedError(f"twotower mask: {name} is not served, got {value!r}")
    pattern = _pattern(mask_function)
    shape = batch_size, 1, q_length, kv_length
    first = q_offset - kv_offset  # the first query's own key, in the row that the cache returns
    if isinstance(first, Tensor) and first.ndim:
        first = first[:, 0]
    if pattern.both_sides is not None and not (isinstance(first, int) and first == 0 and q_length == kv_length):
        got = f"{q_length} queries of {kv_length} keys from {first} on"
        raise NotImplementedError(f"twotower mask: expected a sliding bidirectional pattern of all keys, got {got}")
    plain = _of_rows(pattern, first, kv_offset, attention_mask, shape)
    if pattern.sequences is not None:
        if attention_mask is not None:
            raise NotImplementedError("twotower mask: packed sequences with an attention_mask are not served")
        return replace(plain, pieces=of_sequences(pattern.sequences))
    if pattern.chunk is None or pattern.begins is None:
        return plain
    if isinstance(q_offset, int) and q_offset + q_length <= pattern.chunk:
        return plain  # all in the first chunk, also of rows that begin later
    return _of_chunks(plain, pattern.chunk, pattern.begins - kv_offset, first)


def _of_rows(
    pattern: _Pattern, first: int | Tensor, kv_offset: int, attention_mask: Tensor | None, shape: tuple[int, ...]
) -> Mask:
    """What is seen but for chunks and sequences: up to its own key, and no padding."""
    batch_size, _, q_length, kv_length = shape
    whole = batch_size, 1, q_length, kv_length
    causal, window = pattern.causal, pattern.window
    end = first + q_length if causal else kv_length
    if attention_mask is None:
        return Mask(causal, window, None, end, None, whole, both_sides=pattern.both_sides)
    if attention_mask.ndim != 2:
        got = list(attention_mask.shape)
        raise NotImplementedError(f"twotower mask: expected an attention_mask [{batch_size}, n], got {got}")
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    seen = torch.nn.functional.pad(seen, (0, kv_length - seen.shape[1]))
    positions = torch.arange(kv_length, device=seen.device)
    if causal:
        seen = seen & (positions < (end[:, None] if isinstance(end, Tensor) and end.ndim else end))
    lens = (seen * (positions + 1)).amax(1)
    starts = lens - seen.sum(1)
    _refuse_holes(((positions >= starts[:, None]) & (positions < lens[:, None]) & ~seen).any())
    block_lens = (lens - first).clamp(0, q_length) if causal else None
    return Mask(causal, window, starts, lens, block_lens, whole, both_sides=pattern.both_sides)


def _of_chunks(plain: Mask, size: int, begins: Tensor, first: int | Tensor) -> Mask:
    """A causal mask whose queries see nothing before their own chunk."""
    batch, _, queries, _ = plain.shape
    own = torch.as_tensor(first, device=begins.device).expand(batch)
    if queries == 1:
        begin = begins + size * (own - begins).div(size, rounding_mode="floor")
        starts = begin.clamp(min=0) if plain.starts is None else torch.maximum(begin, plain.starts)
        return replace(plain, starts=torch.minimum(starts, own + 1))
    starts = torch.zeros_like(begins) if plain.starts is None else plain.starts
    lens = torch.as_tensor(plain.lens, device=begins.device).expand(batch)
    return replace(plain, pieces=of_chunks(size, begins, own, starts, lens, queries))


def _pattern(function: Callable[..., Any]) -> _Pattern:
    """What a pattern says, if it is one of those that are served."""
    if function is causal_mask_function:
        return _Pattern()
    if function is bidirectional_mask_function:
        return _Pattern(causal=False)
    code = getattr(function, "__code__", None)
    parts: tuple[Callable[..., Any], ...] = ()
    if code is _BOTH or code is _EITHER:
        parts = _closed_over(function, "mask_functions")
    codes = [getattr(part, "__code__", None) for part in parts]
    if code is _BOTH and len(parts) == 2:
        overlay, rest = parts
        if codes[0] is _SLIDING and rest is causal_mask_function:
            return _Pattern(window=_closed_over(overlay, "sliding_window"))
        if codes[0] is _BOTH_SIDES and rest is bidirectional_mask_function:
            return _Pattern(causal=False, both_sides=_closed_over(overlay, "sliding_window"))
        if codes[0] is _CHUNKED and rest is causal_mask_function:
            return _Pattern(chunk=_closed_over(overlay, "chunk_size"), begins=_closed_over(overlay, "left_padding"))
        if codes[0] is _PACKED and codes[1] is _REMAPPED:  # positions differ by 1 from token to token of a sequence
            inner = _pattern(_closed_over(rest, "mask_function"))
            if inner.chunk is None and inner.both_sides is None:
                return replace(inner, sequences=_closed_over(overlay, "packed_sequence_mask"))
    if code is _EITHER and len(parts) == 2 and codes[1] is _BLOCKWISE:
        blocks = _closed_over(parts[1], "block_sequence_ids")
        if bool((blocks < 0).all()):  # no token is in a block
            return _pattern(parts[0])
    names = " of ".join([_name(function), ", ".join(map(_name, parts))] if parts else [_name(function)])
    served = "causal_mask_function, bidirectional_mask_function or a sliding, chunked or packed pattern"
    raise NotImplementedError(f"twotower mask: expected {served}, got {names}")


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function)).split(".")[0]


def _refuse_holes(holes: Tensor) -> None:
    text = "twotower mask: expected an attention_mask with padding at the ends of rows only, got one with holes"
    if torch.compiler.is_compiling() or (holes.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(~holes, text)
    elif holes:
        raise NotImplementedError(text)
