"""Wrong scans and wrong gated norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.mamba2 import GatedRMSNorm, Scan
from tests.testing.wrong.adaln import EpsOutsideOfTheRoot
from tests.testing.wrong.collection import wrong

# --- states -----------------------------------------------------------------------------------------------------------


@wrong("mamba2_scan", "numbers")
class StateRoundedToBfloat16(Scan):
    """The state passes through bfloat16 after every token."""

    def stored(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return state.bfloat16().to(state.dtype)


@wrong("mamba2_scan", "numbers")
class StateInTheInputsDtype(Scan):
    """The state has the dtype of the activations."""

    def stored(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return state.to(dtype).to(state.dtype)


@wrong("mamba2_scan", "numbers")
class FirstStateIgnored(Scan):
    """The scan begins with nothing."""

    def first_state(self, ssm_state: Tensor) -> Tensor:
        return torch.zeros_like(ssm_state)


@wrong("mamba2_scan", "numbers")
class FirstInputsBackwards(Scan):
    """The inputs before the block are taken newest first."""

    def first_inputs(self, conv_state: Tensor) -> Tensor:
        return conv_state.flip(1)


@wrong("mamba2_scan", "numbers")
class ConvStateShifted(Scan):
    """The inputs that are kept end one token early."""

    def last_inputs(self, columns: Tensor, real: int, width: int) -> Tensor:
        return super().last_inputs(columns, max(0, real - 1), width)


@wrong("mamba2_scan", "numbers")
class StateIndexIgnored(Scan):
    """Row b begins with state b, whatever the index says."""

    def state_row(self, index: Tensor | None, row: int) -> int:
        return row if index is None else min(row, int(index.max()))


@wrong("mamba2_scan", "numbers")
class LengthIgnoredInTheState(Scan):
    """The state is that after the padding."""

    def end(self, real: int, length: int) -> int:
        return length


@wrong("mamba2_scan", "numbers")
class PaddingHasResults(Scan):
    """Behind a row's length y is that of its last token."""

    def __call__(self, *given: Any, seq_lens: Tensor | None = None, **options: Any) -> Any:
        result = super().__call__(*given, seq_lens=seq_lens, **options)
        y = result[0] if isinstance(result, tuple) else result
        for row, real in enumerate([] if seq_lens is None else seq_lens.tolist()):
            if real:
                y[row, real:] = y[row, real - 1]
        return result


# --- convolution ------------------------------------------------------------------------------------------------------


@wrong("mamba2_scan", "numbers")
class KernelBackwards(Scan):
    """The convolution is one in the mathematical sense: the kernel's last weight meets the oldest input."""

    def convolved(self, columns: Tensor, kernel: Tensor) -> Tensor:
        return super().convolved(columns, kernel.flip(1))


@wrong("mamba2_scan", "numbers")
class BiasBehindTheActivation(Scan):
    """The convolution's bias is added after SiLU."""

    def activated(self, u: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return F.silu(u.to(dtype)) if bias is None else F.silu(u.to(dtype)) + bias[:, None].to(dtype)


@wrong("mamba2_scan", "numbers")
class NoActivation(Scan):
    """SiLU is forgotten."""

    def activated(self, u: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (u if bias is None else u + bias[:, None]).to(dtype)


# --- the scan ---------------------------------------------------------------------------------------------------------


@wrong("mamba2_scan", "numbers")
class WrongGroupOfScanHeads(Scan):
    """Heads take groups in turn."""

    def group_of(self, heads: int, n_groups: int) -> Tensor:
        return torch.arange(heads) % n_groups


@wrong("mamba2_scan", "numbers")
class ClampForgotten(Scan):
    """Δ has no limits."""

    def delta(self, dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
        return super().delta(dt, bias, (0.0, float("inf")))


@wrong("mamba2_scan", "numbers")
class ClampBeforeSoftplus(Scan):
    """The limits are those of dt + bias."""

    def delta(self, dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
        return F.softplus((dt + bias).clamp(*limit)) if limit[0] > 0 else super().delta(dt, bias, limit)


@wrong("mamba2_scan", "numbers")
class SoftplusWithoutBias(Scan):
    """dt's bias is added after softplus."""

    def delta(self, dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
        return (F.softplus(dt) + bias).clamp(*limit)


@wrong("mamba2_scan", "numbers")
class SoftplusOverflows(Scan):
    """log(1 + exp(x)), as it is written."""

    def delta(self, dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
        return (1 + (dt + bias).exp()).log().clamp(*limit)


@wrong("mamba2_scan", "numbers")
class DecayByDifferences(Scan):
    """The decay between two tokens is exp of a difference of running sums, in which a small step is lost."""

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x, state
        total = (delta * a).cumsum(0)  # [m, heads]
        decay = (total[:, None] - total).exp().masked_fill(~self.past(len(x), x.device), 0)  # [t, u, heads]
        pushed = torch.einsum("uh,uhp,uhn->uhpn", delta, x, b)
        states = torch.einsum("tuh,uhpn->thpn", decay, pushed) + total.exp()[..., None, None] * state
        return torch.einsum("thpn,thn->thp", states, c), states[-1]

    def past(self, length: int, device: torch.device) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()[..., None]


@wrong("mamba2_scan", "numbers")
class OutputBeforeTheInput(Scan):
    """y is read from the state before its token has entered it."""

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        late = torch.cat([c[1:], torch.zeros_like(c[:1])])
        y, last = super().scan(x, b, late, delta, a, state, dtype)
        first = (state * c[:1].transpose(0, 1)).sum(2)[None]
        return torch.cat([first, y[:-1]]) if len(x) else y, last


@wrong("mamba2_scan", "numbers")
class ChunkBeginsWithNothing(Scan):
    """The state is not handed from one chunk of 16 tokens to the next."""

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ys = [x[:0]]
        for t in range(0, len(x), 16):
            part = (m[t : t + 16] for m in (x, b, c, delta))
            y, state = super().scan(*part, a, state if t == 0 else torch.zeros_like(state), dtype)
            ys.append(y)
        return torch.cat(ys), state


@wrong("mamba2_scan", "numbers")
class SkipForgotten(Scan):
    """D·x is left out."""

    def output(self, scanned: Tensor, skipped: Tensor, dtype: torch.dtype) -> Tensor:
        return scanned.to(dtype)


# --- gated_rms_norm ---------------------------------------------------------------------------------------------------


@wrong("gated_rms_norm", "numbers")
class GateAfterTheNorm(GatedRMSNorm):
    """What is normalised is y alone, and gated then."""

    def combined(self, y: Tensor, gate: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        return self.normed(y, n_groups, eps) * weight * gate


@wrong("gated_rms_norm", "numbers")
class MeanOverAllGroups(GatedRMSNorm):
    """The mean square is that of all channels."""

    def grouped(self, x: Tensor, n_groups: int) -> Tensor:
        return super().grouped(x, 1)


@wrong("gated_rms_norm", "numbers")
class GroupsInterleaved(GatedRMSNorm):
    """Channels belong to groups in turn."""

    def normed(self, x: Tensor, n_groups: int, eps: float) -> Tensor:
        turned = x.unflatten(-1, (x.shape[-1] // n_groups, n_groups)).mT.flatten(-2)
        return super().normed(turned, n_groups, eps).unflatten(-1, (n_groups, x.shape[-1] // n_groups)).mT.flatten(-2)


@wrong("gated_rms_norm", "numbers")
class WeightBeforeTheNorm(GatedRMSNorm):
    """The weight multiplies what is normalised."""

    def combined(self, y: Tensor, gate: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        return self.normed(y * gate * weight, n_groups, eps)


@wrong("gated_rms_norm", "numbers")
class GatedEpsOutsideOfTheRoot(GatedRMSNorm):
    """eps is added to the root, not under it."""

    norm = EpsOutsideOfTheRoot()


@wrong("gated_rms_norm", "numbers")
class SigmoidGate(GatedRMSNorm):
    """The gate is sigmoid(z), not SiLU(z)."""

    def __call__(self, y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
        acc = weight.float() if y.dtype != torch.float64 else weight
        wide = y.to(acc.dtype)
        return self.combined(wide, z.to(acc.dtype).sigmoid(), acc, n_groups, eps).to(y.dtype)
