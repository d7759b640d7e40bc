"""What the denoiser learns to write: the context tower's own greedy text from every block boundary of real text.

A draft is kept as far as it agrees with the context tower, so the tower's text, not the author's, is the one to guess.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.reference.adaln import rms_norm
from twotower_kernels.reference.demo_passes import Passes, layer_weights
from twotower_kernels.reference.demo_towers import ScanSizes, convolved, gated, normed, product, residual


def mamba_step(
    h: Tensor, weights: tuple[Tensor, ...], tail: Tensor, ssm: Tensor, sizes: ScanSizes, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row, h `[R, 1, H]`: h after the layer, and the conv and ssm states after the token."""
    norm, in_proj, conv, conv_bias, a_log, d, dt_bias, gate_norm, out_proj = weights
    inner, bc = sizes.heads * sizes.head_dim, sizes.groups * sizes.state
    z, xbc, dt = product(normed(h, norm, None, sizes.eps, True), in_proj, dtype).split(
        [inner, inner + 2 * bc, sizes.heads], -1
    )
    columns = torch.cat([tail, xbc], 1)
    x, b, c = convolved(columns, conv, conv_bias)[:, 0].split([inner, bc, bc], -1)
    repeat = sizes.heads // sizes.groups
    x = x.unflatten(-1, (sizes.heads, -1))  # [R, h, p]
    b, c = (m.unflatten(-1, (sizes.groups, -1)).repeat_interleave(repeat, 1) for m in (b, c))  # [R, h, n]
    delta = F.softplus(dt[:, 0].float() + dt_bias)[..., None]  # [R, h, 1]
    decay = (-a_log.exp()[:, None] * delta).exp()
    ssm = ssm * decay[..., None] + (x * delta)[..., None] * b[:, :, None]
    y = (ssm * c[:, :, None]).sum(-1) + d[:, None] * x
    y = gated(y.flatten(1)[:, None], z, gate_norm, sizes)
    return residual(h, product(y, out_proj, dtype), None), columns[:, 1:], ssm


class GreedySteps:
    """Steps of the context tower that continue every block boundary of `[B, L]` tokens at once, one token each."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.mamba = torch.compile(mamba_step, dynamic=False) if passes.is_compiled else mamba_step

    @torch.no_grad()
    def targets(self, ids: Tensor) -> Tensor:
        """`[B, L/S, S]`: the greedy text from every boundary; for the first block, which has no context, `ids`."""
        block, model = self.passes.block, self.passes.model
        batch, length = ids.shape
        hidden, context = self.passes.context(ids)
        before = hidden[:, block - 1 : -1 : block]  # of the last token before each block but the first
        first = product(before, model.context_lm_head.weight, self.passes.dtype).argmax(-1)
        tokens = torch.cat([ids[:, :1], first], 1).flatten()  # [R]
        states = {i: pair for i, pair in context.items() if model.config.hybrid_override_pattern[i] == "M"}
        own: dict[int, tuple[Tensor, Tensor]] = {}
        written = [tokens]
        for _ in range(block - 1):
            tokens = self._step(tokens, states, context, own, batch)
            written.append(tokens)
        result = torch.stack(written, 1).reshape(batch, length // block, block)
        result[:, 0] = ids[:, :block]
        return result

    def _step(
        self,
        tokens: Tensor,
        states: dict[int, tuple[Tensor, Tensor]],
        context: dict[int, tuple[Tensor, Tensor]],
        own: dict[int, tuple[Tensor, Tensor]],
        batch: int,
    ) -> Tensor:
        """The next token of every row; `states` and `own`, the keys and values since the boundary, go on."""
        p, c, tower = self.passes, self.passes.model.config, self.passes.model.context_tower
        h = tower.embeddings(tokens)[:, None]
        for i, layer in enumerate(tower.layers):
            weights = tuple(layer_weights(layer))
            if layer.letter == "M":
                h, *after = self.mamba(h, weights, *states[i], p.sizes, p.dtype)
                states[i] = (after[0], after[1])
            elif layer.letter == "*":
                x = normed(h, weights[0], None, c.layer_norm_epsilon, True)
                q, k, v = (product(x, w, p.dtype).unflatten(-1, (-1, c.head_dim)) for w in weights[1:4])
                own[i] = (torch.cat([own[i][0], k], 1), torch.cat([own[i][1], v], 1)) if i in own else (k, v)
                y = self._attend(q, *context[i], *own[i], batch)
                h = residual(h, product(y, weights[4], p.dtype), None)
            else:
                h = p.moe_of(h, layer, None)
        hidden = rms_norm(h, tower.norm_f.weight, eps=c.layer_norm_epsilon)
        return product(hidden, p.model.context_lm_head.weight, p.dtype).argmax(-1)[:, 0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, k_own: Tensor, v_own: Tensor, batch: int) -> Tensor:
        """q `[R, 1, Hq, D]` over the clean tokens before its block, k `[B, L, Hkv, D]`, and over `[R, n, Hkv, D]`."""
        rows, _, heads, dim = q.shape
        group = heads // k.shape[2]
        visible = torch.arange(k.shape[1]) < self.passes.block * torch.arange(rows // batch)[:, None]  # [N, L]
        q = q.float().reshape(rows, -1, group, dim) * dim**-0.5
        per_text = q.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, Hkv, N·group, D]
        before = per_text @ k.float().permute(0, 2, 3, 1)  # [B, Hkv, N·group, L]
        before = before.masked_fill(~visible.repeat_interleave(group, 0), float("-inf"))
        before = before.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)  # [R, Hkv, group, L]
        since = q @ k_own.float().permute(0, 2, 3, 1)  # [R, Hkv, group, n]
        share = torch.cat([before, since], -1).softmax(-1)
        clean, own = share.split([before.shape[-1], since.shape[-1]], -1)
        per_text = clean.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, N·group, L]
        y = (per_text @ v.float().transpose(1, 2)).unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)
        return (y + own @ v_own.float().transpose(1, 2)).reshape(rows, 1, heads * dim)
