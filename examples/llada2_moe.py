"""LLaDA2 with experts on these operations: inclusionAI/dInfer, `modeling_llada2_moe.py`, `ThresholdParallelDecoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from examples.layers import Cache, Config, Rotary, Weights, activation, field, refuse

PROJECTIONS = "gate", "up", "down"


class Llada2Moe:
    """A decoder with routed experts, causal from block to block."""

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        self.config, self.weights, self.mask_token_id = config, weights, mask_token_id
        self.layers, self.eps = field(config, "num_hidden_layers"), field(config, "rms_norm_eps")
        self.heads = field(config, "num_attention_heads")
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or field(config, "hidden_size") // self.heads
        self.act = activation(config, "hidden_act")
        self.rotary = Rotary(config, int(self.head_dim * config.get("partial_rotary_factor", 1.0)))
        experts = config.get("num_experts")
        dense = self.layers if experts is None else config.get("first_k_dense_replace", 0)
        if dense < self.layers:
            refuse(config, hidden_act="silu")  # of the experts, whatever the field says
        self.experts = {i: self.packed(weights.below(f"model.layers.{i}.mlp")) for i in range(dense, self.layers)}

    def forward(
        self,
        tokens: Tensor,
        start: Tensor | int = 0,
        rows: Tensor | None = None,
        *,
        cache: Cache | None = None,
        commit: bool = False,
        block_length: int | None = None,
    ) -> Tensor | None:
        """Logits `[R, S, V]` of tokens `[R, S]` behind the first `start` tokens of the cache's rows.

        commit: write keys and values into the cache instead.
        block_length: the tokens are blocks of so many, and nothing is before them; None: they are one block.
        """
        weights = self.weights
        x = weights.tied("model.word_embeddings.weight", "lm_head.weight")[tokens]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions + (start[:, None] if isinstance(start, Tensor) else start)  # [R, S], or [S]
        for i in range(self.layers):
            layer = weights.below(f"model.layers.{i}")
            y, attention = self.norm(x, layer["input_layernorm.weight"]), layer.below("attention")
            fused = attention.linear(y, "query_key_value").unflatten(-1, (-1, self.head_dim))
            q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 2)
            q, k = self.norm(q, attention["query_layernorm.weight"]), self.norm(k, attention["key_layernorm.weight"])
            q, k = self.rotary(positions, q, k)
            if block_length is not None:
                seen: Any = tt.block_causal_attention(q, k, v, block_length)
            elif cache is None:
                seen = tt.block_attention(q, k, v)
            else:
                seen = tt.block_attention(q, k, v, cache.k[i], cache.v[i], context_lens=start, context_index=rows)
            if cache is not None and commit:
                cache.append(i, k, v, start, rows)
            x = x + attention.linear(seen.flatten(2), "dense")
            y, mlp = self.norm(x, layer["post_attention_layernorm.weight"]), layer.below("mlp")
            if i not in self.experts:
                x = x + mlp.mlp(y, self.act)
                continue
            y = y.flatten(0, 1)
            chosen = self.route(tt.moe_gate(y, mlp["gate.weight"]), mlp["gate.expert_bias"])
            x = x + tt.moe_experts(y, *self.experts[i][:2], *chosen, **self.experts[i][2]).view_as(x)
        if commit:
            return None
        x = self.norm(x, weights["model.norm.weight"])
        return tt.linear(x, weights.tied("lm_head.weight", "model.word_embeddings.weight"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return tt.rms_norm(x, weight, eps=self.eps, round_first=True)

    def route(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts `[N, k]`: the bias chooses only, and an expert of a dropped group cannot be chosen."""
        top_k = field(self.config, "num_experts_per_tok")
        return tt.moe_route(
            logits,
            bias,
            top_k=top_k,
            n_group=field(self.config, "n_group"),
            topk_group=field(self.config, "topk_group"),
            renormalize=top_k > 1,
            scaling=field(self.config, "routed_scaling_factor"),
            dropped="-inf",
        )

    def packed(self, mlp: Weights) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A layer's experts as `moe_experts` takes them, which are stacked in dInfer and apart in checkpoints, and what
        it is told by name."""
        options: dict[str, Any] = dict(activation="silu_gated")
        if self.config.get("num_shared_experts"):
            shared = mlp.below("shared_experts")
            options["shared_up"] = torch.cat((shared["gate_proj.weight"], shared["up_proj.weight"]))
            options["shared_down"] = shared["down_proj.weight"]
        experts = mlp.below("experts")
        if experts.get("w13_weight") is not None:
            return experts["w13_weight"], experts["w2_weight"], options
        parts = [[experts[f"{e}.{p}_proj.weight"] for e in range(self.config["num_experts"])] for p in PROJECTIONS]
        return *tt.pack_experts(*parts), options

    def cache(self, rows: int, length: int) -> Cache:
        return Cache(self.layers, rows, length, self.kv_heads, self.head_dim, self.weights["model.norm.weight"])

    def generate(self, prompt: Tensor, *, blocks: int, block_length: int, threshold: float) -> tuple[Tensor, int]:
        """Block diffusion with `ThresholdParallelDecoder`: tokens `[B, T]` for prompts `[B, P]`, T the next multiple of
        the block, and how many steps denoised."""
        length = -(-(prompt.shape[1] + blocks * block_length) // block_length) * block_length
        cache, nfe = self.cache(len(prompt), length), 0

        def step(tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
            nonlocal nfe
            nfe += not commit
            prefill = commit and tokens.shape[1] != block_length
            return self.forward(
                *(tokens, start, rows), cache=cache, commit=commit, block_length=block_length if prefill else None
            )

        result = tt.generate_blocks(
            step,
            prompt,
            policy=tt.RemaskPolicy.named("dinfer", "threshold", threshold=threshold),
            block_size=block_length,
            mask_token_id=self.mask_token_id,
            max_new_tokens=length - prompt.shape[1],
            prefill="whole",
        )
        return torch.stack(result.sequences), nfe
