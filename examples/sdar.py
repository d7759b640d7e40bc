"""SDAR (arXiv 2510.06303) on these operations: JetAstra/SDAR, `modeling_sdar.py` and `block_diffusion_generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from examples.layers import Cache, Config, Rotary, Weights, activation, block_causal_attention, field, refuse


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
    ) -> Tensor:
        """Logits `[R, S, V]` of tokens `[R, S]` behind the first `start` tokens of the cache's rows.

        commit: write their keys and values into the cache.
        block_length: the tokens are blocks of so many, and nothing is before them; None: they are one block.
        """
        weights = self.weights
        x = weights.tied("model.embed_tokens.weight", "lm_head.weight")[tokens]
        positions = torch.arange(tokens.shape[1], device=tokens.device) + torch.as_tensor(start)[..., None]
        for i in range(self.layers):
            layer = weights.below(f"model.layers.{i}")
            y, attention = self.norm(x, layer["input_layernorm.weight"]), layer.below("self_attn")
            q, k, v = (attention.linear(y, f"{p}_proj").unflatten(-1, (-1, self.head_dim)) for p in "qkv")
            q, k = self.norm(q, attention["q_norm.weight"]), self.norm(k, attention["k_norm.weight"])
            q, k = self.rotary(positions, q, k)
            if block_length is not None:
                y = block_causal_attention(q, k, v, block_length)
            elif cache is None:
                y = tt.block_attention(q, k, v)
            else:
                y = tt.block_attention(q, k, v, cache.k[i], cache.v[i], context_lens=start, context_index=rows)
            if cache is not None and commit:
                cache.append(i, k, v, start, rows)
            x = x + attention.linear(y.flatten(2), "o_proj")
            x = x + layer.below("mlp").mlp(self.norm(x, layer["post_attention_layernorm.weight"]), self.act)
        x = self.norm(x, weights["model.norm.weight"])
        return tt.linear(x, weights.tied("lm_head.weight", "model.embed_tokens.weight"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return tt.rms_norm(x, weight, eps=self.eps)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
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
    ) -> tuple[Tensor, int]:
        """`block_diffusion_generate`, the most likely token taken for each draw: tokens `[B, T]`, and how many steps
        denoised.

        T is the next multiple of the block; masks are left behind a block that holds a token to stop at.
        """
        given = prompt.shape[1]
        length = -(-(given + gen_length) // block_length) * block_length
        x = F.pad(prompt, (0, length - given), value=self.mask_token_id)
        cache = Cache(self.layers, len(x), length, self.kv_heads, self.head_dim, self.weights["model.norm.weight"])
        prefilled, nfe = given // block_length * block_length, 0
        if prefilled:
            self.forward(x[:, :prefilled], cache=cache, commit=True, block_length=block_length)
        for start in range(prefilled, length, block_length):
            block = x[:, start : start + block_length]
            for step in range(denoising_steps):
                if not (block == self.mask_token_id).any():
                    break
                logits = self.forward(block, start, cache=cache)
                nfe += 1
                result = tt.remask(
                    logits,
                    block,
                    mask_token_id=self.mask_token_id,
                    policy=policy(strategy, confidence_threshold),
                    step=step,
                    num_steps=denoising_steps,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                )
                block.copy_(self.overwritten(result, block, logits, strategy, step, denoising_steps))
            if (block == self.mask_token_id).any():
                raise RuntimeError(f"masks are left after {denoising_steps} steps, where the original fails")
            self.forward(block, start, cache=cache, commit=True)
            if stopping_criteria_idx and torch.isin(x[:, given:], torch.tensor(stopping_criteria_idx)).any():
                break
        return x, nfe

    def overwritten(
        self, result: tt.RemaskResult, before: Tensor, logits: Tensor, strategy: str, step: int, steps: int
    ) -> Tensor:
        """The tokens after a step, with what the original does where it has fewer masks than its quota, which it counts
        from the block: `torch.topk` then takes committed tokens, too, and they are overwritten."""
        quota = before.shape[1] // steps + (step < before.shape[1] % steps)
        masked, tokens = before == self.mask_token_id, result.tokens
        for row in range(len(tokens)):
            if strategy == "sequential":
                first = int(masked[row].int().argmax())
                taken = torch.arange(first, min(first + quota, before.shape[1]))
            elif masked[row].sum() < quota:
                taken = torch.where(masked[row], result.confidence[row], -torch.inf).topk(quota).indices
            else:
                continue
            taken = taken[~masked[row, taken]]
            tokens[row, taken] = logits[row, taken].argmax(-1)
        return tokens


def policy(strategy: str, confidence_threshold: float | None) -> tt.RemaskPolicy:
    """The rule of a `remasking_strategy`."""
    if strategy == "low_confidence_dynamic":
        return tt.RemaskPolicy.sdar(confidence_threshold, greedy=True)
    if strategy == "low_confidence_static":
        return tt.RemaskPolicy.sdar(greedy=True)
    if strategy == "sequential":
        return tt.RemaskPolicy.jetengine("sequential", greedy=True)
    known = "'low_confidence_dynamic', 'low_confidence_static', 'sequential'"
    raise NotImplementedError(f"strategy: expected one of {known}, got {strategy!r}")
