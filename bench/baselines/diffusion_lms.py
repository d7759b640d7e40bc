"""Four diffusion language models as their authors write them: dense masks, caches that are concatenated, heads that
are expanded, a loop over experts, a softmax over the vocabulary, positions chosen row by row. `bench.drop_in` times
them, and they judge `examples/` at sizes that no recording has.

Sources: JetAstra/SDAR (generate.py, modeling_sdar.py), NVlabs/Fast-dLLM (llada, dream), inclusionAI/dInfer
(modeling_llada2_moe.py, parallel_strategy.py). Each takes the original's configuration and weights by their names.
Where a program samples, the most likely token is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]
Cache = list[tuple[Tensor, Tensor]]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def angles(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, dim] of positions [S], each half alike."""
    frequencies = positions.float()[:, None] / theta ** (torch.arange(0, dim, 2).float() / dim)
    both = torch.cat((frequencies, frequencies), -1)
    return both.cos(), both.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], its first `cos.shape[-1]` channels rotated."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Heads first, keys and values expanded; `mask` bool [S, T]. Returns [B, S, H · D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def block_mask(length: int, block: int) -> Tensor:
    """Block-causal, bool [length, length]."""
    blocks = torch.arange(length) // block
    return blocks[:, None] >= blocks[None, :]


class Llama:
    """What SDAR, Dream and LLaDA2 share: names `model.layers.N`, pre-norm blocks, half-split RoPE."""

    attention = "self_attn"
    embedding = "embed_tokens"

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        self.config, self.weights, self.mask = config, weights, mask_token_id
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def mlp(self, x: Tensor, name: str) -> Tensor:
        act = ACTIVATIONS[self.config["hidden_act"]]
        gate, up = (self.linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self.linear(act(gate) * up, f"{name}.down_proj")

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        return self.mlp(x, f"model.layers.{layer}.mlp")

    def heads_first(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def qkv(self, x: Tensor, name: str) -> list[Tensor]:
        return [self.heads_first(self.linear(x, f"{name}.{part}_proj")) for part in "qkv"]

    def __call__(
        self, tokens: Tensor, mask: Tensor | None, start: int = 0, cache: Cache | None = None, store: bool = False
    ) -> Tensor:
        """Logits [B, S, V]; keys and values behind the cache's, which `store` replaces."""
        x = self.weights[f"model.{self.embedding}.weight"][tokens]
        turn = int(self.dim * self.config.get("partial_rotary_factor", 1.0))
        positions = torch.arange(start, start + tokens.shape[1])
        cos, sin = angles(positions, turn, self.config["rope_theta"])
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            q, k, v = self.qkv(self.norm(x, f"{name}.input_layernorm"), f"{name}.{self.attention}")
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            if cache is not None:
                if layer < len(cache):
                    k, v = torch.cat((cache[layer][0], k), 2), torch.cat((cache[layer][1], v), 2)
                if store:
                    cache[layer : layer + 1] = [(k, v)]
            x = x + self.linear(attend(q, k, v, mask), f"{name}.{self.attention}.{self.output}")
            x = x + self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), layer)
        x = self.norm(x, "model.norm")
        tied = "lm_head.weight" not in self.weights
        return F.linear(x, self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"])

    output = "o_proj"


class Sdar(Llama):
    def qkv(self, x: Tensor, name: str) -> list[Tensor]:
        q, k, v = super().qkv(x, name)
        return [self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm"), v]

    def unmask(
        self,
        logits: Tensor,
        block: Tensor,
        quota: int,
        strategy: str,
        confidence_threshold: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        """A step's tokens, written into the block."""
        masked = block == self.mask
        p, candidate = F.softmax(logits.float() / temperature, -1).max(-1)
        confidence = torch.where(masked, p, -torch.inf)
        take = torch.zeros_like(masked)
        for row in range(len(block)):
            if strategy == "sequential":
                first = int(masked[row].nonzero()[0])
                take[row, first : first + quota] = True
                continue
            if strategy == "low_confidence_dynamic":
                high = confidence[row] > confidence_threshold
                if high.sum() >= quota:
                    take[row] = high
                    continue
            take[row, confidence[row].topk(quota).indices] = True
        block[take] = candidate[take]

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
    ) -> tuple[Tensor, int]:
        """`block_diffusion_generate`. Returns the tokens and how many steps denoised."""
        length = -(-(prompt.shape[1] + gen_length) // block_length) * block_length
        mask = block_mask(length, block_length)
        x = F.pad(prompt, (0, length - prompt.shape[1]), value=self.mask)
        prefilled = prompt.shape[1] // block_length * block_length
        cache: Cache = []
        if prefilled:
            self(x[:, :prefilled], mask[:prefilled, :prefilled], 0, cache, store=True)
        quota = [block_length // denoising_steps + (i < block_length % denoising_steps) for i in range(denoising_steps)]
        nfe = 0
        for start in range(prefilled, length, block_length):
            stop = start + block_length
            block, seen = x[:, start:stop].clone(), mask[start:stop, :stop]
            for step in range(denoising_steps + 1):
                masked = block == self.mask
                if not masked.any():
                    self(block, seen, start, cache, store=True)
                    break
                logits = self(block, seen, start, cache)
                self.unmask(logits, block, quota[step], strategy, confidence_threshold, temperature)
                nfe += 1
            x[:, start:stop] = block
        return x, nfe


class Llada2(Llama):
    attention, embedding, output = "attention", "word_embeddings", "dense"

    def qkv(self, x: Tensor, name: str) -> list[Tensor]:
        fused = self.heads_first(self.linear(x, f"{name}.query_key_value"))
        q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return [self.norm(q, f"{name}.query_layernorm"), self.norm(k, f"{name}.key_layernorm"), v]

    def route(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        groups, kept, top = (self.config[name] for name in ("n_group", "topk_group", "num_experts_per_tok"))
        scores = logits.sigmoid()
        choice = scores + bias
        of_groups = choice.unflatten(1, (groups, -1)).topk(2, -1).values.sum(-1)
        keep = torch.zeros_like(of_groups).scatter(1, of_groups.topk(kept, -1).indices, 1).bool()
        keep = keep.repeat_interleave(choice.shape[1] // groups, 1)
        experts = choice.masked_fill(~keep, -torch.inf).topk(top, -1).indices
        weights = scores.gather(1, experts)
        if top > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config["routed_scaling_factor"], experts

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        name = f"model.layers.{layer}.mlp"
        if layer < self.config["first_k_dense_replace"]:
            return self.mlp(x, name)
        rows = x.flatten(0, 1)
        logits = F.linear(rows.float(), self.weights[f"{name}.gate.weight"].float())
        weights, experts = self.route(logits, self.weights[f"{name}.gate.expert_bias"])
        out = torch.zeros_like(rows)
        w13, w2 = (self.weights[f"{name}.experts.{part}_weight"] for part in ("w13", "w2"))
        for expert in range(len(w13)):
            row, choice = (experts == expert).nonzero(as_tuple=True)
            if len(row):
                gate, up = F.linear(rows[row], w13[expert]).chunk(2, -1)
                result = F.linear(F.silu(gate) * up, w2[expert]) * weights[row, choice, None].to(x.dtype)
                out.index_add_(0, row, result)
        if self.config["num_shared_experts"]:
            out = out + self.mlp(rows, f"{name}.shared_experts")
        return out.view_as(x)

    def unmask(self, logits: Tensor, block: Tensor, threshold: float) -> Tensor:
        """The tokens after a step of `ThresholdParallelDecoder`."""
        p, candidate = F.softmax(logits.float(), -1).max(-1)
        masked = (block == self.mask) & (candidate != self.mask)
        confidence = torch.where(masked, p, -torch.inf)
        bound = (confidence.amax(1, keepdim=True) - 1e-5).clamp(-1000, threshold)
        return torch.where(masked & (confidence >= bound), candidate, block)

    @torch.no_grad()
    def generate(self, prompt: Tensor, *, blocks: int, block_length: int, threshold: float) -> tuple[Tensor, int]:
        """Block diffusion with `ThresholdParallelDecoder`; the prefix is computed again before every block."""
        x, nfe = prompt, 0
        for _ in range(blocks):
            start = x.shape[1]
            cache: Cache = []
            if start:
                self(x, block_mask(start, block_length), 0, cache, store=True)
            block = x.new_full((len(x), block_length), self.mask)
            while (block == self.mask).any():
                block = self.unmask(self(block, None, start, cache), block, threshold)
                nfe += 1
            x = torch.cat((x, block), 1)
        return x, nfe


class Dream(Llama):
    def unmask(self, logits: Tensor, tokens: Tensor, alg: str, step: int, steps: int, eps: float = 1e-3) -> Tensor:
        """The tokens after a step."""
        times = torch.linspace(1, eps, steps + 1)
        masked = tokens == self.mask
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)[masked]
        probs = logits.float().softmax(-1)
        score, candidate = probs.max(-1)
        if alg == "topk_margin":
            first, second = probs.sort(-1, descending=True).values[:, :2].unbind(-1)
            score = first - second
        elif alg == "entropy":
            score = (probs * torch.log(probs + 1e-10)).sum(-1)
        count = masked.sum() / len(tokens)
        quota = int(count * (1 - times[step + 1] / times[step])) if step < steps - 1 else int(count)
        if not quota:
            return tokens
        confidence = torch.full(tokens.shape, -torch.inf).masked_scatter(masked, score)
        proposed = torch.full_like(tokens, self.mask).masked_scatter(masked, candidate)
        chosen = confidence.topk(quota).indices
        return tokens.scatter(1, chosen, proposed.gather(1, chosen))

    @torch.no_grad()
    def generate(self, prompt: Tensor, *, alg: str, steps: int, new_tokens: int) -> tuple[Tensor, int]:
        """`diffusion_generate` at temperature 0."""
        x = F.pad(prompt, (0, new_tokens), value=self.mask)
        for step in range(steps):
            x = self.unmask(self(x, None), x, alg, step, steps)
        return x, steps


class Llada:
    """Its caches hold keys before rotation, so that all of them are rotated in every step."""

    def __init__(self, config: Config, weights: Weights, mask_token_id: int) -> None:
        self.config, self.weights, self.mask = config, weights, mask_token_id
        self.heads = config["n_heads"]
        self.dim = config["d_model"] // self.heads

    def linear(self, x: Tensor, name: str) -> Tensor:
        name = f"model.transformer.{name}"
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        out = rms(x, self.weights[f"model.transformer.{name}.weight"], self.config["rms_norm_eps"])
        bias = self.weights.get(f"model.transformer.{name}.bias")
        return out if bias is None else out + bias

    def __call__(
        self, tokens: Tensor, cache: Cache | None = None, replace: slice | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits [B, S, V] and keys and values of all layers, behind the cache's or in the place `replace` of them."""
        x, present = self.weights["model.transformer.wte.weight"][tokens], []
        act = ACTIVATIONS[self.config["activation_type"]]
        for layer in range(self.config["n_layers"]):
            name = f"blocks.{layer}"
            normed = self.norm(x, f"{name}.attn_norm")
            q, k, v = (self.linear(normed, f"{name}.{part}_proj") for part in "qkv")
            if self.config.get("attention_layer_norm"):
                q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
            q, k, v = (y.unflatten(-1, (-1, self.dim)).transpose(1, 2) for y in (q, k, v))
            if cache is not None and replace is not None:
                past_k, past_v = cache[layer]
                past_k[:, :, replace], past_v[:, :, replace] = k, v
                k, v = past_k, past_v
            elif cache is not None:
                k, v = torch.cat((cache[layer][0], k), 2), torch.cat((cache[layer][1], v), 2)
            present.append((k, v))
            cos, sin = angles(torch.arange(k.shape[2]), self.dim, self.config["rope_theta"])
            end = k.shape[2] if replace is None else replace.stop
            own = slice(end - q.shape[2], end)
            q, k = rotated(q, cos[own], sin[own]), rotated(k, cos, sin)
            x = x + self.linear(attend(q, k, v, None), f"{name}.attn_out")
            normed = self.norm(x, f"{name}.ff_norm")
            hidden = act(self.linear(normed, f"{name}.ff_proj")) * self.linear(normed, f"{name}.up_proj")
            x = x + self.linear(hidden, f"{name}.ff_out")
        x = self.norm(x, "ln_f")
        head = "wte" if self.config["weight_tying"] else "ff_out"
        return self.linear(x, head), present

    def unmask(
        self, logits: Tensor, tokens: Tensor, masked: Tensor, quota: Tensor | None, threshold: float | None
    ) -> Tensor:
        """`get_transfer_index`, carried out: the tokens after a step."""
        candidate = logits.argmax(-1)
        p = F.softmax(logits.double(), -1).gather(-1, candidate[..., None])[..., 0]
        confidence = torch.where(masked, p, -torch.inf)
        take = torch.zeros_like(masked)
        for row in range(len(tokens)):
            count = int(masked[row].sum()) if quota is None else int(quota[row])
            best = confidence[row].topk(count).indices
            take[row, best] = True
            if threshold is not None:
                for k in best[1:]:
                    take[row, k] = bool(confidence[row, k] >= threshold)
        return torch.where(take & masked, candidate, tokens)

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
    ) -> tuple[Tensor, int]:
        """`generate`, `generate_with_prefix_cache` or `generate_with_dual_cache`, at temperature 0."""
        x = F.pad(prompt, (0, gen_length), value=self.mask)
        steps, nfe = steps // (gen_length // block_length), 0
        for start in range(prompt.shape[1], x.shape[1], block_length):
            stop = start + block_length
            n0 = (x[:, start:stop] == self.mask).sum(1)
            quotas = [n0 // steps + (i < n0 % steps) for i in range(steps)]

            def step(logits: Tensor, tokens: Tensor, i: int, end: int, quotas: list[Tensor] = quotas) -> Tensor:
                masked = tokens == self.mask
                masked[:, end:] = False
                return self.unmask(logits, tokens, masked, quotas[i] if threshold is None else None, threshold)

            i, past = 0, None
            while True:
                if cache is None or i == 0:
                    logits, past = self(x)
                    x = step(logits, x, i, stop)
                    if cache == "prefix":
                        past = [(k[:, :, :start], v[:, :, :start]) for k, v in past]
                elif cache == "prefix":
                    logits, _ = self(x[:, start:], past)
                    x = torch.cat((x[:, :start], step(logits, x[:, start:], i, block_length)), 1)
                else:
                    logits, _ = self(x[:, start:stop], past, slice(start, stop))
                    x = torch.cat((x[:, :start], step(logits, x[:, start:stop], i, block_length), x[:, stop:]), 1)
                nfe, i = nfe + 1, i + 1
                done = not (x[:, start:stop] == self.mask).any()
                if done and (cache is None or i > 1):  # with a cache, a block has two steps at least
                    break
        return x, nfe
