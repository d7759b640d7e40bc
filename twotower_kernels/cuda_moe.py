"""Launchers of the router's kernels, `csrc/cuda/moe_*.cu`, with the arguments of the ops in `ops/moe.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from twotower_kernels import cuda
from twotower_kernels.cuda import Kernel
from twotower_kernels.ops.moe import empty_choice, empty_logits, empty_plan

TILE = 4  # tokens, and experts, of a block of moe_gate
MOST_EXPERTS = 1024  # for whose scratch there is room in any case
ONE_BLOCK = 64  # tokens that one block routes and plans: a bit for each
_LOGITS = {torch.float64: "double", torch.float32: "float"}


def moe_gate(x: Tensor, gate_weight: Tensor) -> Tensor:
    logits = empty_logits(x, gate_weight)
    (n, h), e = x.shape, len(gate_weight)
    if logits.numel() == 0:
        return logits
    warps = max(1, min(8, -(-h // (32 * 4))))  # a thread waits for 4 numbers of a row at a time
    factors: list[cuda.Argument] = []
    for factor in (x, gate_weight):
        factors += factor, cuda.DTYPES.index(factor.dtype), *factor.stride()
    shared = 8 * TILE * TILE * warps
    grid = -(-n // TILE) * -(-e // TILE)
    cuda.launch(Kernel("moe_gate", "moe_gate_kernel"), grid, 32 * warps, shared, (*factors, logits, n, e, h))
    return logits


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
    warps = max(1, min(32, rows - 1, -(-n * top_k // 32)))
    arguments: tuple[cuda.Argument, ...] = (
        experts,
        cuda.DTYPES.index(experts.dtype),
        *experts.stride(),
        n,
        top_k,
        num_experts,
    )
    shared = 4 * num_experts * (1 + warps)
    cuda.launch(Kernel("moe_plan", "moe_plan_kernel"), 1, 32 * warps, shared, (*arguments, counts, offsets, pairs))
    return plan


def moe_route_plan(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_route`, with its arguments, and the `moe_plan` of its experts: one launch up to 64 tokens, else two."""
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


def builds() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Source and macros of everything that the launchers ask for."""
    yield "moe_gate", ()
    yield "moe_plan", ()
    for dtype in _LOGITS:
        yield "moe_route", _defines(dtype)
