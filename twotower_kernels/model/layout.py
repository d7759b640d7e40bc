"""The released checkpoint's layout: which keys a config makes and of which shapes, by arithmetic.

A config of two lines can ask for 10⁹ experts. Here they are counted, not listed: a checkpoint is compared with what its
config asks for before anything of that size exists.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from twotower_kernels.model.layers import FREQUENCIES
from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.options.files import shown

STACKED = (".mixer.experts.up_proj", ".mixer.experts.down_proj")  # keys of a layer's experts in one tensor

Shape = tuple[int, ...]

# Indices as they are written: no leading zero, and not more digits than any of them has.
_LAYER = re.compile(r"(context_tower|denoiser_tower)\.layers\.(0|[1-9]\d{0,9})\.(.+)", re.ASCII)
_EXPERT = re.compile(r"(mixer\.experts)\.(0|[1-9]\d{0,9})\.(.+)", re.ASCII)
_TABLE = re.compile(r"scale_shift_tables\.(0|[1-9]\d{0,9})", re.ASCII)


def tower_of(key: str) -> str:
    """The tower that a key of the released layout belongs to: "context" or "denoiser"."""
    return "context" if key.startswith("context_") else "denoiser"


class Layout:
    """The keys of a model, and what is behind them.

    Args:
        config: the shape of its towers.
        towers: "both", "context" or "denoiser".
        conditioning: whether the denoiser has time conditioning. A backbone's checkpoint has none.
        stacked: whether a layer's experts are one tensor `[experts, ...]`, instead of one each.
    """

    def __init__(
        self, config: TwoTowerConfig, towers: str = "both", *, conditioning: bool = True, stacked: bool = False
    ) -> None:
        self.config, self.stacked = config, stacked
        self.towers = ("context", "denoiser") if towers == "both" else (towers,)
        self.conditioning = conditioning and "denoiser" in self.towers
        self._tops = {key: shape for tower in self.towers for key, shape in self._top(tower).items()}
        letters = Counter(config.hybrid_override_pattern)
        self._letters = letters
        self._layers = {letter: self._layer(letter) for letter in letters}
        self._experts = self._expert() if "E" in letters and not stacked else {}

    def __len__(self) -> int:
        """How many keys there are."""
        layers = sum(count * len(self._layers[letter]) for letter, count in self._letters.items())
        experts = self._letters["E"] * len(self._experts) * self.config.n_routed_experts
        tables = len(self.config.hybrid_override_pattern) if self.conditioning else 0
        return len(self._tops) + len(self.towers) * (layers + experts) + tables

    def __iter__(self) -> Iterator[str]:
        """The keys, one after the other: they may be many."""
        yield from self._tops
        for tower in self.towers:
            for i, letter in enumerate(self.config.hybrid_override_pattern):
                prefix = f"{tower}_tower.layers.{i}"
                for part in self._layers[letter]:
                    yield f"{prefix}.{part}"
                if letter == "E" and self._experts:
                    for j in range(self.config.n_routed_experts):
                        for part in self._experts:
                            yield f"{prefix}.mixer.experts.{j}.{part}"
        if self.conditioning:
            yield from (f"scale_shift_tables.{i}" for i in range(len(self.config.hybrid_override_pattern)))

    def shape(self, key: str) -> Shape | None:
        """The shape of what a key names; None: there is no such key."""
        layers = len(self.config.hybrid_override_pattern)
        if match := _TABLE.fullmatch(key):
            return (3, self.config.hidden_size) if self.conditioning and int(match[1]) < layers else None
        if not (match := _LAYER.fullmatch(key)):
            return self._tops.get(key)
        tower, index, part = match[1].removesuffix("_tower"), int(match[2]), match[3]
        if tower not in self.towers or index >= layers:
            return None
        letter = self.config.hybrid_override_pattern[index]
        if letter == "E" and (match := _EXPERT.fullmatch(part)):
            return self._experts.get(match[3]) if int(match[2]) < self.config.n_routed_experts else None
        return self._layers[letter].get(part)

    def numbers(self, tower: str) -> int:
        """How many numbers the weights of one tower are."""

        def of(shapes: dict[str, Shape]) -> int:
            return sum(map(math.prod, shapes.values()))

        layers = sum(count * of(self._layers[letter]) for letter, count in self._letters.items())
        experts = self._letters["E"] * of(self._experts) * self.config.n_routed_experts
        tables = 3 * self.config.hidden_size * len(self.config.hybrid_override_pattern)
        own = {key: shape for key, shape in self._tops.items() if tower_of(key) == tower}
        return of(own) + layers + experts + (tables if tower == "denoiser" and self.conditioning else 0)

    def __str__(self) -> str:
        """What makes it large, in words."""
        c = self.config
        experts = f" and {c.n_routed_experts} experts" if "E" in self._letters else ""
        return (
            f"a config of model_type {shown(c.model_type)} with vocab_size {c.vocab_size}, "
            f"hidden_size {c.hidden_size}, {len(c.hybrid_override_pattern)} layers{experts}"
        )

    # --- parts ------------------------------------------------------------------------------------------------------

    def _top(self, tower: str) -> dict[str, Shape]:
        vocabulary, hidden = self.config.vocab_size, self.config.hidden_size
        found: dict[str, Shape] = {
            f"{tower}_tower.embeddings.weight": (vocabulary, hidden),
            f"{tower}_tower.norm_f.weight": (hidden,),
            "context_lm_head.weight" if tower == "context" else "lm_head.weight": (vocabulary, hidden),
        }
        if tower == "denoiser" and self.conditioning:
            found |= {"t_embedder.mlp.0.weight": (hidden, 2 * FREQUENCIES), "t_embedder.mlp.0.bias": (hidden,)}
            found |= {"t_embedder.mlp.2.weight": (hidden, hidden), "t_embedder.mlp.2.bias": (hidden,)}
            found |= {"t_block.1.weight": (3 * hidden, hidden), "t_block.1.bias": (3 * hidden,)}
        return found

    def _layer(self, letter: str) -> dict[str, Shape]:
        """The keys of a layer after its index, without those of single experts."""
        mixer = {"M": self._mamba, "*": self._attention, "E": self._moe, "-": self._mlp}[letter]()
        return {"norm.weight": (self.config.hidden_size,)} | {f"mixer.{key}": shape for key, shape in mixer.items()}

    def _mamba(self) -> dict[str, Shape]:
        c = self.config
        heads, inner, channels = c.mamba_num_heads, c.mamba_inner, c.mamba_channels
        found: dict[str, Shape] = {
            "in_proj.weight": (inner + channels + heads, c.hidden_size),
            "conv1d.weight": (channels, 1, c.conv_kernel),
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (c.hidden_size, inner),
        }
        return found | ({"conv1d.bias": (channels,)} if c.use_conv_bias else {})

    def _attention(self) -> dict[str, Shape]:
        c = self.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return {
            "q_proj.weight": (queries, c.hidden_size),
            "k_proj.weight": (keys, c.hidden_size),
            "v_proj.weight": (keys, c.hidden_size),
            "o_proj.weight": (c.hidden_size, queries),
        }

    def _moe(self) -> dict[str, Shape]:
        c = self.config
        experts, inner, shared = c.n_routed_experts, c.moe_intermediate_size, c.moe_shared_expert_intermediate_size
        found: dict[str, Shape] = {
            "gate.weight": (experts, c.hidden_size),
            "gate.e_score_correction_bias": (experts,),
        }
        if c.n_shared_experts:
            found |= {f"shared_experts.{key}": shape for key, shape in self._feed_forward(shared).items()}
        if self.stacked:
            found |= {"experts.up_proj": (experts, inner, c.hidden_size)}
            found |= {"experts.down_proj": (experts, c.hidden_size, inner)}
        return found

    def _mlp(self) -> dict[str, Shape]:
        return self._feed_forward(self.config.intermediate_size)

    def _expert(self) -> dict[str, Shape]:
        """The keys of one expert after its index."""
        return self._feed_forward(self.config.moe_intermediate_size)

    def _feed_forward(self, inner: int) -> dict[str, Shape]:
        hidden = self.config.hidden_size
        return {"up_proj.weight": (inner, hidden), "down_proj.weight": (hidden, inner)}
