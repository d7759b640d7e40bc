"""What a TwoTower costs before anyone runs it; `python -m bench.predict` prints it.

A pass through a tower is a list of operations (bench/costs/costs.py). Each takes as long as its bytes need at the speed
of memory or its FLOPs at the speed of matrix products, whichever is longer, and a launch; nothing overlaps, and nothing
stays in a cache from one operation to the next. docs/cost_model.md compares this with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.costs.costs import Cost
from twotower_kernels.bench.costs.machines import Machine
from twotower_kernels.bench.sizes.configs import CONFIG
from twotower_kernels.model.layout import tower_of
from twotower_kernels.model.memory import kv_per_token, state_per_row

FREQUENCIES = 256  # inputs of the time embedding


@dataclass(frozen=True)
class Call:
    op: str
    cost: Cost
    dtype: str = "bfloat16"

    def seconds(self, machine: Machine) -> float:
        moving, computing = self.cost.bytes / machine.read, self.cost.flops / machine.flops[self.dtype]
        return max(moving, computing) + machine.launch


def forward(
    c: tt.TwoTowerConfig,
    tower: str,
    batch: int,
    length: int,
    context: int,
    *,
    heads: int | None = None,
    hit: float | None = None,
    dtype: str = "bfloat16",
) -> list[Call]:
    """The operations of one pass of `length` new tokens per row through a tower.

    Args:
        tower: "denoiser" (the block sees itself whole, nothing is kept) or "context" (causal, states are returned).
        context: tokens per row before these.
        heads: positions per row whose logits are computed; None: all for the denoiser, none for the context tower.
        hit: distinct experts in use per layer; None: as even routing would have it.
        dtype: of weights and activations.
    """
    if tower not in ("denoiser", "context"):
        raise ValueError(f"tower: expected 'denoiser' or 'context', got {tower!r}")
    itemsize, rows, h = getattr(torch, dtype).itemsize, batch * length, c.hidden_size
    denoiser = tower == "denoiser"
    calls: list[Call] = []

    def add(op: str, cost: Cost) -> None:
        calls.append(Call(op, cost, costs.arithmetic(op, dtype)))

    def product(inputs: int, outputs: int, count: int = rows) -> None:
        add("linear", costs.linear(count, inputs, outputs, itemsize))

    for letter in c.hybrid_override_pattern:
        add("adaln", costs.gated_residual_adaln_norm(rows, h, itemsize))
        if letter == "M":
            scan = batch, length, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups, c.conv_kernel
            product(h, c.mamba_inner + c.mamba_channels + c.mamba_num_heads)
            add("mamba2_scan", costs.mamba2_scan(*scan, context > 0, not denoiser, itemsize))
            add("gated_rms_norm", costs.gated_rms_norm(rows, c.mamba_inner, itemsize))
            product(c.mamba_inner, h)
        elif letter == "*":
            sizes = batch, length, context, c.num_attention_heads, c.num_key_value_heads, c.head_dim, itemsize
            for some in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads):
                product(h, some * c.head_dim)
            add("attention", costs.block_attention(*sizes) if denoiser else costs.causal_attention(*sizes))
            if not denoiser:
                add("append_kv", costs.append_kv(batch, length, c.num_key_value_heads, c.head_dim, itemsize))
            product(c.num_attention_heads * c.head_dim, h)
        elif letter == "E":
            e, k = c.n_routed_experts, c.num_experts_per_tok
            shared = c.moe_shared_expert_intermediate_size if c.n_shared_experts else 0
            some_hit = costs.experts_hit(e, k, rows) if hit is None else hit
            add("moe_router", costs.moe_router(rows, h, e, itemsize))
            experts = costs.moe_experts(rows, h, c.moe_intermediate_size, k, some_hit, shared, itemsize=itemsize)
            add("moe_experts", experts)
        else:
            product(h, c.intermediate_size)
            product(c.intermediate_size, h)
    if denoiser:  # the noise level becomes the modulation of all layers
        for inputs, outputs in ((FREQUENCIES, h), (h, h), (h, 3 * h)):
            product(inputs, outputs, batch)
    positions = (length if denoiser else 0) if heads is None else heads
    if positions:
        add("adaln", costs.adaln_norm(batch * positions, h, itemsize))
        add("lm_head", costs.linear(batch * positions, h, c.vocab_size, itemsize))
    return calls


def total(calls: Sequence[Call]) -> Cost:
    return sum((call.cost for call in calls), Cost(0, 0))


def seconds(calls: Sequence[Call], machine: Machine) -> float:
    return sum(call.seconds(machine) for call in calls)


@lru_cache(maxsize=8)
def weights(c: tt.TwoTowerConfig, dtype: str = "bfloat16") -> dict[str, int]:
    """Bytes of each tower's parameters."""
    model = tt.TwoTowerModel(c, device="meta", dtype=getattr(torch, dtype))
    found = {"context": 0, "denoiser": 0}
    for name, p in model.named_parameters():
        found[tower_of(name)] += p.numel() * p.element_size()
    return found


@dataclass(frozen=True)
class Prediction:
    """Seconds of a batch's passes, and what follows from them.

    Attributes:
        step: a denoiser call on a block. remask: the choice after it. commit: a finished block through the context
            tower, and across the link if the towers are apart.
        ar: one token by the context tower alone. mock_ar: one by the denoiser, and its commit.
        memory: bytes per device of weights and context, without spare room, activations or what a system needs.
    """

    batch: int
    block: int
    step: float
    remask: float
    commit: float
    ar: float
    mock_ar: float
    memory: tuple[int, ...]

    def diffusion_rate(self, tokens_per_nfe: float) -> float:
        """Tokens per second of the batch by block diffusion, every row at so many tokens per denoiser call."""
        return self.batch / ((self.step + self.remask) / tokens_per_nfe + self.commit / self.block)

    @property
    def ar_rate(self) -> float:
        return self.batch / self.ar

    @property
    def break_even(self) -> float | None:
        """The tokens per NFE from which block diffusion is faster than the context tower alone; None: a whole block
        per call would not be."""
        spare = self.ar - self.commit / self.block
        found = (self.step + self.remask) / spare if spare > 0 else self.block + 1.0
        return found if found <= self.block else None


def predict(
    c: tt.TwoTowerConfig,
    machine: Machine,
    batch: int = 1,
    context: int = 4096,
    block: int = 16,
    dtype: str = "bfloat16",
    apart: bool = False,
    hit: float | None = None,
) -> Prediction:
    """Sampling and greedy choice cost the same here: the logits, read once in float32. `hit`: distinct experts that a
    batch of blocks uses per layer; None: as even routing would have it."""

    def taken(tower: str, length: int, heads: int | None = None, hit: float | None = None) -> float:
        return seconds(forward(c, tower, batch, length, context, heads=heads, hit=hit, dtype=dtype), machine)

    def chosen(length: int) -> float:
        return Call("remask", costs.remask(batch, length, c.vocab_size), "float32").seconds(machine)

    itemsize = getattr(torch, dtype).itemsize
    kv, state = kv_per_token(c, itemsize), state_per_row(c, itemsize)

    def sent(length: int) -> float:
        return batch * (length * kv + state) / machine.link if apart else 0.0

    held, of = batch * (context * kv + state), weights(c, dtype)
    memory = tuple(of[t] + held for t in ("context", "denoiser")) if apart else (sum(of.values()) + held,)
    return Prediction(
        batch=batch,
        block=block,
        step=taken("denoiser", block, hit=hit),
        remask=chosen(block),
        commit=taken("context", block, hit=hit) + sent(block),
        ar=taken("context", 1, heads=1) + chosen(1),
        mock_ar=taken("denoiser", 1) + chosen(1) + taken("context", 1) + sent(1),
        memory=memory,
    )


@dataclass(frozen=True)
class Checked:
    """A measured case beside its prediction, in seconds."""

    op: str
    shape: str
    dtype: str
    predicted: float
    measured: float


def check(run: dict[str, Any], machine: Machine) -> list[Checked]:
    """Every case of a saved run, predicted for the machine that it ran on."""
    found = []
    for result in run["results"]:
        op, shape, dtype = result["op"], result["shape"], result["dtype"]
        sizes = result["sizes"]
        if op == "denoiser step":
            calls = forward(CONFIG, "denoiser", sizes["batch"], sizes["block"], sizes["context"], dtype=dtype)
        elif op == "prefill":
            calls = forward(CONFIG, "context", sizes["batch"], sizes["length"], 0, dtype=dtype)
        else:
            calls = [Call(op, Cost(result["bytes"], result["flops"]), costs.arithmetic(op, dtype))]
        measured = result["seconds"]["twotower_kernels"]["median"]
        found.append(Checked(op, shape, dtype, seconds(calls, machine), measured))
    return found
