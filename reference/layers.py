"""The modules of both towers; their attribute names are the checkpoint's keys."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference.attention import block_attention
from twotower_kernels.reference.mamba2 import gated_rms_norm, mamba2_scan
from twotower_kernels.reference.moe import feed_forward, moe_experts, moe_gate, moe_route

FREQUENCIES = 128  # of the time embedding: 128 cosines, then 128 sines


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2(nn.Module):
    """in_proj → conv, SiLU, scan → gated norm → out_proj."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config, heads = config, config.mamba_num_heads
        inner, channels = config.mamba_inner, config.mamba_channels
        self.in_proj = nn.Linear(config.hidden_size, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.A_log = nn.Parameter(torch.arange(1.0, heads + 1).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, conv: Tensor, ssm: Tensor, seq_lens: Tensor | None = None, states_every: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, L, H]` → y `[B, L, H]` and the conv and ssm states after it (or after every `states_every` tokens)."""
        c = self.config
        z, xbc, dt = self.in_proj(x).split([c.mamba_inner, c.mamba_channels, c.mamba_num_heads], -1)
        y, conv, ssm = mamba2_scan(
            xbc,
            dt,
            self.conv1d.weight,
            self.conv1d.bias,
            self.A_log,
            self.D,
            self.dt_bias,
            n_groups=c.n_groups,
            head_dim=c.mamba_head_dim,
            conv_state=conv,
            ssm_state=ssm,
            seq_lens=seq_lens,
            time_step_limit=c.time_step_limit,
            return_states=True,
            states_every=states_every,
        )
        y = gated_rms_norm(y, z, self.norm.weight, n_groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y), conv, ssm


class Attention(nn.Module):
    """Grouped-query attention without rotary embedding, without bias."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        k_context: Tensor,
        v_context: Tensor,
        context_lens: Tensor,
        context_index: Tensor | None,
        block_lens: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, S, H]` → y `[B, S, H]` and the block's own k, v `[B, S, Hkv, D]`."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = block_attention(
            q,
            k,
            v,
            k_context,
            v_context,
            context_lens=context_lens,
            context_index=context_index,
            block_lens=block_lens,
            causal=causal,
        )
        return self.o_proj(cast(Tensor, y).flatten(2)), k, v


class MLP(nn.Module):
    """Dense relu² MLP: the `-` layer, one expert, the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.up_proj.weight, self.down_proj.weight)


class Router(nn.Module):
    """x `[N, H]` → weights and experts `[N, k]`."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return moe_route(
            moe_gate(x, self.weight),
            self.e_score_correction_bias,
            top_k=c.num_experts_per_tok,
            n_group=c.n_group,
            topk_group=c.topk_group,
            renormalize=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )


class MoE(nn.Module):
    """Routed experts and the shared expert."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts: Any = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts: Any = MLP(config.hidden_size, shared) if config.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # [B·S, H]
        weights, experts = self.gate(tokens)
        shared = self.shared_experts
        y = moe_experts(
            tokens,
            [e.up_proj.weight for e in self.experts],
            [e.down_proj.weight for e in self.experts],
            weights,
            experts,
            shared_up=shared and shared.up_proj.weight,
            shared_down=shared and shared.down_proj.weight,
        )
        return y.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, letter: str, config: TwoTowerConfig) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size)
        self.mixer: nn.Module = (
            Mamba2(config)
            if letter == "M"
            else Attention(config)
            if letter == "*"
            else MoE(config)
            if letter == "E"
            else MLP(config.hidden_size, config.intermediate_size)
        )


class Tower(nn.Module):
    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Layer(letter, config) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size)


class TimeEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        """t `[B]` → `[B, H]`. Rounding is part of the definition: t and 1000·t in the model's dtype, angles wider."""
        dtype = next(self.mlp.parameters()).dtype
        angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        steps = (t.to(dtype) * 1000).to(angle_dtype)
        exponents = torch.arange(FREQUENCIES, dtype=angle_dtype, device=t.device) / FREQUENCIES
        angles = steps[:, None] * torch.exp(-math.log(10000.0) * exponents)  # [B, 128]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))
