"""The three stages of the demo model: the context tower, what it writes, and the denoiser that learns to guess it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from twotower_kernels.reference.demo_data import windows
from twotower_kernels.reference.demo_passes import Passes
from twotower_kernels.reference.demo_stages import Schedule, Stage
from twotower_kernels.reference.demo_targets import GreedySteps

MASK, BATCH, LENGTH = 3, 8, 512
BALANCE = 0.001  # by how much a router's selection bias moves per step
LATER = 0.15  # a position's weight in the loss falls by e^-0.15 per position: an early error costs a draft the rest
SHARES = (0.2, 0.45, 0.15, 0.2)  # of blocks: all masked; but the first token; a longer beginning known; each at random


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is a function of these numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**62
    return torch.Generator().manual_seed(seed)


def balance(passes: Passes) -> None:
    """Loss-free load balancing (arXiv 2408.15664): a busy expert's selection bias falls, an idle one's rises."""
    for bias, load in passes.loads:
        bias.data += BALANCE * torch.sign(load.mean() - load)


def context_stage(
    passes: Passes, train: Tensor, held_out: Tensor, *, lr: float, schedule: Schedule, seed: int
) -> Stage:
    """Next-token prediction on random windows."""
    head = passes.model.context_lm_head.weight
    fixed = windows(held_out, LENGTH, 64, seeded(seed, 1234))

    def loss_of(ids: Tensor) -> Tensor:
        hidden, _ = passes.context(ids)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)  # the last one is not counted
        losses = passes.losses(hidden.flatten(0, 1), head, targets.flatten(), passes.dtype)
        return losses.unflatten(0, ids.shape)[:, :-1].mean()

    @torch.no_grad()
    def validate() -> float:
        return float(torch.stack([loss_of(ids) for ids in fixed.split(BATCH)]).mean())

    return Stage(
        "ar",
        ("context_",),
        lr,
        schedule,
        lambda step: loss_of(windows(train, LENGTH, BATCH, seeded(seed, 1, step))),
        validate,
        lambda: balance(passes),
    )


def target_windows(stream: Tensor, seed: int) -> Tensor:
    """The numbers of the stream's windows of `LENGTH`, side by side, in the order in which they get targets."""
    return torch.randperm(len(stream) // LENGTH, generator=seeded(seed, 2))


def window(stream: Tensor, numbers: Tensor) -> Tensor:
    return stream[numbers[:, None] * LENGTH + torch.arange(LENGTH)]


def write_targets(passes: Passes, stream: Tensor, folder: Path, *, minutes: float | None, count: int, seed: int) -> int:
    """Greedy text from every block boundary of windows of the stream, kept in `folder/targets.pt` `[n, L/S, S]` int16.

    Goes on from what is there, until `minutes` were spent in all, or up to `count` windows. Returns how many there are.
    """
    saved, steps = folder / "targets.pt", GreedySteps(passes)
    found, spent = torch.empty(0, LENGTH // passes.block, passes.block, dtype=torch.int16), 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        found, spent = state["targets"], state["seconds"]
    order = target_windows(stream, seed)
    order = order if minutes is not None else order[:count]
    passes.model.eval()
    parts, started = [found], time.perf_counter() - spent
    for i, numbers in enumerate(tqdm(order[len(found) :].split(BATCH), desc="targets", mininterval=20)):
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            break
        parts.append(steps.targets(window(stream, numbers)).short())
        if i % 50 == 49:
            _save(saved, parts, started)
    return len(_save(saved, parts, started))


def _save(path: Path, parts: list[Tensor], started: float) -> Tensor:
    targets = torch.cat(parts)
    torch.save(dict(targets=targets, seconds=time.perf_counter() - started), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return targets


def corrupted(targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blocks `[B, N, S]` with masks, each block in one of the ways of `SHARES`, and t `[B, N]`, the share of masks.

    As generation shows them to a denoiser: nothing known yet, the context tower's next token known, a beginning
    known, or tokens here and there.
    """
    batch, blocks, size = targets.shape
    kind = torch.rand(batch, blocks, generator=generator)
    t = torch.rand(batch, blocks, generator=generator)
    position = torch.arange(size)
    bounds = torch.tensor(SHARES).cumsum(0)
    known = (t * (size - 1)).long() + 1  # of a longer beginning: 1 … S-1
    known = torch.where(kind < bounds[1], 1, known).masked_fill(kind < bounds[0], 0)
    masked = position >= known[..., None]
    scattered = torch.rand(targets.shape, generator=generator) < t[..., None]
    masked = torch.where((kind >= bounds[2])[..., None], scattered, masked)
    return targets.masked_fill(masked, MASK), masked.float().mean(-1)


def denoiser_stage(
    passes: Passes, train: Tensor, held_out: Tensor, folder: Path, *, lr: float, schedule: Schedule, seed: int
) -> Stage:
    """The denoiser on blocks that the context tower wrote, over the windows that have targets, time and again."""
    head = passes.model.lm_head.weight
    targets = torch.load(folder / "targets.pt", weights_only=True)["targets"]
    order = target_windows(train, seed)[: len(targets)]
    weights = torch.exp(-LATER * torch.arange(passes.block))
    per_epoch = len(targets) // BATCH

    def loss_of(ids: Tensor, wanted: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            _, context = passes.context(ids)
        hidden = passes.denoise(noisy.flatten(1), t, context)
        losses = passes.losses(hidden.flatten(0, 1), head, wanted.flatten(), passes.dtype)
        counted = (noisy == MASK) * weights
        return (losses.unflatten(0, wanted.shape) * counted).sum() / counted.sum().clamp(min=1)

    def batch_of(step: int) -> Tensor:
        epoch, part = divmod(step, per_epoch)
        mixed = torch.randperm(len(targets), generator=seeded(seed, 3, epoch))
        return mixed[part * BATCH : (part + 1) * BATCH]

    def loss(step: int) -> Tensor:
        chosen = batch_of(step)
        wanted = targets[chosen].long()
        noisy, t = corrupted(wanted, seeded(seed, 4, step))
        return loss_of(window(train, order[chosen]), wanted, noisy, t)

    greedy = GreedySteps(Passes(passes.model, passes.block, passes.dtype, compiled=False))
    fixed = list(window(held_out, torch.randperm(len(held_out) // LENGTH, generator=seeded(seed, 5))[:48]).split(BATCH))
    written: list[Tensor] = []

    @torch.no_grad()
    def validate() -> float:
        """Where the first token is known, as a draft has it."""
        if not written:
            written.extend(greedy.targets(ids) for ids in fixed)
        losses = []
        for ids, wanted in zip(fixed, written, strict=True):
            noisy = torch.cat([wanted[..., :1], torch.full_like(wanted[..., 1:], MASK)], -1)
            t = torch.full(wanted.shape[:2], 1 - 1 / passes.block)
            losses.append(loss_of(ids, wanted, noisy, t))
        return float(torch.stack(losses).mean())

    trained = ("denoiser_", "lm_head", "t_", "scale_shift")
    return Stage("denoiser", trained, lr, schedule, loss, validate, lambda: balance(passes))
