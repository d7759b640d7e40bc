"""The masks of transformers as the attention kernels take them: which keys a row sees, not a matrix of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_overlay,
)

# A pattern is a function or a closure over some, and a closure is known by its code, which all of its kind share.
_BOTH = and_masks(causal_mask_function).__code__
_EITHER = or_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__
_BLOCKWISE = blockwise_overlay(torch.empty(0)).__code__

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
    """

    causal: bool
    window: int | None
    starts: Tensor | None
    lens: Tensor | int
    block_lens: Tensor | None
    shape: tuple[int, int, int, int]

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

    Served are causal, sliding causal and bidirectional patterns, with padding on the left, on the right or both.
    Whether the 2-D mask has holes is read from it, a host read per mask on a GPU; in a graph's capture, a device
    assertion.

    Args:
        batch_size, q_length, kv_length: B, queries of the call, keys that the cache will return.
        q_offset, kv_offset: positions of the first query and the first key. `q_offset` may be a tensor `[]`, as static
            caches have it, and is not read by the host.
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
    causal, window = _pattern(mask_function)
    shape = batch_size, 1, q_length, kv_length
    first = q_offset - kv_offset  # the first query's own key, in the row that the cache returns
    end = first + q_length if causal else kv_length
    if attention_mask is None:
        return Mask(causal, window, None, end, None, shape)
    if attention_mask.ndim != 2:
        got = list(attention_mask.shape)
        raise NotImplementedError(f"twotower mask: expected an attention_mask [{batch_size}, n], got {got}")
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    seen = torch.nn.functional.pad(seen, (0, kv_length - seen.shape[1]))
    positions = torch.arange(kv_length, device=seen.device)
    if causal:
        seen = seen & (positions < end)
    lens = (seen * (positions + 1)).amax(1)
    starts = lens - seen.sum(1)
    _refuse_holes(((positions >= starts[:, None]) & (positions < lens[:, None]) & ~seen).any())
    block_lens = (lens - first).clamp(0, q_length) if causal else None
    return Mask(causal, window, starts, lens, block_lens, shape)


def _pattern(function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a pattern is causal, and its window."""
    if function is causal_mask_function:
        return True, None
    if function is bidirectional_mask_function:
        return False, None
    code = getattr(function, "__code__", None)
    parts: tuple[Callable[..., Any], ...] = ()
    if code is _BOTH or code is _EITHER:
        parts = _closed_over(function, "mask_functions")
    codes = [getattr(part, "__code__", None) for part in parts]
    if code is _BOTH and len(parts) == 2 and codes[0] is _SLIDING and parts[1] is causal_mask_function:
        return True, _closed_over(parts[0], "sliding_window")
    if code is _EITHER and len(parts) == 2 and codes[1] is _BLOCKWISE:
        blocks = _closed_over(parts[1], "block_sequence_ids")
        if bool((blocks < 0).all()):  # no token is in a block
            return _pattern(parts[0])
    names = " of ".join([_name(function), ", ".join(map(_name, parts))] if parts else [_name(function)])
    served = "causal_mask_function, bidirectional_mask_function or a sliding causal pattern"
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
