"""The linear layer as a short program whose steps are methods."""

from __future__ import annotations

from torch import Tensor

from tests.testing.plain.adaln import wide


class Linear:
    """`linear`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.product(x.to(wide(x)), weight.to(wide(x)))
        return (y if bias is None else self.biased(y, bias)).to(x.dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    def biased(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias.to(y.dtype)
