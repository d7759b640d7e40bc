"""The modules of one tower: which parameters there are, under the checkpoint's names, and each mixer's arithmetic.

A mixer is `forward(x, cache) -> (y, state)`: normalised activations `[B, S, H]` to `[B, S, H]`, and, from Mamba-2 where
the cache asks for it, the state after the block. The norms and residuals between mixers belong to the model, which
fuses them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from twotower_kernels.model.cache import Cache, KVCache, MambaCache, MambaState
from twotower_kernels.ops import block_attention, gated_rms_norm, mamba2_scan, moe_experts
from twotower_kernels.ops.linear import linear
from twotower_kernels.ops.moe import moe_router
from twotower_kernels.ops.moe_plans import MoePlan
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.quantization import QuantizedTensor

# Selection and decay are sensitive to rounding: these parameters are never narrower than in their file, nor than
# float32 where there is no file.
NEVER_NARROWED = ("gate.weight", "e_score_correction_bias", "A_log", "mixer.D", "dt_bias")
FREQUENCIES = 128  # of the time embedding: as many cosines, then as many sines

Factory = dict[str, Any]  # device and dtype of new parameters
Mixed = tuple[Tensor, MambaState | None]  # what every mixer gives
FROM_ZEROS = (None, None, None, None, False, None)  # the fields of a MambaCache where a text begins
NO_CONTEXT = (None, None, None, None, None, True, None)  # of a KVCache there


def _at_least_float32(factory: Factory) -> Factory:
    return factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}


class Stacked(nn.Module):
    """Parameters that kernels read as one tensor `[N, ...]`, and that a checkpoint holds as N.

    state_dict and load_state_dict speak the checkpoint's keys; the pieces they exchange share the one tensor's memory.

    Args:
        pieces: per parameter, the key of a piece with {} for its index.
        tensors: the parameters.
    """

    def __init__(self, pieces: dict[str, str], **tensors: Tensor) -> None:
        super().__init__()
        self.pieces = pieces
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, key in self.pieces.items():
            stacked = getattr(self, name)
            if isinstance(stacked, QuantizedTensor):  # a module, which saves itself
                continue
            for i, piece in enumerate(stacked if keep_vars else _pieces(stacked.detach())):
                destination[prefix + key.format(i)] = piece

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known: set[str] = set()
        for name, key in self.pieces.items():
            stacked = getattr(self, name)
            if isinstance(stacked, QuantizedTensor):
                known.update(f"{prefix}{name}.{part}" for part, _ in stacked.named_buffers())
                continue
            keys = [prefix + key.format(i) for i in range(len(stacked))]
            known.update(keys)
            given = {i: state_dict[k] for i, k in enumerate(keys) if k in state_dict}
            missing_keys.extend(k for k in keys if strict and k not in state_dict)
            for i in [i for i, piece in given.items() if piece.shape != stacked.shape[1:]]:
                shape = list(given.pop(i).shape)
                error_msgs.append(f"size mismatch for {keys[i]}: expected {list(stacked.shape[1:])}, got {shape}")
            if local_metadata.get("assign_to_params_buffers", False) and len(given) == len(keys) > 0:
                pieces = torch.stack([given[i].detach() for i in range(len(keys))])
                setattr(self, name, nn.Parameter(pieces, requires_grad=False))
                continue
            with torch.no_grad():
                for i, piece in given.items():
                    stacked[i].copy_(piece)
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)


@torch.inference_mode(False)  # as views of parameters are: tensors that may be changed anywhere
def _pieces(stacked: Tensor) -> list[Tensor]:
    """The tensors in a stack, each with a storage of its own that ends where the piece does.

    They share the stack's memory, and keep it alive, as views do. But whoever writes storages to disk writes a view's
    whole stack, and whoever looks for tensors that share a storage takes all pieces for one.
    """
    if stacked.is_meta or type(stacked) is not Tensor or not stacked.is_contiguous():
        return list(stacked)
    storage, size = stacked.untyped_storage(), math.prod(stacked.shape[1:]) * stacked.itemsize
    start = stacked.storage_offset() * stacked.itemsize
    pieces = []
    for i in range(len(stacked)):
        own = storage[start + i * size : start + (i + 1) * size]
        piece = torch.empty(0, dtype=stacked.dtype, device=stacked.device)
        pieces.append(piece.set_(own, 0, stacked.shape[1:], stacked.stride()[1:]))
    return pieces


class Linear(nn.Linear):
    """Uninitialised: weights come from a checkpoint or from `draw_weights`. (Random numbers on the meta device would
    make torch import its compiler.)"""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, **factory: Any) -> None:
        super().__init__(inputs, outputs, bias=bias, **factory)

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Uninitialised, as `Linear`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        return weight.rows(input) if isinstance(weight, QuantizedTensor) else super().forward(input)


class Conv1d(nn.Conv1d):
    """Uninitialised, as `Linear`."""

    def reset_parameters(self) -> None:
        pass


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Random weights that keep activations near 1: normal over the root of the inputs; no biases, norms of weight 1."""
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            p.fill_(1)
        elif name.endswith("A_log"):
            p.copy_(torch.arange(1, len(p) + 1).log())
        elif p.ndim == 1:
            p.zero_()
        else:
            p.normal_(std=p.shape[-1] ** -0.5)


class Norm(nn.Module):
    """The weight of an RMSNorm; whoever applies it fuses it with something else."""

    def __init__(self, size: int, factory: Factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))


class Mamba2(nn.Module):
    """in_proj, then convolution, SiLU and scan, then gated norm, then out_proj (arXiv 2405.21060)."""

    def __init__(self, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        self.config, heads, channels = config, config.mamba_num_heads, config.mamba_channels
        projected = config.mamba_inner + channels + heads
        self.in_proj = Linear(config.hidden_size, projected, **factory)
        self.conv1d = Conv1d(
            channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias, **factory
        )
        precise = _at_least_float32(factory)
        self.A_log = nn.Parameter(torch.empty(heads, **precise))
        self.D = nn.Parameter(torch.empty(heads, **precise))
        self.dt_bias = nn.Parameter(torch.empty(heads, **precise))
        self.norm = Norm(config.mamba_inner, factory)
        self.out_proj = Linear(config.mamba_inner, config.hidden_size, **factory)

    def forward(self, x: Tensor, cache: MambaCache | None = None) -> Mixed:
        """y, and the state after the block where the cache asks for it. No cache: from the beginning."""
        c = self.config
        # z [B, S, inner], xbc [B, S, channels], dt [B, S, heads]: slices of one product, read where they lie.
        z, xbc, dt = self.in_proj(x).split([c.mamba_inner, c.mamba_channels, c.mamba_num_heads], -1)
        y, state = self.scan(xbc, dt, cache)
        if cache is not None and cache.keep is not None:
            cache.keep(xbc, dt)
        y = gated_rms_norm(y, z, self.norm.weight, n_groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y), state

    def scan(self, xbc: Tensor, dt: Tensor, cache: MambaCache | None) -> Mixed:
        """Convolution, SiLU and scan alone: y [B, S, inner], and the state where the cache asks for it."""
        c = self.config
        conv, ssm, index, block_lens, return_state, _ = FROM_ZEROS if cache is None else cache
        scanned: Any = mamba2_scan(
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
            state_index=index,
            seq_lens=block_lens,
            time_step_limit=c.time_step_limit,
            return_states=return_state,
        )
        return (scanned[0], MambaState(*scanned[1:])) if return_state else (scanned, None)


class Attention(nn.Module):
    """Grouped-query attention without any position information (no rotary embedding, no bias)."""

    def __init__(self, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, queries, **factory)
        self.k_proj = Linear(config.hidden_size, keys, **factory)
        self.v_proj = Linear(config.hidden_size, keys, **factory)
        self.o_proj = Linear(queries, config.hidden_size, **factory)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Mixed:
        """y; the block's own keys and values go to the cache's `append`. No cache: causal, from the beginning."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))  # [B, S, Hq, D]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))  # [B, S, Hkv, D]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        k_context, v_context, context_lens, index, block_lens, causal, append = NO_CONTEXT if cache is None else cache
        y: Any = block_attention(
            q,
            k,
            v,
            k_context,
            v_context,
            context_lens=context_lens,
            context_index=index,
            block_lens=block_lens,
            causal=causal,
        )
        if append is not None:
            append(k, v)
        return self.o_proj(y.flatten(2)), None


class MLP(nn.Module):
    """down(relu(up·x)²): the dense layer, and the parameters of a shared expert."""

    def __init__(self, hidden: int, intermediate: int, factory: Factory) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, intermediate, **factory)
        self.down_proj = Linear(intermediate, hidden, **factory)

    def forward(self, x: Tensor, cache: Cache = None) -> Mixed:
        return self.down_proj(self.up_proj(x).relu_().square_()), None


class Router(nn.Module):
    """Which experts a token goes to, and with which weights (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16)."""

    def __init__(self, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        self.config = config
        precise, experts = _at_least_float32(factory), config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, **precise))
        self.e_score_correction_bias = nn.Parameter(torch.empty(experts, **precise))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, MoePlan]:
        """x `[N, H]` to weights and experts, each `[N, top_k]`, and the plan that sorts tokens by expert."""
        c = self.config
        return moe_router(
            x,
            self.weight,
            self.e_score_correction_bias,
            top_k=c.num_experts_per_tok,
            n_group=c.n_group,
            topk_group=c.topk_group,
            renormalize=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )


class MoE(nn.Module):
    """The routed experts' weighted sum, and the expert that every token passes."""

    def __init__(self, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        count, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate = Router(config, factory)
        self.experts: Any = Stacked(
            {"up": "{}.up_proj.weight", "down": "{}.down_proj.weight"},
            up=torch.empty(count, inner, hidden, **factory),
            down=torch.empty(count, hidden, inner, **factory),
        )
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts: Any = MLP(hidden, shared, factory) if config.n_shared_experts else None

    def forward(self, x: Tensor, cache: Cache = None) -> Mixed:
        tokens = x.flatten(0, 1)  # [B·S, H]
        weights, experts, plan = self.gate(tokens)
        shared = self.shared_experts
        y = moe_experts(
            tokens,
            self.experts.up,
            self.experts.down,
            weights,
            experts,
            plan=plan,
            shared_up=None if shared is None else shared.up_proj.weight,
            shared_down=None if shared is None else shared.down_proj.weight,
        )
        return y.view(x.shape), None


class Layer(nn.Module):
    """A norm and a mixer. `order` says on which side of the norm the denoiser's modulation acts."""

    def __init__(self, letter: str, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        self.letter = letter
        self.order = "modulate_norm" if letter in "M*" else "norm_modulate"
        self.norm = Norm(config.hidden_size, factory)
        self.mixer: nn.Module
        if letter == "M":
            self.mixer = Mamba2(config, factory)
        elif letter == "*":
            self.mixer = Attention(config, factory)
        elif letter == "E":
            self.mixer = MoE(config, factory)
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size, factory)


class Tower(nn.Module):
    """Embeddings, layers, last norm."""

    def __init__(self, config: TwoTowerConfig, factory: Factory) -> None:
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers: Any = nn.ModuleList(Layer(letter, config, factory) for letter in config.hybrid_override_pattern)
        self.norm_f = Norm(config.hidden_size, factory)


class TimeEmbedder(nn.Module):
    """Noise level t to a vector: 128 cosines and 128 sines of 1000·t, then a two-layer MLP."""

    def __init__(self, hidden: int, factory: Factory) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(2 * FREQUENCIES, hidden, bias=True, **factory),
            nn.SiLU(),
            Linear(hidden, hidden, bias=True, **factory),
        )

    def forward(self, t: Tensor) -> Tensor:
        """t `[B]` to `[B, H]`.

        Rounding is part of the definition, since the model was trained with it: t and 1000·t are rounded to the dtype
        of the weights (in bfloat16, 1000 · 0.6875 becomes 688), angles are float32 or wider, their cosines and sines
        are rounded to the dtype of the weights again.
        """
        dtype = next(self.mlp.parameters()).dtype
        angle_dtype = torch.promote_types(dtype, torch.float32)
        time = (t.to(dtype) * 1000).to(angle_dtype)  # [B]
        i = torch.arange(FREQUENCIES, dtype=angle_dtype, device=t.device)
        angles = time[:, None] * torch.exp(i / FREQUENCIES * -math.log(10000.0))  # [B, 128]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))
