"""The demo model's towers as passes over whole sequences, for training: `Passes(model).context(ids)`, `.denoise(...)`.

`reference.training` says what they compute; `reference.demo_towers` computes a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.reference.adaln import rms_norm
from twotower_kernels.reference.demo_towers import (
    Modulation,
    ScanSizes,
    attention_layer,
    mamba_layer,
    moe_layer,
    product,
)
from twotower_kernels.reference.layers import FREQUENCIES, Layer, Tower
from twotower_kernels.reference.model import TwoTower

# What the context tower leaves for every block of [B, L] tokens, by layer: of an "M" the W-1 columns before the block
# [B·L/S, W-1, C] and the state [B·L/S, h, p, n]; of a "*" the sequence's keys and values [B, L, Hkv, D].
Context = dict[int, tuple[Tensor, Tensor]]


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Cross-entropy of every token: hidden `[N, H]`, targets `[N]` → `[N]`."""
    return F.cross_entropy(product(hidden, head, dtype).float(), targets, reduction="none")


class Passes:
    """A model's towers, compiled or not, with products in `dtype`; its parameters are read at each call."""

    def __init__(self, model: TwoTower, block: int, dtype: torch.dtype = torch.bfloat16, compiled: bool = True) -> None:
        c = model.config
        self.model, self.block, self.dtype, self.is_compiled = model, block, dtype, compiled
        self.sizes = ScanSizes(c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.layer_norm_epsilon)
        self.loads: list[tuple[Tensor, Tensor]] = []  # of the last pass: each router's selection bias, and its choices
        prepared: Callable[..., Any] = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.mamba: Callable[..., Any] = prepared(mamba_layer)
        self.attention: Callable[..., Any] = prepared(attention_layer)
        self.moe: Callable[..., Any] = prepared(moe_layer)
        self.losses: Callable[..., Tensor] = prepared(token_losses)

    def context(self, ids: Tensor) -> tuple[Tensor, Context]:
        """The context tower over `ids [B, L]`, L a multiple of the block: hidden `[B, L, H]`, and what it leaves."""
        return self._tower(self.model.context_tower, ids, None, None)

    def denoise(self, noisy: Tensor, t: Tensor, context: Context) -> Tensor:
        """The denoiser on all blocks of `noisy [B, L]` at once, t `[B, L/S]`: hidden `[B, L, H]`."""
        return self._tower(self.model.denoiser_tower, noisy, self._modulations(t), context)[0]

    def _tower(
        self, tower: Tower, ids: Tensor, modulations: list[Modulation] | None, context: Context | None
    ) -> tuple[Tensor, Context]:
        c, left = self.model.config, Context()
        h = tower.embeddings(ids)
        visible = None if context is None else self._visible(ids.shape[1])
        self.loads = []
        for i, layer in enumerate(tower.layers):
            weights = tuple(layer_weights(layer)) if layer.letter in "M*" else ()
            modulation = None if modulations is None else modulations[i]
            seeds = context and context.get(i)
            if layer.letter == "M":
                h, *states = self.mamba(h, weights, modulation, seeds, self.sizes, self.block, self.dtype)
                left[i] = tuple(states)
            elif layer.letter == "*":
                eps = c.layer_norm_epsilon
                h, *states = self.attention(h, weights, modulation, seeds, visible, c.head_dim, eps, self.dtype)
                left[i] = tuple(states)
            else:
                h = self.moe_of(h, layer, modulation)
        return rms_norm(h, tower.norm_f.weight, eps=c.layer_norm_epsilon), left

    def moe_of(self, h: Tensor, layer: Layer, modulation: Modulation | None) -> Tensor:
        """One layer of experts, h `[B, L, H]`; notes who was chosen."""
        c = self.model.config
        sizes = c.num_experts_per_tok, c.moe_intermediate_size, c.routed_scaling_factor, c.layer_norm_epsilon
        h, load = self.moe(h, tuple(layer_weights(layer)), modulation, *sizes, self.dtype)
        self.loads.append((cast(Any, layer.mixer).gate.e_score_correction_bias, load.detach()))
        return h

    def _modulations(self, t: Tensor) -> list[Modulation]:
        """Per layer shift, scale and gate for every token. t `[B, N]` is rounded as by a bfloat16 model."""
        steps = (t.bfloat16() * 1000).float() if self.dtype == torch.bfloat16 else t * 1000
        exponents = torch.arange(FREQUENCIES) / FREQUENCIES
        angles = steps[..., None] * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], -1)
        shared = self.model.t_block(self.model.t_embedder.mlp(features)).unflatten(-1, (3, -1))  # [B, N, 3, H]
        return [
            cast(Modulation, (shared + table).repeat_interleave(self.block, 1).unbind(2))
            for table in self.model.scale_shift_tables
        ]

    def _visible(self, length: int) -> Tensor:
        """`[L, 2·L]`: of the clean sequence a token sees what is before its block, of the noisy one its own block."""
        blocks = torch.arange(length) // self.block
        return torch.cat([blocks < blocks[:, None], blocks == blocks[:, None]], 1)


def layer_weights(layer: Layer) -> Iterator[Tensor]:
    """A layer's weights in the order that its function in `demo_towers` names them; experts joined."""
    mixer: Any = layer.mixer
    yield layer.norm.weight
    if layer.letter == "M":
        yield from (mixer.in_proj.weight, mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.D, mixer.dt_bias)
        yield from (mixer.norm.weight, mixer.out_proj.weight)
    elif layer.letter == "*":
        yield from (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight, mixer.o_proj.weight)
    else:
        yield from (mixer.gate.weight, mixer.gate.e_score_correction_bias)
        experts = [*mixer.experts, mixer.shared_experts]
        yield torch.cat([expert.up_proj.weight for expert in experts], 0)
        yield torch.cat([expert.down_proj.weight for expert in experts], 1)
