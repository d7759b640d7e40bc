"""Which tokens go to which expert. Formula: `reference/moe.py`; kernels: `moe_route.cpp`, `moe_plan.cu` in `csrc`."""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower_kernels import cpu
from twotower_kernels.ops._library import as_index, define
from twotower_kernels.ops._traced import call
from twotower_kernels.ops.moe_checks import check_number
from twotower_kernels.options.arguments import whole


class MoePlan(NamedTuple):
    """The (token, choice) pairs sorted by expert, stably, so that tokens ascend within an expert. All int64.

    counts: `[E]` pairs per expert. offsets: `[E+1]` their exclusive running sum. pairs: `[N·k]`, token·k + choice. What
    stands behind the last offset, if some experts are outside [0, E), belongs to none of these.
    """

    counts: Tensor
    offsets: Tensor
    pairs: Tensor


def moe_plan(experts: Tensor, num_experts: int) -> MoePlan:
    """Sorts the (token, choice) pairs by expert, so that an expert's weights are read once for all its tokens.

    Source: the block-sparse grouping of MegaBlocks (arXiv 2211.15841), without its padding.

    Args:
        experts: `[N, k]` integers, from `moe_route`. Those outside [0, E) are left out.
        num_experts: E.

    Returns:
        counts `[E]`, offsets `[E+1]`, pairs `[N·k]`; int64, on the device of `experts`. Not differentiable.

    Raises:
        ValueError: wrong shape. TypeError: wrong dtype.
    """
    return MoePlan(*call("moe_plan", as_index(experts), whole("num_experts", num_experts)))


# --- registration ---------------------------------------------------------------------------------------------------


def empty_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    new, pairs = experts.new_empty, experts.shape[0] * experts.shape[1]
    return new(num_experts, dtype=torch.int64), new(num_experts + 1, dtype=torch.int64), new(pairs, dtype=torch.int64)


def plan_of(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    plan = empty_plan(experts, num_experts)
    cpu.call("moe_plan", experts, *plan)
    return plan


def planned(
    experts: Tensor, counts: Tensor | None, offsets: Tensor | None, pairs: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """A plan's offsets and pairs, computed if there is none."""
    if counts is None or offsets is None or pairs is None:
        return plan_of(experts, num_experts)[1:]
    if not cpu.call("moe_plan_holds", experts, counts, offsets, pairs):
        # A plan of other experts, or one with numbers out of bounds, is an error here and not a wrong result.
        raise ValueError("plan: expected moe_plan(experts, E) of these experts, got another")
    return offsets, pairs


define(
    "moe_plan(Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)",
    check=check_number,
    cpu=plan_of,
    cuda="cuda.moe:moe_plan",
    fake=empty_plan,
)
