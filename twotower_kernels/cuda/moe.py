"""Launchers of the router's kernels, `csrc/cuda/moe_*.cu`, with the arguments of the ops in `ops/moe.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda.build import Kernel
from twotower_kernels.ops.moe import empty_choice, empty_logits, empty_plan

TILE = 4  # tokens, and experts, of a block of moe_gate
LARGE_TILE = 32  # of a block of moe_gate_tiled
MANY_LOGITS = 1 << 16  # from 512 tokens of 128 experts on, large tiles take less time
MOST_EXPERTS = 1024  # for whose scratch there is room in any case
ONE_BLOCK = 64  # tokens that one block routes and plans: a bit for each
PLANNED_PAIRS = 4096  # by a block, if there are several
MOST_PLANNERS = 128  # blocks: about one for every processor, and each reads what all have counted
_LOGITS = {torch.float64: "double", torch.float32: "float"}
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
    # A count of every expert for every warp, and one row for their starts, must fit.
    rows = cuda.SHARED_LIMIT // (4 * max(num_experts, 1))
    if rows < 2:
        most = cuda.SHARED_LIMIT // 8
        raise NotImplementedError(f"moe_plan on cuda: expected at most {most} experts, got {num_experts}")
    # With several blocks there is a row for the counts of those before.
    blocks = 1 if rows < 3 else max(1, min(MOST_PLANNERS, n * top_k // PLANNED_PAIRS))
    common = 1 if blocks == 1 else 2
    warps = max(1, min(32, rows - common, -(-n * top_k // (32 * blocks))))
    choices: list[cuda.Argument] = [experts, cuda.DTYPES.index(experts.dtype), *experts.stride(), n, top_k, num_experts]
    of_blocks = None
    if blocks > 1:
        of_blocks = experts.new_empty((blocks, num_experts), dtype=torch.int32)
        count = Kernel("moe_plan", "moe_plan_count_kernel")
        cuda.launch(count, blocks, 32 * warps, 4 * num_experts, (*choices, of_blocks))
    shared = 4 * num_experts * (common + warps)
    choices += counts, offsets, pairs, of_blocks
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


class _Routing:
    """The results of a choice, and how to launch it."""

    def __init__(
        self,
        logits: Tensor,
        bias: Tensor | None,
        top_k: int,
        softmax: bool,
        n_group: int,
        topk_group: int,
        renormalize: bool,
        scaling: float,
    ) -> None:
        n, e = logits.shape
        if e > MOST_EXPERTS:
            raise NotImplementedError(f"moe_route on cuda: expected at most {MOST_EXPERTS} experts, got {e}")
        self.weights, self.experts = empty_choice(logits, top_k)
        told_of_bias = (0, 0) if bias is None else (cuda.DTYPES.index(bias.dtype), bias.stride(0))
        self.arguments: tuple[cuda.Argument, ...] = (
            *(logits, *logits.stride(), bias, *told_of_bias, self.weights, self.experts),
            *(n, e, top_k, softmax, n_group, topk_group, renormalize, float(scaling)),
        )
        # A warp's scratch: scores, keys, groups, chosen experts; rounded up to whole words.
        self.scratch = -(-((2 * e + n_group) * logits.element_size() + 4 * top_k) // 8) * 8

    def launch(self, plan: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        logits, n, e = self.arguments[0], *self.weights.shape[:1], self.arguments[9]
        assert isinstance(logits, Tensor) and isinstance(e, int)
        common = 0 if plan is None else 8 * (e + (e + 1) // 2)  # masks and starts
        wanted = 4 if plan is None else 16
        warps = max(1, min(wanted, n, (cuda.SHARED_LIMIT - common) // self.scratch))
        if plan is None and n == 0:
            return
        grid = 1 if plan is not None else -(-n // warps)
        name = "moe_route_kernel" if plan is None else "moe_route_plan_kernel"
        kernel = Kernel("moe_route", name, _defines(logits.dtype))
        cuda.launch(kernel, grid, 32 * warps, common + warps * self.scratch, (*self.arguments, *(plan or ())))


def _defines(dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    return (("LOGIT", _LOGITS[dtype]),)


def _factors(x: torch.dtype, weight: torch.dtype) -> tuple[tuple[str, str], ...]:
    return (("X_TYPE", _NUMBERS[x]), ("WEIGHT_TYPE", _NUMBERS[weight]))


def builds() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of everything that the launchers ask for."""
    yield "moe_gate", ()
    for x, weight in itertools.product(_NUMBERS, repeat=2):
        yield "moe_gate_tiled", _factors(x, weight)
    yield "moe_plan", ()
    for dtype in _LOGITS:
        yield "moe_route", _defines(dtype)
