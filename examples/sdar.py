"""SDAR (arXiv 2510.06303) on these operations: JetAstra/SDAR, `modeling_sdar.py` and `block_diffusion_generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from examples.layers import Cache, Config, Rotary, Weights, activation, field, refuse


class Sdar:
    """A dense decoder, causal from block to block: a token sees its own block and all before it."""

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        refuse(config, partial_rotary_factor=1.0)
        self.weights, self.mask_token_id = weights, mask_token_id
        self.layers, self.eps = field(config, "num_hidden_layers"), field(config, "rms_norm_eps")
        heads = field(config, "num_attention_heads")
        self.head_dim = config.get("head_dim") or field(config, "hidden_size") // heads
        self.kv_heads = config.get("num_key_value_heads") or heads
        self.act = activation(config, "hidden_act")
        self.rotary = Rotary(config, self.head_dim)

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
        x = weights.tied("model.embed_tokens.weight", "lm_head.weight")[tokens]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions + (start[:, None] if isinstance(start, Tensor) else start)  # [R, S], or [S]
        for i in range(self.layers):
            layer = weights.below(f"model.layers.{i}")
            y, attention = self.norm(x, layer["input_layernorm.weight"]), layer.below("self_attn")
            q, k, v = (attention.linear(y, f"{p}_proj").unflatten(-1, (-1, self.head_dim)) for p in "qkv")
            q, k = self.norm(q, attention["q_norm.weight"]), self.norm(k, attention["k_norm.weight"])
            q, k = self.rotary(positions, q, k)
            if block_length is not None:
                seen: Any = tt.block_causal_attention(q, k, v, block_length)
            elif cache is None:
                seen = tt.block_attention(q, k, v)
            else:
                seen = tt.block_attention(q, k, v, cache.k[i], cache.v[i], context_lens=start, context_index=rows)
            if cache is not None and commit:
                cache.append(i, k, v, start, rows)
            x = x + attention.linear(seen.flatten(2), "o_proj")
            x = x + layer.below("mlp").mlp(self.norm(x, layer["post_attention_layernorm.weight"]), self.act)
        if commit:
            return None
        x = self.norm(x, weights["model.norm.weight"])
        return tt.linear(x, weights.tied("lm_head.weight", "model.embed_tokens.weight"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return tt.rms_norm(x, weight, eps=self.eps, round_first=True)

    def cache(self, rows: int, length: int) -> Cache:
        return Cache(self.layers, rows, length, self.kv_heads, self.head_dim, self.weights["model.norm.weight"])

    def generate(
        self,
        prompts: Tensor | list[Tensor],
        *,
        gen_length: int,
        block_length: int,
        denoising_steps: int,
        strategy: str,
        confidence_threshold: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stopping_criteria_idx: list[int] | None = None,
    ) -> tt.GenerateResult:
        """`block_diffusion_generate` for prompts `[B, P]`, or a list of any lengths, the most likely token taken for
        each draw.

        What a token once committed is, it stays: `examples.sdar_recorded` is the original to the last token.
        """
        longest = max(map(len, prompts)) + gen_length
        cache = self.cache(len(prompts), -(-longest // block_length) * block_length)

        def step(tokens: Tensor, start: Tensor, rows: Tensor, commit: bool) -> Tensor | None:
            prefill = commit and tokens.shape[1] != block_length
            return self.forward(
                *(tokens, start, rows), cache=cache, commit=commit, block_length=block_length if prefill else None
            )

        return tt.generate_blocks(
            step,
            prompts,
            policy=policy(strategy, confidence_threshold),
            block_size=block_length,
            mask_token_id=self.mask_token_id,
            max_new_tokens=gen_length,
            steps_per_block=denoising_steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=stopping_criteria_idx,
            prefill="whole",
        )


def policy(strategy: str, confidence_threshold: float | None = None) -> tt.RemaskPolicy:
    """The rule of a `remasking_strategy`, the most likely token taken for each draw; as in the original, a threshold
    means nothing to the others than the dynamic one."""
    threshold = confidence_threshold if strategy == "low_confidence_dynamic" else None
    return replace(tt.RemaskPolicy.named("sdar", strategy, confidence_threshold=threshold), greedy=True)
