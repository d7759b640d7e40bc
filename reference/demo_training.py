"""The two stages of the demo model: the context tower, and the denoiser that learns to guess what that writes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from twotower_kernels.reference.demo_data import windows
from twotower_kernels.reference.demo_passes import Passes
from twotower_kernels.reference.demo_stages import Schedule, Stage
from twotower_kernels.reference.demo_targets import GreedySteps

MASK, BATCH, LENGTH = 3, 8, 512
BALANCE = 0.001  # by how much a router's selection bias moves per step
LATER = 0.15  # a position's weight in the loss falls by e^-0.15 per position: an early error costs a draft the rest
FIRST, REUSE = 50, 4  # batches that get targets before the first step; steps per batch that gets them later
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


class Targets:
    """What the context tower writes from every block boundary of windows of a stream, side by side, in an order of its
    own. Written when they are asked for, and kept in `folder/targets.pt` for a resumed run."""

    def __init__(self, passes: Passes, stream: Tensor, folder: Path, seed: int) -> None:
        self.stream, self.path, self._steps = stream, folder / "targets.pt", GreedySteps(passes)
        self._order = torch.randperm(len(stream) // LENGTH, generator=seeded(seed, 2))
        self._kept = torch.empty(0, LENGTH // passes.block, passes.block, dtype=torch.int16)
        if self.path.exists():
            self._kept = torch.load(self.path, weights_only=True)["targets"]
        self._saved = len(self._kept)

    def first(self, count: int) -> Tensor:
        """`[count, L/S, S]`, those of the first windows. `count` is a multiple of BATCH."""
        while len(self._kept) < count:
            numbers = self._order[len(self._kept) : len(self._kept) + BATCH]
            self._kept = torch.cat([self._kept, self._steps.targets(self._window(numbers)).short()])
            if len(self._kept) - self._saved >= 20 * BATCH:
                torch.save(dict(targets=self._kept), self.path.with_suffix(".part"))
                self.path.with_suffix(".part").replace(self.path)
                self._saved = len(self._kept)
        return self._kept[:count]

    def texts(self, which: Tensor) -> Tensor:
        """The windows themselves, `[n, L]`, by their places in the order."""
        return self._window(self._order[which])

    def _window(self, numbers: Tensor) -> Tensor:
        return window(self.stream, numbers)


def window(stream: Tensor, numbers: Tensor) -> Tensor:
    return stream[numbers[:, None] * LENGTH + torch.arange(LENGTH)]


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
    """The denoiser on blocks that the context tower wrote: in each step on some of the windows that have targets by
    then. To write a window's costs more than to learn from it, so that each is used some times."""
    head = passes.model.lm_head.weight
    targets = Targets(passes, train, folder, seed)
    weights = torch.exp(-LATER * torch.arange(passes.block))

    def loss_of(ids: Tensor, wanted: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            _, context = passes.context(ids)
        hidden = passes.denoise(noisy.flatten(1), t, context)
        losses = passes.losses(hidden.flatten(0, 1), head, wanted.flatten(), passes.dtype)
        counted = (noisy == MASK) * weights
        return (losses.unflatten(0, wanted.shape) * counted).sum() / counted.sum().clamp(min=1)

    def loss(step: int) -> Tensor:
        pool = targets.first(BATCH * (FIRST + step // REUSE))
        chosen = torch.randperm(len(pool), generator=seeded(seed, 3, step))[:BATCH]
        wanted = pool[chosen].long()
        noisy, t = corrupted(wanted, seeded(seed, 4, step))
        return loss_of(targets.texts(chosen), wanted, noisy, t)

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
