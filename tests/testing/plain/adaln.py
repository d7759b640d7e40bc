"""Norms, modulation and gated residuals as short programs whose steps are methods."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class RMSNorm:
    """`rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor | None = None, *, eps: float, round_first: bool = False) -> Tensor:
        normed = self.normed(x.to(wide(x)), eps)
        if round_first:
            normed = self.rounded_first(normed, x.dtype)
        return (normed if weight is None else normed * self.factor(weight.to(wide(x)))).to(x.dtype)

    def normed(self, x: Tensor, eps: float) -> Tensor:
        return x * self.inverse_root(self.mean_square(x), eps)

    def mean_square(self, x: Tensor) -> Tensor:
        return (x * x).mean(-1, keepdim=True)

    def inverse_root(self, mean_square: Tensor, eps: float) -> Tensor:
        return 1 / (mean_square + eps).sqrt()

    def rounded_first(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        return normed.to(dtype).to(normed.dtype)

    def factor(self, weight: Tensor) -> Tensor:
        return weight


class AdaLNNorm:
    """`adaln_norm`."""

    norm = RMSNorm()

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        eps: float,
        order: str = "modulate_norm",
    ) -> Tensor:
        if shift is None or scale is None:
            return self.norm(x, weight, eps=eps)
        shift, scale = self.vector(shift, x), self.vector(scale, x)
        if self.norm_comes_last(order):
            return self.norm(self.modulated(x, shift, scale), weight, eps=eps)
        return self.modulated(self.norm(x, weight, eps=eps), shift, scale)

    def vector(self, vector: Tensor, x: Tensor) -> Tensor:
        """[B, H] to [B, 1, H]."""
        return vector[:, None].to(x.dtype)

    def norm_comes_last(self, order: str) -> bool:
        return order == "modulate_norm"

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + scale) + shift


class GatedResidual:
    """`gated_residual`."""

    def __call__(self, residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.added(residual, y if gate is None else y * self.vector(gate, y))

    def vector(self, gate: Tensor, y: Tensor) -> Tensor:
        return gate[:, None].to(y.dtype)

    def added(self, residual: Tensor, y: Tensor) -> Tensor:
        return residual + y


class GatedResidualAdaLNNorm:
    """`gated_residual_adaln_norm`."""

    residual, norm = GatedResidual(), AdaLNNorm()

    def __call__(
        self,
        residual: Tensor,
        y: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        *,
        eps: float,
        order: str = "modulate_norm",
    ) -> tuple[Tensor, Tensor]:
        h = self.residual(residual, y, gate)
        return h, self.norm(self.read(residual, h), weight, shift, scale, eps=eps, order=order)

    def read(self, residual: Tensor, h: Tensor) -> Tensor:
        """What is normalised."""
        return h
