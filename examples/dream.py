"""Dream (arXiv 2508.15487) on these operations: NVlabs/Fast-dLLM, `modeling_dream.py` and `diffusion_generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from examples.layers import Config, Rotary, Weights, activation, field, refuse


class Dream:
    """A dense encoder whose output at a position predicts the token behind it."""

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        refuse(config, partial_rotary_factor=1.0)
        self.weights, self.mask_token_id = weights, mask_token_id
        self.layers, self.eps = field(config, "num_hidden_layers"), field(config, "rms_norm_eps")
        self.head_dim = field(config, "hidden_size") // field(config, "num_attention_heads")
        self.act = activation(config, "hidden_act")
        self.rotary = Rotary(config, self.head_dim)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]` of tokens `[B, S]`, not shifted. padding: `[B]`, tokens in front that nobody sees."""
        weights = self.weights
        x = weights.tied("model.embed_tokens.weight", "lm_head.weight")[tokens]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        for i in range(self.layers):
            layer = weights.below(f"model.layers.{i}")
            y, attention = self.norm(x, layer["input_layernorm.weight"]), layer.below("self_attn")
            q, k, v = (attention.linear(y, f"{p}_proj").unflatten(-1, (-1, self.head_dim)) for p in "qkv")
            q, k = self.rotary(positions, q, k)
            if padding is None:
                seen: Any = tt.block_attention(q, k, v)
            else:
                seen = tt.context_attention(q, k, v, context_starts=padding)
            x = x + attention.linear(seen.flatten(2), "o_proj")
            x = x + layer.below("mlp").mlp(self.norm(x, layer["post_attention_layernorm.weight"]), self.act)
        x = self.norm(x, weights["model.norm.weight"])
        return tt.linear(x, weights.tied("lm_head.weight", "model.embed_tokens.weight"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return tt.rms_norm(x, weight, eps=self.eps, round_first=True)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        attention_mask: Tensor | None = None,
        *,
        alg: str,
        steps: int,
        new_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        eps: float = 1e-3,
        alg_temp: float | None = None,
        threshold: float = 0.9,
    ) -> tuple[Tensor, int]:
        """`diffusion_generate` for prompts `[B, P]`, the most likely token taken for each draw: tokens `[B, T]`, and
        how many steps it took.

        attention_mask: `[B, P]`, 0 at the padding in front of a prompt; as in the original it moves no position.
        threshold: of `alg="confidence_threshold"`, which takes more steps where it refuses tokens in the last one.
        """
        if alg == "origin" or alg_temp:
            raise NotImplementedError(f"alg, alg_temp: expected positions that are not drawn, got {alg!r}, {alg_temp}")
        if alg == "confidence_threshold":
            policy = tt.RemaskPolicy.named("fast_dllm", alg=alg, threshold=threshold)
        else:
            policy = tt.RemaskPolicy.named("dream", alg=alg, eps=eps)
        padding = None if attention_mask is None else in_front(attention_mask)
        x = F.pad(prompt, (0, new_tokens), value=self.mask_token_id)
        n0, step, total = (x == self.mask_token_id).sum(1), 0, steps
        if alg == "confidence_threshold" and (len(x) > 1 or n0 % steps):
            raise ValueError(f"steps: expected one row and a divisor of {n0.tolist()} masks, got {len(x)}, {steps}")
        while step < total:
            result = tt.remask(
                self.forward(x, padding),
                x,
                mask_token_id=self.mask_token_id,
                policy=replace(policy, greedy=True),
                step=step,
                num_steps=steps,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                initial_num_masked=n0,
                shift=1,
            )
            x, step = result.tokens, step + 1
            if alg == "confidence_threshold" and step >= total:
                total += int(result.num_masked)
        return x, total


def in_front(attention_mask: Tensor) -> Tensor:
    """How many tokens `[B]` a mask `[B, P]` hides in front of each row."""
    hidden = (attention_mask == 0).sum(1)
    places = torch.arange(attention_mask.shape[1], device=hidden.device)
    if not attention_mask.bool().equal(places >= hidden[:, None]):
        raise NotImplementedError("attention_mask: expected padding in front alone, got some elsewhere")
    return hidden
