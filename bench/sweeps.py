"""Time over one size at a time, ours and the rivals': `python -m bench.sweeps --save bench/results/cpu`.

Attention and a whole denoiser step over the context; attention, adaLN and the experts over the batch; remasking over
the vocabulary. The cases are those of `bench_<family>`, checked and timed as ever. A rival whose call takes more than a
second is left out of its point, and the saved run says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import twotower_kernels as tt
from bench import bench_adaln, bench_attention, bench_model, bench_moe, bench_remask, ceilings, report, rivals
from bench.ceilings import Ceilings
from bench.timing import OURS, Case, Result, measure

SWEEPS = ("context", "batch", "vocabulary")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Point:
    """A case, and where it stands: `sizes[sweep]` is what its sweep varies."""

    sweep: str
    sizes: dict[str, int]
    case: Case


def over_context(device: str) -> Iterator[Point]:
    for context in (256, 1024, 2048, 4096, 8192, 16384, 32768):
        sizes = {"batch": 1, "context": context}
        yield Point("context", sizes, bench_attention.over_context(1, context, BF16, device))
    torch.manual_seed(0)
    model = tt.TwoTowerModel(bench_model.CONFIG, dtype=BF16, towers="denoiser")
    # The programs must agree in float32. In bfloat16 the routers of a random model choose other experts here and there.
    measure(bench_model.step(bench_model.widened(model), 1, 1024), seconds=0, device=device)
    for context in (1024, 8192, 32768, 131072):
        case = replace(bench_model.step(model, 1, context), check=lambda ours, theirs: None)
        yield Point("context", {"batch": 1, "context": context}, case)


def over_batch(device: str) -> Iterator[Point]:
    for batch in (1, 2, 4, 8, 16, 32, 64):
        sizes = {"batch": batch, "context": 1024}
        yield Point("batch", sizes, bench_attention.over_context(batch, 1024, BF16, device))
    norm = "adaln_norm", rivals.eager_adaln_norm, rivals.best_adaln_norm
    for batch in (1, 2, 4, 8, 16, 32, 64):
        yield Point("batch", {"batch": batch}, bench_adaln.case(*norm, batch, BF16, device))
    weights = bench_moe.Weights(device)
    for batch in (1, 4, 16, 64):
        yield Point("batch", {"batch": batch}, bench_moe.experts(weights, 16 * batch))


def over_vocabulary(device: str) -> Iterator[Point]:
    for temperature in (0.0, 1.0):
        for thousands in (8, 32, 128, 256):
            with mock.patch.object(bench_remask, "VOCABULARY", thousands * 1024):
                case = bench_remask.case(1, temperature, torch.float32, device)
            yield Point("vocabulary", {"batch": 1, "vocabulary": thousands * 1024}, case)


POINTS: dict[str, Callable[[str], Iterator[Point]]] = dict(
    zip(SWEEPS, (over_context, over_batch, over_vocabulary), strict=True)
)


def affordable(case: Case, limit: float = 1.0) -> tuple[Case, dict[str, float]]:
    """The case without the rivals whose call takes more than so many seconds, and these with their seconds."""
    slow = {}
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
            slow[name] = taken
    return replace(case, programs={n: call for n, call in case.programs.items() if n not in slow}), slow


def entry(point: Point, result: Result, limits: Ceilings) -> dict[str, Any]:
    """A result as a saved run holds it, with its sweep and its sizes."""
    case = result.case
    return {
        "sweep": point.sweep,
        "op": case.op,
        "shape": case.shape,
        "sizes": point.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "flops": case.flops,
        "share of ceiling": result.share(limits),
        "seconds": {name: asdict(timing) for name, timing in result.timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweeps", description="Time over one size at a time.")
    parser.add_argument("--sweep", action="append", choices=SWEEPS, help="only this one; may be given again")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    parser.add_argument("--seconds", type=float, default=0.3, help="that each program is timed at least (default: 0.3)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/sweeps.json")
    options = parser.parse_args()
    limits = ceilings.measure(options.device)
    print(report.heading(limits), flush=True)
    found: list[tuple[Point, Result]] = []
    skipped: list[dict[str, Any]] = []
    for sweep in options.sweep or SWEEPS:
        for point in POINTS[sweep](options.device):
            case, slow = affordable(point.case)
            for name, seconds in slow.items():
                reason = f"a call takes {seconds:.1f} s"
                skipped.append({"op": case.op, "shape": case.shape, "program": name, "reason": reason})
            result = measure(case, options.seconds, options.device)
            bare = replace(case, programs={}, check=None)  # programs hold their tensors
            found.append((replace(point, case=bare), replace(result, case=bare)))
            print(sweep, *report.cells(result, limits)[:7], "left out: " + ", ".join(slow) if slow else "", flush=True)
            gc.collect()
    limits = limits.better_of(ceilings.measure(options.device))
    if options.save:
        results = [entry(point, result, limits) for point, result in found]
        whole = {"machine": report.machine(), "ceilings": asdict(limits), "results": results, "skipped": skipped}
        options.save.mkdir(parents=True, exist_ok=True)
        written = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        (options.save / "sweeps.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
