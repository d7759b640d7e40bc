"""Launchers of the router's kernels, `csrc/cuda/moe_*.cu`, with the arguments of the ops in `ops/moe.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda.build import Kernel
from twotower_kernels.ops.moe import empty_choice, empty_logits
from twotower_kernels.ops.moe_plans import empty_plan

TILE = 4  # tokens, and experts, of a block of moe_gate
LARGE_TILE = 32  # of a block of moe_gate_tiled
MANY_LOGITS = 1 << 16  # from 512 tokens of 128 experts on, large tiles take less time
MOST_EXPERTS = 1024  # for whose scratch there is room in any case
ONE_BLOCK = 64  # tokens that one block routes and plans: a bit for each
PLANNED_PAIRS = 4096  # by a block, if there are several
MOST_PLANNERS = 128  # blocks: about one for every processor, and each reads what all have counted
_NUMBERS = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    logits = empty_logits(x, gate_weight)
    if logits.numel() >= MANY_LOGITS:
        _gate_tiled(x, gate_weight, logits)
    elif logits.numel():
        _gate(x, gate_weight, logits)
    return logits


def _gate(x: Tensor, gate_weight: Tensor, logits: Tensor) -> None:
    (n, h), e = x.shape, len(gate_weight)
    warps = max(1, min(8, -(-h // (32 * 4))))  # a thread waits for 4 numbers of a row at a time
    factors: list[cuda.Argument] = []
    for factor in (x, gate_weight):
        factors += factor, cuda.DTYPES.index(factor.dtype), *factor.stride()
    shared = 8 * TILE * TILE * warps
    grid = -(-n // TILE) * -(-e // TILE)
    cuda.launch(Kernel("moe_gate", "moe_gate_kernel"), grid, 32 * warps, shared, (*factors, logits, n, e, h))


def _gate_tiled(x: Tensor, gate_weight: Tensor, logits: Tensor) -> None:
    (n, h), e = x.shape, len(gate_weight)
    kernel = Kernel("moe_gate_tiled", "moe_gate_tiled_kernel", _factors(x.dtype, gate_weight.dtype))
    shared = 2 * 8 * 2 * LARGE_TILE * (LARGE_TILE + 2)  # two buffers with a stage of both factors each
    grid = -(-n // LARGE_TILE) * -(-e // LARGE_TILE)
    cuda.launch(kernel, grid, 128, shared, (x, *x.stride(), gate_weight, *gate_weight.stride(), logits, n, e, h))


def moe_route(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    routing = _Routing(logits, *arguments)
    routing.launch()
    return routing.weights, routing.experts


def moe_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    counts, offsets, pairs = plan = empty_plan(experts, num_experts)
    n, top_k = experts.shape
    # Shared memory is [rows, E]: a count of every expert for every warp, and one row for the experts' offsets.
    most_rows = cuda.SHARED_LIMIT // (4 * max(num_experts, 1))
    if most_rows < 2:
        most = cuda.SHARED_LIMIT // 8
        raise NotImplementedError(f"moe_plan on cuda: expected at most {most} experts, got {num_experts}")
    # With several blocks there is a row for the counts of those before.
    blocks = 1 if most_rows < 3 else max(1, min(MOST_PLANNERS, n * top_k // PLANNED_PAIRS))
    common_rows = 1 if blocks == 1 else 2
    warps = max(1, min(32, most_rows - common_rows, -(-n * top_k // (32 * blocks))))
    choices: list[cuda.Argument] = [experts, cuda.DTYPES.index(experts.dtype), *experts.stride(), n, top_k, num_experts]
    block_counts = None
    if blocks > 1:
        block_counts = experts.new_empty((blocks, num_experts), dtype=torch.int32)
        count = Kernel("moe_plan", "moe_plan_count_kernel")
        cuda.launch(count, blocks, 32 * warps, 4 * num_experts, (*choices, block_counts))
    shared = 4 * num_experts * (common_rows + warps)
    choices += counts, offsets, pairs, block_counts
    cuda.launch(Kernel("moe_plan", "moe_plan_kernel"), blocks, 32 * warps, shared, choices)
    return plan


def moe_route_plan(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_route`, with its arguments, and the `moe_plan` of its experts: one launch up to 64 tokens, else two
    or three."""
    routing = _Routing(logits, *arguments)
    if len(logits) > ONE_BLOCK:
        routing.launch()
        return routing.weights, routing.experts, *moe_plan(routing.experts, logits.shape[1])
    plan = empty_plan(routing.experts, logits.shape[1])
    routing.launch(plan)
    return routing.weights, routing.experts, *plan


def moe_router(x: Tensor, gate_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return moe_route_plan(moe_gate(x, gate_weight), *arguments)


class _Options(NamedTuple):
    """Of `moe_route`, in the order of its schema."""

    top_k: int
    softmax: bool
    n_group: int
    topk_group: int
    renormalize: bool
    scaling: float
    exclude_dropped: bool


class _Routing:
    """The results of a choice, and how to launch it."""

    def __init__(self, logits: Tensor, bias: Tensor | None, scale: Tensor | None, *options: Any) -> None:
        e = logits.shape[1]
        if e > MOST_EXPERTS:
            raise NotImplementedError(f"moe_route on cuda: expected at most {MOST_EXPERTS} experts, got {e}")
        self.logits, self.bias, self.scale, self.options = logits, bias, scale, _Options(*options)
        self.weights, self.experts = empty_choice(logits, self.options.top_k)

    def arguments(self) -> list[cuda.Argument]:
        """Of both kernels, as `Routing` in moe_route.cu takes them."""
        logits, options = self.logits, self.options
        vectors: list[cuda.Argument] = []
        for vector in (self.bias, self.scale):
            layout = (0, 0) if vector is None else (cuda.DTYPES.index(vector.dtype), vector.stride(0))
            vectors += vector, *layout
        tensors = (logits, *logits.stride(), *vectors, self.weights, self.experts)
        return [*tensors, *logits.shape, *options._replace(scaling=float(options.scaling))]

    def launch(self, plan: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        (n, e), options = self.logits.shape, self.options
        # A warp's scratch: scores, keys, groups, chosen experts; rounded up to whole words.
        computed = 8 if self.logits.dtype == torch.float64 else 4  # bytes of a score
        scratch = (2 * e + options.n_group) * computed + 4 * options.top_k
        scratch = -(-scratch // 8) * 8
        common = 0 if plan is None else 8 * (e + (e + 1) // 2)  # masks and starts
        wanted = 4 if plan is None else 16
        warps = max(1, min(wanted, n, (cuda.SHARED_LIMIT - common) // scratch))
        if plan is None and n == 0:
            return
        grid = 1 if plan is not None else -(-n // warps)
        name = "moe_route_kernel" if plan is None else "moe_route_plan_kernel"
        kernel = Kernel("moe_route", name, _defines(self.logits.dtype))
        cuda.launch(kernel, grid, 32 * warps, common + warps * scratch, (*self.arguments(), *(plan or ())))


def _defines(dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    return (("STORED", _NUMBERS[dtype]), ("LOGIT", "double" if dtype == torch.float64 else "float"))


def _factors(x: torch.dtype, weight: torch.dtype) -> tuple[tuple[str, str], ...]:
    return (("X_TYPE", _NUMBERS[x]), ("WEIGHT_TYPE", _NUMBERS[weight]))


def builds() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of everything that the launchers ask for."""
    yield "moe_gate", ()
    for x, weight in itertools.product(_NUMBERS, repeat=2):
        yield "moe_gate_tiled", _factors(x, weight)
    yield "moe_plan", ()
    for dtype in _NUMBERS:
        yield "moe_route", _defines(dtype)
