"""Right norms, modulation and residuals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.adaln import AdaLNNorm, GatedResidual, GatedResidualAdaLNNorm, RMSNorm
from tests.testing.right.collection import right


def of_pytorch(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """F.rms_norm, in float32 for 16-bit numbers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps).to(x.dtype)


def of_numpy(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """In float64, row by row."""
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    done = [row / np.sqrt(np.dot(row, row) / len(row) + eps) for row in rows]
    normed = torch.from_numpy(np.array(done).reshape(x.shape))
    return (normed if weight is None else normed * weight.double()).to(x.dtype)


class RootMeanSquareOfHalves(RMSNorm):
    """Squares are summed in two halves, of numbers divided by the largest, so that nothing overflows."""

    def mean_square(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        squares = (x / largest).square()
        middle = x.shape[-1] // 2
        total = squares[..., :middle].sum(-1, keepdim=True) + squares[..., middle:].sum(-1, keepdim=True)
        return total / x.shape[-1] * largest.square()


def of_slices(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float,
    order: str = "modulate_norm",
) -> Tensor:
    """`adaln_norm` token by token, in place in a copy."""
    out, norm = x.clone(), AdaLNNorm()
    for row in range(len(x)):
        vectors = (None if vector is None else vector[row : row + 1] for vector in (shift, scale))
        given = tuple(vectors)
        for token in range(x.shape[1]):
            part = out[row : row + 1, token : token + 1]
            part.copy_(norm(part.clone(), weight, *given, eps=eps, order=order))
    return out


def by_addcmul(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """`gated_residual` where nothing rounds twice, else as it is defined."""
    if gate is None:
        return torch.add(residual, y)
    if y.dtype in (torch.float32, torch.float64) and residual.dtype == y.dtype:
        return torch.addcmul(residual, gate[:, None], y)
    return residual + gate[:, None] * y


right("rms_norm", of_pytorch)
right("rms_norm", of_numpy)
right("adaln_norm", of_slices)
right("gated_residual", by_addcmul)
CLASSES: dict[str, list[type]] = {
    "rms_norm": [RMSNorm, RootMeanSquareOfHalves],
    "adaln_norm": [AdaLNNorm],
    "gated_residual": [GatedResidual],
    "gated_residual_adaln_norm": [GatedResidualAdaLNNorm],
}
for op, classes in CLASSES.items():
    for each in classes:
        right(op, each(), each.__name__)
