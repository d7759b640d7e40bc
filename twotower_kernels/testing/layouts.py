"""The same numbers at other places in memory."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "sliced", "reversed, last contiguous", "reversed")


def awkward(tensor: Tensor, kind: int) -> Tensor:
    """The same values, laid out otherwise: 0 as it is; 1 a slice of something larger, with NaN around it, so that
    addresses are unaligned; 2 with its first dimensions stored in reverse order; 3 with every dimension reversed."""
    if kind == 0 or tensor.ndim == 0:
        return tensor
    if kind == 1:
        return sliced(tensor)[1]
    order = list(range(tensor.ndim))
    order = order[::-1] if kind == 3 else [*order[:-1][::-1], order[-1]]
    back = [order.index(d) for d in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


def sliced(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A larger tensor, of NaN or 7, and a slice of it that holds the values."""
    larger = tensor.new_empty([n + 2 for n in tensor.shape])
    larger.fill_(float("nan") if tensor.is_floating_point() else 7 if tensor.dtype != torch.bool else True)
    inner = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
    inner.copy_(tensor)
    return larger, inner


def same_bits(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits, the sign of zero and what kind of NaN it is included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
