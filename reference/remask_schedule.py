"""How many positions are due in a step: the noise schedules and the counts made from them, float64 and int64 per row.

Products that should be whole numbers are snapped to a multiple of 2^-30 before they are rounded, so that no count hangs
on the last digit of a cosine or a division.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower_kernels.options.remask_policy import RemaskPolicy


def times(min_t: float, long_grid: bool, step: Tensor, num_steps: Tensor) -> tuple[Tensor, Tensor]:
    """The times (t, s) before and after step i of N, float64; later steps repeat the last one.

    t = 1 - i (1 - min_t) / N, s = t - (1 - min_t) / N. long_grid: t = 1 - i / (N - 1), s = max(0, t - 1 / N).
    """
    i, n = torch.minimum(step, num_steps - 1).double(), num_steps.double()
    if long_grid:
        t = 1 - i / (n - 1).clamp(min=1)
        return t, (t - 1 / n).clamp(min=0)
    return (n - i + i * min_t) / n, (n - i - 1 + (i + 1) * min_t) / n


def model_time(policy: RemaskPolicy, masked: Tensor, block_size: int, step: Tensor, num_steps: Tensor) -> Tensor:
    """The time that the denoiser is given, float32 in [0, 1] of the broadcast shape: the fraction of the block that is
    masked for rules that rank, t of the schedule for rules that follow one (`time="schedule"`)."""
    masked, step, num_steps = torch.broadcast_tensors(masked, step, num_steps)
    if policy.time == "masked_fraction":
        t = masked.double() / max(block_size, 1)
    else:
        t = times(policy.min_t, policy.long_grid, step, num_steps)[0]
    return t.float().clamp(0.0, 1.0)


def clean_fraction(policy: RemaskPolicy, t: Tensor) -> Tensor:
    """a(t), the fraction of clean tokens at time t in [0, 1]: falls from 1 to its floor."""
    return policy.alpha_floor + (1 - policy.alpha_floor) * unfloored(policy.alpha, t)


def unfloored(alpha: str, t: Tensor) -> Tensor:
    """From 1 (0.999 for "cosine_floor") to 0."""
    if alpha == "linear":
        return 1 - t
    if alpha == "cosine":
        return torch.cos(math.pi / 2 * t)
    if alpha == "sine":
        return 1 - torch.sin(math.pi / 2 * t)
    if alpha == "cosine_floor":
        return 0.999 * torch.cos(math.pi / 2 * t)
    return (torch.exp(-3 * t) - math.exp(-3)) / (1 - math.exp(-3))


def clean_fractions(policy: RemaskPolicy, step: Tensor, num_steps: Tensor) -> tuple[Tensor, Tensor]:
    """a(t) and a(s), before and after the step, float64."""
    t, s = times(policy.min_t, policy.long_grid, step, num_steps)
    return clean_fraction(policy, t), clean_fraction(policy, s)


def leave_probability(policy: RemaskPolicy, step: Tensor, num_steps: Tensor) -> Tensor:
    """rho = (a(s) - a(t)) / (1 - a(t)), float64: the probability that a mask becomes a token in this step."""
    a_t, a_s = clean_fractions(policy, step, num_steps)
    return torch.where(a_t < 1, (a_s - a_t) / (1 - a_t), 1.0)


def quota(
    policy: RemaskPolicy, waiting: Tensor, initial: Tensor | None, length: Tensor, step: Tensor, num_steps: Tensor
) -> Tensor:
    """q of the policy's schedule, int64 [R], not yet clamped to what waits. Everything is int64 [R].

    waiting: positions that wait now (n); initial: at the start of the block (n0), or None to infer it; length: of the
    block (S). "coin", "posterior" and "uniform" have none due as a number.
    """
    n, remaining_steps = waiting, (num_steps - step).clamp(min=1)
    even_from_masks = policy.schedule == "even" and policy.schedule_base == "masks"
    if initial is None and (even_from_masks or policy.schedule in ("carried", "rounded")):
        initial = infer_initial(policy, n, length, step, num_steps)
    if policy.schedule == "remaining":
        q = (n + remaining_steps - 1) // remaining_steps
    elif policy.schedule == "even":
        base = initial if even_from_masks else length
        assert base is not None
        q = base // num_steps
        if policy.spread_remainder:
            q = q + (step < base % num_steps)
    elif policy.schedule == "carried":
        assert initial is not None
        q = spent(policy, initial, step + 1, num_steps) - (initial - n)
    elif policy.schedule == "rounded":
        assert initial is not None
        q = spent(policy, initial, step + 1, num_steps) - spent(policy, initial, step, num_steps)
    elif policy.schedule == "noise":
        s = times(policy.min_t, policy.long_grid, step, num_steps)[1]
        left = _snapped((1 - clean_fraction(policy, s)) * length).floor().long()
        q = n - torch.minimum(left, n - 1).clamp(min=0)
    elif policy.schedule == "corrupt":
        s = times(policy.min_t, policy.long_grid, step, num_steps)[1]
        noisy = _snapped((1 - clean_fraction(policy, s)) * length).round().long()  # round half to even
        q = n - torch.minimum(noisy.clamp(min=1), n)
    elif policy.schedule == "truncated":
        q = _snapped(n * leave_probability(policy, step, num_steps)).floor().long()
    else:
        q = torch.zeros_like(n)
    return torch.where(step.double() < policy.warmup * num_steps, 1, q) if policy.warmup else q


def spent(policy: RemaskPolicy, initial: Tensor, steps: Tensor, num_steps: Tensor) -> Tensor:
    """What the schedules that count from n0 ("even", "carried", "rounded") commit in the first `steps` steps, int64."""
    if policy.schedule == "even":
        remainder = torch.minimum(steps, initial % num_steps) if policy.spread_remainder else 0
        total = steps * (initial // num_steps) + remainder
    elif policy.schedule == "carried":
        total = torch.minimum(steps, num_steps) * initial // num_steps
    else:
        total, listed = torch.zeros_like(initial), torch.zeros_like(initial)
        left = initial
        for j in range(int(num_steps.max()) if num_steps.numel() else 0):
            rho = leave_probability(policy, torch.full_like(num_steps, j), num_steps)
            share = torch.where(j < num_steps, _snapped(left * rho).round().long(), 0)  # round half to even
            total = total + torch.where(listed < steps, share, 0)
            listed = listed + (share > 0)  # a share of zero takes no step
            left = left - share
    return torch.minimum(total, initial)


def infer_initial(policy: RemaskPolicy, waiting: Tensor, length: Tensor, step: Tensor, num_steps: Tensor) -> Tensor:
    """The smallest n0 in [n, S] of which the schedule leaves n or more after `step` steps; S if there is none. [R]."""
    longest = int(length.max()) if length.numel() else 0
    n0 = torch.arange(longest + 1, device=waiting.device)[None, :].expand(len(waiting), -1)  # [R, S + 1]
    left = n0 - spent(policy, n0, step[:, None], num_steps[:, None])
    fits = (n0 >= waiting[:, None]) & (n0 <= length[:, None]) & (left >= waiting[:, None])
    return torch.where(fits.any(1), fits.int().argmax(1), length)


def _snapped(x: Tensor) -> Tensor:
    return torch.round(x * 2.0**30) * 2.0**-30
