"""Time over one size at a time, ours and the baselines': `python -m bench.sweeps --save bench/results/cpu`.

Attention and a whole denoiser step over the context; attention, adaLN and the experts over the batch; remasking over
the vocabulary. The cases are those of `bench.cases`, checked and timed as ever. A baseline whose call takes more than a
second is left out of its point, and the saved run says so.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from twotower_kernels.bench.baselines import pytorch
from twotower_kernels.bench.cases import adaln, attention, moe, remask
from twotower_kernels.bench.cases.model import random_model, step, widened
from twotower_kernels.bench.measure import ceilings
from twotower_kernels.bench.measure.timing import OURS, Case, Result, measure
from twotower_kernels.bench.report import tables
from twotower_kernels.bench.report.tables import Skipped
from twotower_kernels.bench.sizes.shapes import RELEASED
from twotower_kernels.options.flags import number

BF16 = torch.bfloat16


def over_context(device: str) -> Iterator[Case]:
    for context in (256, 1024, 2048, 4096, 8192, 16384, 32768):
        yield attention.over_context(1, context, BF16, device)
    if device != "cpu":
        return  # bench/gpu_model.py measures a step on a GPU
    torch.manual_seed(0)
    model = random_model(BF16, "denoiser")
    float32_copy = widened(model)
    for context in (1024, 8192, 32768, 131072):
        yield step(model, 1, context, float32_copy=float32_copy)


def over_batch(device: str) -> Iterator[Case]:
    for batch in (1, 2, 4, 8, 16, 32, 64):
        yield attention.over_context(batch, 1024, BF16, device)
    norm = "adaln_norm", pytorch.eager_adaln_norm, pytorch.best_adaln_norm
    for batch in (1, 2, 4, 8, 16, 32, 64):
        yield adaln.case(*norm, batch, BF16, device)
    weights = moe.Weights(device)
    for batch in (1, 4, 16, 64):
        case = moe.experts(weights, batch * RELEASED.block_size)
        yield replace(case, sizes={"batch": batch, **case.sizes})


def over_vocabulary(device: str) -> Iterator[Case]:
    for temperature in (0.0, 1.0):
        for thousands in (8, 32, 128, 256):
            shapes = replace(RELEASED, vocab_size=thousands * 1024)
            yield remask.case(1, temperature, torch.float32, device, shapes=shapes)


# By the size that each varies: the name of it in the cases' sizes.
SWEEPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "context": over_context,
    "batch": over_batch,
    "vocabulary": over_vocabulary,
}


def affordable(case: Case, limit: float = 1.0) -> tuple[Case, list[Skipped]]:
    """The case without the baselines whose call takes more than so many seconds, and these."""
    slow = []
    for name, call in case.programs.items():
        if name == OURS:
            continue
        for _ in range(2):  # the first call may compile
            start = time.perf_counter()
            with torch.inference_mode():
                call()
            taken = time.perf_counter() - start
            if taken <= limit:
                break
        else:
            slow.append(Skipped(case.op, case.shape, name, f"a call takes {taken:.1f} s"))
    left = {skipped.program for skipped in slow}
    return replace(case, programs={n: call for n, call in case.programs.items() if n not in left}), slow


def main() -> int:
    """Returns 1 if a program fails or disagrees, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweeps", description="Time over one size at a time.")
    parser.add_argument("--sweep", action="append", choices=tuple(SWEEPS), help="only this one; may be given again")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    parser.add_argument(
        "--seconds", type=number(0, most=3600), default=0.3, help="that each program is timed at least (default: 0.3)"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/sweeps.json")
    options = parser.parse_args()
    limits = ceilings.measure(options.device)
    print(tables.heading(limits), flush=True)
    found: list[tuple[str, Result]] = []
    skipped: list[Skipped] = []
    for sweep in options.sweep or SWEEPS:
        for each in SWEEPS[sweep](options.device):
            case, slow = affordable(each)
            result = measure(case, options.seconds, options.device)
            found.append((sweep, result))
            left = [*slow, *tables.not_timed(result)]
            skipped += left
            said = "; ".join(f"{s.program}: {s.reason}" for s in left)
            print(sweep, *tables.cells(result, limits)[:7], said, flush=True)
            del each, case
            gc.collect()
    limits = limits.better_of(ceilings.measure(options.device))
    if options.save:
        entries = [{"sweep": sweep, **tables.entry(result, limits)} for sweep, result in found]
        tables.write(entries, limits, options.save / "sweeps.json", skipped)
    return 1 if any(result.wrong for _, result in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
