"""Wrong linear layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.linear import Linear
from tests.testing.wrong.attention import truncated
from tests.testing.wrong.collection import wrong


@wrong("linear", "numbers")
class SumsInTheInputsDtype(Linear):
    """Products are added one by one in the dtype of x."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        total = torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
        for k in range(x.shape[-1]):
            total = total + x[..., k, None] * weight[:, k]
        return total if bias is None else total + bias


@wrong("linear", "numbers")
class LinearInTF32(Linear):
    """The factors lose 13 bits."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().product(truncated(x), truncated(weight))


@wrong("linear", "numbers")
class ProductTailDropped(Linear):
    """Columns that fill no vector of 8 are left out."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        whole = x.shape[-1] // 8 * 8 or x.shape[-1]
        return super().product(x[..., :whole], weight[:, :whole])


@wrong("linear", "numbers")
class BiasForgotten(Linear):
    """There is no bias."""

    def biased(self, y: Tensor, bias: Tensor) -> Tensor:
        return y


@wrong("linear", "numbers")
class RoundedBeforeTheBias(Linear):
    """The product is rounded, then the bias added: where they cancel, the rounding is what is left."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().__call__(x, weight)
        return y if bias is None else y + bias


@wrong("linear", "numbers")
class SquareWeightTransposed(Linear):
    """A square weight is taken for its transpose."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().product(x, weight.T if weight.shape[0] == weight.shape[1] else weight)


@wrong("linear", "runs")
def linear_of_matrices(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Activations are taken to be a matrix."""
    rows, _ = x.shape
    return F.linear(x, weight, bias).reshape(rows, len(weight))


@wrong("linear", "numbers")
class LinearThroughBfloat16(Linear):
    """The result is rounded to bfloat16, whatever its dtype."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().__call__(x, weight, bias).bfloat16().to(x.dtype)
