"""Gate, schedule, combine: from one score per position to the positions that take their candidate. One row at a time
in meaning, all rows at once in tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference import remask_schedule


@dataclass
class Rows:
    """What the selection knows: tensors [R, L] per position and [R] per row."""

    waiting: Tensor  # bool [R, L]: masks, and committed positions that were sent back
    usable: Tensor  # bool [R, L]: those of them that may be chosen
    sent_back: Tensor  # bool [R, L]
    score: Tensor  # [R, L], larger is better
    confidence: Tensor  # [R, L]
    entropy: Tensor  # [R, L]
    drawn: Tensor  # bool [R, L]: the positions that "coin", "posterior" and "uniform" choose
    due: Tensor  # bool [R]: False where a stretch waits for the one before
    bound: Tensor  # [R], of the gate
    initial: Tensor | None  # int64 [R], n0
    length: Tensor  # int64 [R], S
    step: Tensor  # int64 [R]
    num_steps: Tensor  # int64 [R]


def select(policy: RemaskPolicy, rows: Rows) -> Tensor:
    """The positions that take their candidate: bool [R, L]."""
    order = _order(rows.usable, rows.score)  # [R, L] positions, best first; those not usable come last
    rank = _inverse(order)
    gate = _gate(policy, rows, order, rank)
    if policy.schedule in ("coin", "posterior", "uniform"):
        chosen = (gate | rows.drawn) & rows.usable
    else:
        chosen = _combine(policy, rows, gate, rank)
    if policy.finish:
        last = rows.step >= rows.num_steps - 1
        chosen = torch.where(last[:, None], rows.usable, chosen)
    return chosen


def first_waiting(waiting: Tensor) -> Tensor:
    """The first position of each row that waits, int64 [R]; the row's length if none does."""
    position = torch.arange(waiting.shape[1], device=waiting.device)
    return torch.where(waiting, position, waiting.shape[1]).amin(1) if waiting.shape[1] else waiting.sum(1)


def _combine(policy: RemaskPolicy, rows: Rows, gate: Tensor, rank: Tensor) -> Tensor:
    n = rows.waiting.sum(1)  # [R]
    least = policy.min_commits + rows.sent_back.sum(1)
    q = remask_schedule.quota(policy, n, rows.initial, rows.length, rows.step, rows.num_steps)
    q = torch.where(rows.due, torch.maximum(q, least), 0)[:, None]  # [R, 1]
    if policy.window:
        position = torch.arange(rows.waiting.shape[1], device=rank.device)
        scheduled = rows.usable & (position < first_waiting(rows.waiting)[:, None] + q)
    else:
        scheduled = rows.usable & (rank < q)
    if policy.combine == "cap":
        return (gate & scheduled) | (rows.usable & (rank < torch.where(rows.due, least, 0)[:, None]))
    if policy.combine == "union":
        return gate | scheduled
    passed = gate.sum(1, keepdim=True)  # [R, 1]
    if policy.window:
        return torch.where(passed >= q, gate, scheduled)
    # Those that passed stand first, then the others by score; q of them, or all that passed.
    order = _inverse(rank)
    again = order.gather(1, torch.argsort((~gate).gather(1, order).int(), dim=1, stable=True))
    return rows.usable & (_inverse(again) < torch.maximum(passed, q))


def _gate(policy: RemaskPolicy, rows: Rows, order: Tensor, rank: Tensor) -> Tensor:
    """G: the positions that are good enough by themselves, bool [R, L]."""
    value = rows.score if policy.gate_on == "score" else rows.confidence
    bound = rows.bound.to(value.dtype)[:, None]  # [R, 1]
    passes = torch.zeros_like(rows.usable)
    if policy.gate == "threshold":
        if policy.gate_slack is not None and value.shape[1]:
            best = torch.where(rows.usable, value, -torch.inf).amax(1, keepdim=True)
            bound = torch.minimum(bound, best - policy.gate_slack)
        passes = value > bound if policy.strict else value >= bound
    elif policy.gate == "factor":
        j = torch.arange(1, value.shape[1] + 1, device=value.device)  # rank from 1
        count = rows.usable.sum(1, keepdim=True)
        good = (value.gather(1, order) >= 1 - bound / (j + 1)) | (j == 1)
        prefix = (good & (j <= count)).int().cumprod(1).sum(1, keepdim=True)
        if policy.factor_last_free:
            prefix = torch.where(prefix == count - 1, count, prefix)
        passes = rank < prefix
    elif policy.gate == "prefix":
        by_rank = value.gather(1, order)
        good = by_rank > bound if policy.strict else by_rank >= bound
        passes = rank < good.int().cumprod(1).sum(1, keepdim=True)
    elif policy.gate == "entropy_sum":
        entropy = torch.where(rows.usable, rows.entropy, torch.inf).gather(1, order).double()  # [R, L] by rank
        total = entropy.cumsum(1) if policy.entropy_includes_self else _shifted(entropy).cumsum(1)
        limit = rows.bound.double()[:, None]
        good = total < limit if policy.strict else total <= limit
        passes = rank < good.int().cumprod(1).sum(1, keepdim=True)
    if policy.run_threshold is not None:
        passes = passes | (_best_of_runs(rows.usable, rank) & (value > policy.run_threshold))
    return passes & rows.usable


def _best_of_runs(usable: Tensor, rank: Tensor) -> Tensor:
    """The best-ranked position of every maximal stretch of adjacent usable positions, bool [R, L]."""
    before = _shifted(usable.int()).bool()
    run = (usable & ~before).cumsum(1)  # [R, L] number of the run, from 1; 0 and stale numbers where not usable
    worst = rank.shape[1]
    best = torch.full((rank.shape[0], worst + 1), worst, device=rank.device)
    best = best.scatter_reduce(1, run, torch.where(usable, rank, worst), "amin")
    return usable & (best.gather(1, run) == rank)


def _shifted(x: Tensor) -> Tensor:
    """x moved one position to the right along its rows, 0 in front."""
    return torch.nn.functional.pad(x, (1, 0))[:, :-1]


def _order(usable: Tensor, score: Tensor) -> Tensor:
    """Positions of each row, usable ones first, then by score, then by position: int64 [R, L]."""
    by_score = torch.argsort(torch.nan_to_num(score, nan=-torch.inf), dim=1, descending=True, stable=True)
    unusable_last = torch.argsort((~usable).gather(1, by_score).int(), dim=1, stable=True)
    return by_score.gather(1, unusable_last)


def _inverse(order: Tensor) -> Tensor:
    """The permutation of each row backwards: order [R, L] to rank, rank to order."""
    return torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
