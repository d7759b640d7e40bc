"""Mamba-2's scan, token by token, and its norm, as short programs whose steps are methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.testing.plain.adaln import RMSNorm, wide


class Scan:
    """`mamba2_scan`, row by row: convolution of all tokens, then the recurrence."""

    def __call__(
        self,
        xbc: Tensor,
        dt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        a_log: Tensor,
        d: Tensor,
        dt_bias: Tensor,
        *,
        n_groups: int,
        head_dim: int,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        state_index: Tensor | None = None,
        seq_lens: Tensor | None = None,
        time_step_limit: tuple[float, float] = (0.0, math.inf),
        return_states: bool = False,
    ) -> Any:
        batch, length, channels = xbc.shape
        heads, width, acc = dt.shape[2], conv_weight.shape[-1], wide(xbc)
        inner, size = heads * head_dim, (channels - heads * head_dim) // (2 * n_groups)
        kernel, conv_bias = (
            conv_weight.reshape(channels, width).to(acc),
            None if conv_bias is None else conv_bias.to(acc),
        )
        y = xbc.new_zeros(batch, length, inner)
        conv, ssm = xbc.new_zeros(batch, channels, width - 1), xbc.new_zeros(batch, heads, head_dim, size, dtype=acc)
        for row in range(batch):
            source = self.state_row(state_index, row)
            real = length if seq_lens is None else int(seq_lens[row])
            before = conv[row] if conv_state is None else self.first_inputs(conv_state[source])
            state = ssm[row] if ssm_state is None else self.first_state(ssm_state[source].to(acc))
            columns = torch.cat([before, xbc[row, : self.end(real, length)].T], 1)  # [C, W - 1 + m]
            u = self.activated(self.convolved(columns, kernel), conv_bias, xbc.dtype).to(acc)
            x, b, c = u.T.split([inner, n_groups * size, n_groups * size], 1)
            group = self.group_of(heads, n_groups).to(xbc.device)
            x = x.unflatten(1, (heads, head_dim))  # [m, heads, head_dim]
            b, c = (m.unflatten(1, (n_groups, size))[:, group] for m in (b, c))  # [m, heads, state]
            delta = self.delta(dt[row, : len(x)].to(acc), dt_bias.to(acc), time_step_limit)  # [m, heads]
            scanned, state = self.scan(x, b, c, delta, -a_log.to(acc).exp(), state, xbc.dtype)
            y[row, :real] = self.output(scanned, d.to(acc)[:, None] * x, xbc.dtype).flatten(1)[:real]
            conv[row], ssm[row] = self.last_inputs(columns, real, width), state
        return (y, conv, ssm) if return_states else y

    # --- states -------------------------------------------------------------------------------------------------------

    def state_row(self, index: Tensor | None, row: int) -> int:
        return row if index is None else int(index[row])

    def end(self, real: int, length: int) -> int:
        """The tokens that are computed."""
        return real

    def first_inputs(self, conv_state: Tensor) -> Tensor:
        return conv_state

    def first_state(self, ssm_state: Tensor) -> Tensor:
        return ssm_state

    def last_inputs(self, columns: Tensor, real: int, width: int) -> Tensor:
        return columns[:, real : real + width - 1]

    # --- convolution --------------------------------------------------------------------------------------------------

    def convolved(self, columns: Tensor, kernel: Tensor) -> Tensor:
        length = columns.shape[1] - kernel.shape[1] + 1
        total = torch.zeros(len(columns), length, dtype=kernel.dtype, device=kernel.device)
        for w in range(kernel.shape[1]):
            total = total + kernel[:, w, None] * columns[:, w : w + length].to(kernel.dtype)
        return total

    def activated(self, u: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return F.silu((u if bias is None else u + bias[:, None]).to(dtype))

    # --- the scan -----------------------------------------------------------------------------------------------------

    def group_of(self, heads: int, n_groups: int) -> Tensor:
        """The group of each head."""
        return torch.arange(heads) // (heads // n_groups)

    def delta(self, dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
        return F.softplus(dt + bias).clamp(*limit)

    def scan(
        self, x: Tensor, b: Tensor, c: Tensor, delta: Tensor, a: Tensor, state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """y [m, heads, head_dim] without D, and the last state [heads, head_dim, state]. dtype: of the activations."""
        ys = []
        for t in range(len(x)):
            state = (delta[t] * a).exp()[:, None, None] * state
            state = self.stored(state + (delta[t, :, None] * x[t])[:, :, None] * b[t][:, None, :], dtype)
            ys.append((state * c[t][:, None, :]).sum(2))
        return (torch.stack(ys) if ys else x), state

    def stored(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return state

    def output(self, scanned: Tensor, skipped: Tensor, dtype: torch.dtype) -> Tensor:
        return (scanned + skipped).to(dtype)


class GatedRMSNorm:
    """`gated_rms_norm`."""

    norm = RMSNorm()

    def __call__(self, y: Tensor, z: Tensor, weight: Tensor, *, n_groups: int, eps: float) -> Tensor:
        acc = wide(y)
        return self.combined(y.to(acc), F.silu(z.to(acc)), weight.to(acc), n_groups, eps).to(y.dtype)

    def combined(self, y: Tensor, gate: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        return self.normed(y * gate, n_groups, eps) * weight

    def normed(self, x: Tensor, n_groups: int, eps: float) -> Tensor:
        return self.norm(self.grouped(x, n_groups), eps=eps).reshape(x.shape)

    def grouped(self, x: Tensor, n_groups: int) -> Tensor:
        return x.unflatten(-1, (n_groups, x.shape[-1] // n_groups))
