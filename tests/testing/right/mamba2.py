"""Right scans and gated norms: token by token, and in chunks of several sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.mamba2 import GatedRMSNorm, Scan
from tests.testing.right.collection import right


class Chunked(Scan):
    """The closed form of state-space duality (arXiv 2405.21060, section 6) in chunks of `size` tokens; a decay
    is the sum of what lies between two tokens, added up anew."""

    def __init__(self, size: int) -> None:
        self.size = size

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ys = [x[:0]]
        for t in range(0, len(x), self.size):
            part = slice(t, t + self.size)
            y, state = self.chunk(x[part] * delta[part, :, None], b[part], c[part], delta[part] * a, state)
            ys.append(y)
        return torch.cat(ys), state

    def chunk(self, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        length = len(x)
        after = torch.ones(length, length, dtype=torch.bool).tril(-1)
        between = log_decay[:, None].expand(-1, length, -1).masked_fill(~after[..., None], 0).cumsum(0)  # [t, u, heads]
        past = torch.ones(length, length, dtype=torch.bool).tril()[..., None]
        decay = between.masked_fill(~past, -torch.inf).exp()
        scores = torch.einsum("thn,uhn->tuh", c, b) * decay
        y = torch.einsum("tuh,uhp->thp", scores, x)
        since = log_decay.cumsum(0).exp()  # [t, heads]
        y = y + torch.einsum("thn,hpn,th->thp", c, state, since)
        return y, since[-1, :, None, None] * state + torch.einsum("uh,uhp,uhn->hpn", decay[-1], x, b)


class DoubleScan(Scan):
    """The state in float64, the convolution by F.conv1d."""

    def convolved(self, columns: Tensor, kernel: Tensor) -> Tensor:
        if columns.shape[1] < kernel.shape[1]:
            return super().convolved(columns, kernel)
        return F.conv1d(columns[None].to(kernel.dtype), kernel[:, None], groups=len(columns))[0]

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = (m.double() for m in (x, b, c, delta, a, state))
        y, last = super().scan(*wide, dtype)
        return y.to(x.dtype), last.to(state.dtype)


class NormOfEachGroup(GatedRMSNorm):
    """Group after group, by F.rms_norm."""

    def normed(self, x: Tensor, n_groups: int, eps: float) -> Tensor:
        return torch.cat([F.rms_norm(part, part.shape[-1:], eps=eps) for part in x.chunk(n_groups, -1)], -1)


right("mamba2_scan", Scan(), "Scan")
right("mamba2_scan", DoubleScan(), "DoubleScan")
for size in (1, 5, 64):
    right("mamba2_scan", Chunked(size), f"Chunked{size}")
for each in (GatedRMSNorm, NormOfEachGroup):
    right("gated_rms_norm", each(), each.__name__)
