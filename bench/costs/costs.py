"""What every operation must move and compute at the least: the one definition that benchmarks and cost model share.

Bytes are those of main memory if nothing is kept in a cache between two operations: each input is read once and each
output written once. FLOPs count a multiplication and an addition as two; an exponential, a root or a comparison is one.
Sizes are plain integers; `itemsize` is the width of an element of activations and weights in bytes, 2 for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """bytes: moved, of which `weights` are parameters. flops: computed."""

    bytes: int
    flops: int
    weights: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.weights + other.weights)


def arithmetic(op: str, dtype: str) -> str:
    """The dtype whose speed bounds an operation on data of this dtype: a scan's state is never rounded, nor a router's
    product."""
    return {"mamba2_scan": "float32", "moe_router": "float64"}.get(op, dtype)


def linear(rows: int, inputs: int, outputs: int, itemsize: int = 2) -> Cost:
    """`[rows, inputs] · [outputs, inputs]ᵀ`."""
    weights = inputs * outputs * itemsize
    return Cost(weights + rows * (inputs + outputs) * itemsize, 2 * rows * inputs * outputs, weights)


def block_attention(
    batch: int, block: int, context: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2
) -> Cost:
    """Every query sees the context and the whole block: two products of 2·D FLOPs per query, head and key."""
    keys = batch * (context + block)
    elements = 2 * keys * kv_heads * head_dim + 2 * batch * block * heads * head_dim
    return Cost(elements * itemsize, 4 * block * keys * heads * head_dim)


def causal_attention(
    batch: int, block: int, context: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2
) -> Cost:
    """Query i of the block sees the context and the keys 0 to i of the block."""
    whole = block_attention(batch, block, context, heads, kv_heads, head_dim, itemsize)
    pairs = batch * (block * context + block * (block + 1) // 2)
    return Cost(whole.bytes, 4 * pairs * heads * head_dim)


def append_kv(batch: int, block: int, kv_heads: int, head_dim: int, itemsize: int = 2) -> Cost:
    """Keys and values, read and written."""
    return Cost(4 * batch * block * kv_heads * head_dim * itemsize, 0)


def experts_hit(experts: int, top_k: int, tokens: int) -> float:
    """How many of E experts at least one of N tokens chooses, on average, if each chooses k of them evenly:
    E (1 - (1 - k / E)^N). A trained router is not even, and hits fewer."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def moe_router(tokens: int, hidden: int, experts: int, itemsize: int = 2, weight_itemsize: int = 4) -> Cost:
    """The router's product in float64. The choice of k among E is nothing beside it."""
    weights = experts * hidden * weight_itemsize
    return Cost(weights + tokens * hidden * itemsize, 2 * tokens * hidden * experts, weights)


def moe_experts(
    tokens: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    hit: float,
    shared: int = 0,
    gated: bool = False,
    itemsize: int = 2,
) -> Cost:
    """Up and down projection (with a gate: two up) of the `hit` experts in use, and of a shared expert of so many."""
    matrices = 3 if gated else 2
    weights = int(matrices * hidden * (hit * intermediate + shared) * itemsize)
    flops = 2 * tokens * matrices * hidden * (top_k * intermediate + shared)
    return Cost(weights + 2 * tokens * hidden * itemsize, flops, weights)


def mamba2_scan(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    state: int,
    groups: int,
    kernel: int = 4,
    seeded: bool = True,
    returned: bool = False,
    itemsize: int = 2,
) -> Cost:
    """Convolution and scan; `seeded` reads the states before, `returned` writes those after. The recurrence itself:
    per token and element of the float32 state, two products and a sum to move it on, a product and a sum to read it."""
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    states = batch * (inner * state * 4 + channels * (kernel - 1) * itemsize)
    moved = batch * length * (channels + heads + inner) * itemsize
    flops = batch * length * (2 * channels * kernel + 5 * inner * state)
    return Cost((seeded + returned) * states + moved, flops)


def gated_rms_norm(rows: int, width: int, itemsize: int = 2) -> Cost:
    """y and z in, one out; SiLU and gate 5, squares 2, scaling 2."""
    return Cost(3 * rows * width * itemsize, 9 * rows * width)


def adaln_norm(rows: int, hidden: int, itemsize: int = 2) -> Cost:
    """x in, one out; modulation 2, squares 2, scaling 2."""
    return Cost(2 * rows * hidden * itemsize, 6 * rows * hidden)


def gated_residual_adaln_norm(rows: int, hidden: int, itemsize: int = 2) -> Cost:
    """Residual and y in, residual and normed out; the gate's 2 and the norm's 6."""
    return Cost(4 * rows * hidden * itemsize, 8 * rows * hidden)


def remask(batch: int, block: int, vocabulary: int, itemsize: int = 4) -> Cost:
    """The logits, once; per logit a comparison, a difference, an exponential, a sum, and a product and a sum for the
    entropy."""
    logits = batch * block * vocabulary
    return Cost(logits * itemsize, 6 * logits)
