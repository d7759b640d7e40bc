"""LLaDA (arXiv 2502.09992) with the caches of Fast-dLLM (arXiv 2505.22618) on these operations: NVlabs/Fast-dLLM,
`modeling_llada.py`, `generate`, `generate_with_prefix_cache` and `generate_with_dual_cache`."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from examples.layers import Cache, Config, Rotary, Weights, activation, field, refuse


class Llada:
    """A dense encoder: every token sees every other."""

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        refuse(config, block_type="llama", rope=True, alibi=False)
        self.config, self.weights, self.mask_token_id = config, weights.below("model.transformer"), mask_token_id
        self.layers, heads = field(config, "n_layers"), field(config, "n_heads")
        self.head_dim = field(config, "d_model") // heads
        self.kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
        self.group = config.get("block_group_size") or 1
        self.act = activation(config, "activation_type")
        self.rotary = Rotary(config, self.head_dim)

    def forward(self, tokens: Tensor, start: int = 0, *, cache: Cache | None = None, replace: bool = False) -> Tensor:
        """Logits `[B, S, V]` of tokens `[B, S]` at position `start`.

        cache: without, the tokens see each other. With `replace` (dual cache), their keys and values take their places
        in it, and they see all of it; otherwise (prefix cache) they see each other and what is before `start` in it.
        """
        weights = self.weights
        x = weights["wte.weight"][tokens] if weights.get("wte.weight") is not None else weights["ff_out.weight"][tokens]
        if self.config.get("input_emb_norm"):
            x = x * field(self.config, "d_model") ** 0.5
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        for i in range(self.layers):
            name = f"blocks.{i}" if self.group == 1 else f"block_groups.{i // self.group}.{i % self.group}"
            layer = weights.below(name)
            y = self.norm(x, layer.below("attn_norm"))
            q, k, v = (layer.linear(y, f"{p}_proj") for p in "qkv")
            if self.config.get("attention_layer_norm"):
                q, k = self.norm(q, layer.below("q_norm")), self.norm(k, layer.below("k_norm"))
            q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
            q, k = self.rotary(positions, q, k)
            if cache is None:
                seen: Any = tt.block_attention(q, k, v)
            elif replace:
                cache.append(i, k, v, start)
                seen = tt.context_attention(q, cache.k[i], cache.v[i])
            else:
                seen = tt.block_attention(q, k, v, cache.k[i], cache.v[i], context_lens=start)
            x = x + layer.linear(seen.flatten(2), "attn_out")
            y = self.norm(x, layer.below("ff_norm"))
            x = x + layer.linear(self.act(layer.linear(y, "ff_proj")) * layer.linear(y, "up_proj"), "ff_out")
        x = self.norm(x, weights.below("ln_f"))
        if self.config.get("weight_tying"):
            x = tt.linear(x, weights.tied("wte.weight", "ff_out.weight"))
        else:
            x = weights.linear(x, "ff_out")
        return x / field(self.config, "d_model") ** 0.5 if self.config.get("scale_logits") else x

    def norm(self, x: Tensor, weights: Weights) -> Tensor:
        """The norm that `layer_norm_type` names, with the weight and the bias that are there."""
        kind, weight, bias = self.config.get("layer_norm_type", "rms"), weights.get("weight"), weights.get("bias")
        if kind in ("default", "low_precision"):
            return F.layer_norm(x, x.shape[-1:], weight, bias)
        if kind not in ("rms", "gemma_rms"):
            raise NotImplementedError(
                f"layer_norm_type: expected rms, gemma_rms, default or low_precision, got {kind!r}"
            )
        if weight is not None and kind == "gemma_rms":
            weight = 1 + weight
        y = tt.rms_norm(x, weight, eps=field(self.config, "rms_norm_eps"), round_first=True)
        return y if bias is None else y + bias

    def cache(self, rows: int, length: int) -> Cache:
        return Cache(self.layers, rows, length, self.kv_heads, self.head_dim, self.weights["ln_f.weight"])

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        steps: int,
        gen_length: int,
        block_length: int,
        cache: str | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        temperature: float = 0.0,
        remasking: str = "low_confidence",
    ) -> tuple[Tensor, int]:
        """Fast-dLLM's three programs by their `cache`: tokens `[B, T]`, and how often the model was called."""
        refuse(dict(temperature=temperature, remasking=remasking), temperature=0, remasking="low_confidence")
        if cache not in (None, "prefix", "dual"):
            raise NotImplementedError(f"cache: expected None, 'prefix' or 'dual', got {cache!r}")
        if gen_length % block_length or steps % (gen_length // block_length):
            raise ValueError(
                f"gen_length, steps: expected whole blocks of {block_length}, and as many steps in each, "
                f"got {gen_length}, {steps}"
            )
        steps = steps // (gen_length // block_length)
        x = F.pad(prompt, (0, gen_length), value=self.mask_token_id)
        length, nfe = x.shape[1], 0
        storage = self.cache(len(x), length)
        policy = tt.RemaskPolicy.named("fast_dllm", remasking=remasking, threshold=threshold, factor=factor)
        for start in range(prompt.shape[1], length, block_length):
            stop = start + block_length
            n0 = (x[:, start:stop] == self.mask_token_id).sum(1)
            # A schedule ends; with a threshold a step commits one token at least, unless it proposes the mask token.
            most = steps if policy.gate == "none" else int((x[:, :stop] == self.mask_token_id).sum()) + 2
            for i in count():
                done = not (x[:, start:stop] == self.mask_token_id).any()
                if done and i >= (1 if cache is None else 2):  # with a cache the programs take two steps at least
                    break
                if i >= most:
                    raise RuntimeError(
                        f"tokens: expected no masks after {most} steps; the original fails, or never ends"
                    )
                first = 0 if cache is None or i == 0 else start
                last = stop if cache == "dual" and i else length
                if cache is None:
                    logits = self.forward(x)
                else:  # the first step fills the cache
                    logits = self.forward(x[:, first:last], first, cache=storage, replace=cache == "dual" or i == 0)
                nfe += 1
                x[:, first:stop] = tt.remask(
                    logits[:, : stop - first],
                    x[:, first:stop],
                    mask_token_id=self.mask_token_id,
                    policy=policy,
                    step=i,
                    num_steps=steps,
                    initial_num_masked=n0,
                ).tokens
        return x, nfe
