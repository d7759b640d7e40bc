"""One stage of the demo model's training: optimizers, a schedule by steps or by minutes, checkpoints, the curves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower_kernels.reference.model import TwoTower

LEVELS = 50  # in which the learning rate falls
SAVE_SECONDS = 90.0


@dataclass
class Schedule:
    """The learning rate's course: a warm-up, a plateau, then a linear fall in `LEVELS` equal steps, the last the end.

    When a level begins is decided by the time that was spent (`minutes`), and noted. A run that is given the notes
    (`falls`) repeats the course of the one that made them.

    falls: the number of steps that were done when each level began; complete when there are `LEVELS`.
    """

    minutes: float | None
    warmup: int = 100
    decay: float = 0.4  # of the time, the fall
    falls: list[int] = field(default_factory=list)

    def level(self, step: int, seconds: float) -> int:
        """How far the rate has fallen when `step` steps are done."""
        if self.minutes is not None:
            progress = seconds / (60 * self.minutes)
            reached = min(LEVELS, int((progress - (1 - self.decay)) / self.decay * LEVELS))
            self.falls += [step] * (reached - len(self.falls))
        return sum(fall <= step for fall in self.falls)

    def factor(self, step: int, level: int) -> float:
        return min((step + 1) / self.warmup, 1.0) * (1 - level / LEVELS)


@dataclass
class History:
    """What the curves show: (step, value) pairs; and the seconds spent so far."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Stage:
    """One optimization run: which parameters, their rate, and the loss of a step's batch.

    loss(step) is a function of the step's number alone, so that a resumed run is the run; `validate()` is the loss on
    held-out text; `after_step()` whatever a step changes besides.
    """

    name: str
    trained: tuple[str, ...]  # how the names of the parameters begin that it trains
    lr: float
    schedule: Schedule
    loss: Callable[[int], Tensor]
    validate: Callable[[], float]
    after_step: Callable[[], None]
    weight_decay: float = 0.1
    clip: float = 1.0
    every: int = 250  # steps from one validation to the next


def optimizers(model: TwoTower, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (its updates scaled to AdamW's), AdamW for embeddings, heads and vectors."""
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(stage.trained) and not name.endswith("correction_bias")
    }
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    matrices = [p for name, p in chosen.items() if ".layers." in name and p.dim() == 2 and "gate.weight" not in name]
    heads = [p for name, p in chosen.items() if "lm_head" in name]
    plain = [p for p in chosen.values() if all(p is not q for q in (*matrices, *heads))]
    adam = [dict(params=heads, weight_decay=stage.weight_decay), dict(params=plain, weight_decay=0.0)]
    return [
        torch.optim.Muon(matrices, lr=stage.lr, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=stage.lr, betas=(0.9, 0.95)),
    ]


def run(model: TwoTower, stage: Stage, folder: Path) -> dict[str, Any]:
    """Trains one stage from its last checkpoint in `folder` to its end, and says how it went."""
    saved = folder / f"{stage.name}.pt"
    every_optimizer, history, step = optimizers(model, stage), History(), 0
    trained = [p for p in model.parameters() if p.requires_grad]
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(every_optimizer, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        history, step = History(**state["history"]), state["step"]
        if stage.schedule.minutes is not None:
            stage.schedule.falls = state["falls"]

    def save() -> None:
        history.seconds = time.perf_counter() - started
        state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in every_optimizer], step=step)
        state |= dict(history=asdict(history), falls=stage.schedule.falls)
        torch.save(state, saved.with_suffix(".part"))
        saved.with_suffix(".part").replace(saved)

    model.train()
    started = time.perf_counter() - history.seconds
    last_saved = time.perf_counter()
    while (level := stage.schedule.level(step, time.perf_counter() - started)) < LEVELS:
        factor = stage.schedule.factor(step, level)
        for optimizer in every_optimizer:
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * factor
            optimizer.zero_grad(set_to_none=True)
        loss = stage.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, stage.clip)
        for optimizer in every_optimizer:
            optimizer.step()
        stage.after_step()
        step += 1
        if step % 10 == 0:
            history.train.append((step, round(float(loss.detach()), 4)))
        if step % stage.every == 0:
            history.validation.append((step, round(stage.validate(), 4)))
            spent = (time.perf_counter() - started) / 60
            print(f"{stage.name} {step}: validation {history.validation[-1][1]:.4f}, {spent:.1f} min", flush=True)
        if time.perf_counter() - last_saved > SAVE_SECONDS:
            save()
            last_saved = time.perf_counter()
    if not history.validation or history.validation[-1][0] != step:
        history.validation.append((step, round(stage.validate(), 4)))
    save()
    facts = dict(lr=stage.lr, weight_decay=stage.weight_decay, warmup=stage.schedule.warmup, steps=step)
    return facts | dict(falls=stage.schedule.falls) | asdict(history)
