"""Right linear layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.linear import Linear
from tests.testing.right.collection import right


def of_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in the dtype of x."""
    return F.linear(x, weight, bias)


def by_einsum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64, rounded once."""
    y = torch.einsum("...k,rk->...r", x.double(), weight.double())
    return (y if bias is None else y + bias.double()).to(x.dtype)


class SplitOverK(Linear):
    """Four parts of the sum, each in float32, then their sum."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        parts = zip(x.chunk(4, -1), weight.chunk(4, -1), strict=True)
        return torch.stack([super(SplitOverK, self).product(*part) for part in parts]).sum(0)


right("linear", of_pytorch)
right("linear", by_einsum)
for each in (Linear, SplitOverK):
    right("linear", each(), each.__name__)
