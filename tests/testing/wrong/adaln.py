"""Wrong norms, modulation and residuals."""

from __future__ import annotations

import torch
from torch import Tensor

import twotower_kernels as tt
from tests.testing.plain.adaln import AdaLNNorm, GatedResidual, GatedResidualAdaLNNorm, RMSNorm
from tests.testing.wrong.collection import wrong

# --- rms_norm ---------------------------------------------------------------------------------------------------------


@wrong("rms_norm", "numbers")
class EpsOutsideOfTheRoot(RMSNorm):
    """eps is added to the root, not under it."""

    def inverse_root(self, mean_square: Tensor, eps: float) -> Tensor:
        return 1 / (mean_square.sqrt() + eps)


@wrong("rms_norm", "numbers")
class EpsForgotten(RMSNorm):
    """A row of zeros becomes NaN."""

    def inverse_root(self, mean_square: Tensor, eps: float) -> Tensor:
        return 1 / mean_square.sqrt()


@wrong("rms_norm", "numbers")
class MeanIsSubtracted(RMSNorm):
    """It is a LayerNorm."""

    def normed(self, x: Tensor, eps: float) -> Tensor:
        return super().normed(x - x.mean(-1, keepdim=True), eps)


@wrong("rms_norm", "numbers")
class MeanOfThePaddedRow(RMSNorm):
    """The sum of squares is divided by the row's length rounded up to a multiple of 16."""

    def mean_square(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        return super().mean_square(x) * (length / (-(-length // 16) * 16))


@wrong("rms_norm", "numbers")
class SquaresInTheInputsDtype(RMSNorm):
    """The sum of squares is that of 16-bit numbers, and overflows in float16."""

    def __call__(self, x: Tensor, weight: Tensor | None = None, *, eps: float, round_first: bool = False) -> Tensor:
        self.dtype = x.dtype
        return super().__call__(x, weight, eps=eps, round_first=round_first)

    def mean_square(self, x: Tensor) -> Tensor:
        return (x.to(self.dtype) ** 2).sum(-1, keepdim=True).to(x.dtype) / x.shape[-1]


@wrong("rms_norm", "numbers")
class TailIsNotSummed(RMSNorm):
    """The squares of what fills no vector of 8 are left out."""

    def mean_square(self, x: Tensor) -> Tensor:
        whole = x.shape[-1] // 8 * 8 or x.shape[-1]
        return (x * x)[..., :whole].sum(-1, keepdim=True) / x.shape[-1]


@wrong("rms_norm", "numbers")
class WeightPlusOne(RMSNorm):
    """Weights are taken to be stored less 1, as Gemma's are."""

    def factor(self, weight: Tensor) -> Tensor:
        return 1 + weight


@wrong("rms_norm", "numbers")
class RoundedAfterTheWeight(RMSNorm):
    """`round_first` changes nothing: the weight multiplies what is not yet rounded."""

    def rounded_first(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        return normed


@wrong("rms_norm", "numbers")
class NormThroughBfloat16(RMSNorm):
    """What is normalised is rounded to bfloat16, whatever its dtype."""

    def normed(self, x: Tensor, eps: float) -> Tensor:
        return super().normed(x, eps).bfloat16().to(x.dtype)


# --- adaln_norm -------------------------------------------------------------------------------------------------------


@wrong("adaln_norm", "numbers")
class ShiftAndScaleSwapped(AdaLNNorm):
    """The two vectors are taken for each other."""

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return super().modulated(x, scale, shift)


@wrong("adaln_norm", "numbers")
class ScaleWithoutOne(AdaLNNorm):
    """What is multiplied is scale, not 1 + scale."""

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * scale + shift


@wrong("adaln_norm", "numbers")
class ShiftIsScaled(AdaLNNorm):
    """The shift comes before the scale."""

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (x + shift) * (1 + scale)


@wrong("adaln_norm", "numbers")
class OrderIgnored(AdaLNNorm):
    """The norm always comes first."""

    def norm_comes_last(self, order: str) -> bool:
        return False


@wrong("adaln_norm", "numbers")
class VectorsOfRow0(AdaLNNorm):
    """All sequences are modulated as the first one is."""

    def vector(self, vector: Tensor, x: Tensor) -> Tensor:
        return super().vector(vector, x)[:1].expand(len(x), -1, -1)


# --- gated_residual ---------------------------------------------------------------------------------------------------


@wrong("gated_residual", "numbers")
class GateOfRow0(GatedResidual):
    """All sequences have the gate of the first one."""

    def vector(self, gate: Tensor, y: Tensor) -> Tensor:
        return super().vector(gate, y)[:1].expand(len(y), -1, -1)


@wrong("gated_residual", "numbers")
class GateThroughASigmoid(GatedResidual):
    """The gate is squashed."""

    def vector(self, gate: Tensor, y: Tensor) -> Tensor:
        return super().vector(gate, y).sigmoid()


@wrong("gated_residual", "numbers")
class ResidualIsGated(GatedResidual):
    """The gate multiplies both."""

    def __call__(self, residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.added(residual, y) if gate is None else self.added(residual, y) * self.vector(gate, y)


@wrong("gated_residual", "untouched")
def adds_in_place(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """The caller's residual is the result."""
    return residual.copy_(tt.gated_residual(residual, y, gate))


# --- both -------------------------------------------------------------------------------------------------------------


@wrong("gated_residual_adaln_norm", "numbers")
class NormOfTheOldResidual(GatedResidualAdaLNNorm):
    """What is normalised is the residual before y was added."""

    def read(self, residual: Tensor, h: Tensor) -> Tensor:
        return residual


@wrong("gated_residual_adaln_norm", "numbers")
class ScaleWithoutOneFused(GatedResidualAdaLNNorm):
    """As ScaleWithoutOne, in the fused op."""

    norm = ScaleWithoutOne()


@wrong("gated_residual_adaln_norm", "numbers")
def results_in_the_other_order(
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
    """What is normalised comes first."""
    h, normed = tt.gated_residual_adaln_norm(residual, y, gate, weight, shift, scale, eps=eps, order=order)
    return normed, h
