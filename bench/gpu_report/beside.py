"""What was measured, beside what the cost model predicts (bench/costs): from this machine's own ceilings, and from the
card's data sheet where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import twotower_kernels as tt
from twotower_kernels.bench.cases.model import BLOCK
from twotower_kernels.bench.costs.cost_model import check, forward, predict, seconds
from twotower_kernels.bench.costs.machines import Machine, by_name, of_ceilings
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, PYTORCH
from twotower_kernels.bench.sizes.configs import config


@dataclass(frozen=True)
class Beside:
    """Seconds measured and predicted; None: nobody could say. of: how the other figures of a row are to be read."""

    what: str
    measured: float
    predicted: float | None
    from_data_sheet: float | None = None


@dataclass(frozen=True)
class Timed:
    """An operation at one shape. ratio: how many times as long the best program of plain PyTorch takes."""

    op: str
    shape: str
    dtype: str
    times: Beside
    gigabytes: float
    teraflops: float
    share: float
    ratio: float | None


def result_of(report: dict[str, Any], part: str) -> Any:
    """What a part has found; None without."""
    return next((entry["result"] for entry in report["parts"] if entry["part"] == part), None)


def machine_of(report: dict[str, Any]) -> Machine | None:
    """This machine as the cost model sees it, if its ceilings were measured."""
    limits = result_of(report, "ceilings")
    if limits is None:
        return None
    return of_ceilings("this machine", Ceilings(**limits), 0.0, "measured")


def card_of(report: dict[str, Any]) -> Machine | None:
    """The GPU by its data sheet, if it is one of those."""
    about = result_of(report, "machine") or {}
    return by_name(about.get("gpu") or "")


def timed(report: dict[str, Any]) -> Iterator[Timed]:
    """Every operation that was timed."""
    sheet = card_of(report)
    for entry in report["parts"]:
        run = entry["result"] if entry["part"].startswith("times of ") else None
        if not run or not run["results"]:
            continue
        ours = check(run, of_ceilings("this machine", Ceilings(**run["ceilings"]), 0.0, "measured"))
        theirs = check(run, sheet) if sheet else [None] * len(ours)
        for result, here, there in zip(run["results"], ours, theirs, strict=True):
            taken = {name: timing["median"] for name, timing in result["seconds"].items()}
            plain = [taken[name] for name in taken if name == ORIGINAL or name.startswith(PYTORCH)]
            yield Timed(
                here.op,
                here.shape,
                here.dtype,
                Beside(here.op, here.measured, here.predicted, there and there.predicted),
                result["GB/s"],
                result["TFLOP/s"],
                result["share of ceiling"],
                min(plain) / taken[OURS] if plain else None,
            )


def steps(report: dict[str, Any]) -> Iterator[Beside]:
    """The released model's passes, as far as its layers fit."""
    run, here, sheet = result_of(report, "model"), machine_of(report), card_of(report)
    if not run:
        return
    c = config(run["layers"])
    for row in run["results"]:
        batch, context = row["batch"], row["context"]
        where = f"batch {batch}, context {context}"
        for name, tower, length, hit in (
            ("step", "denoiser", BLOCK, "experts hit per layer"),
            ("autoregressive step", "context", 1, "autoregressive experts hit per layer"),
        ):
            heads = 1 if tower == "context" else None
            calls = forward(c, tower, batch, length, context, heads=heads, hit=row[hit])
            predicted = [machine and seconds(calls, machine) for machine in (here, sheet)]
            yield Beside(f"{name}, {where}", row[f"{name} seconds"], *predicted)
        yield Beside(f"commit of {BLOCK}, {where}", row["commit seconds"], None)


def writing(report: dict[str, Any]) -> Iterator[tuple[str, int, float, float, float | None]]:
    """Of the shipped model: mode, rows, tokens per second, tokens per NFE, and tokens per second predicted."""
    run, here = result_of(report, "writing"), machine_of(report)
    c = tt.TwoTowerConfig.from_file(tt.demo_path() / "config.json")
    for row in (run or {}).get("results", ()):
        batch, per_call, predicted = row["batch"], row["tokens per NFE"], None
        if here:
            p = predict(c, here, batch, 96, BLOCK, str(run["dtype"]).removeprefix("torch."))
            rates = {"mask_diffusion": p.diffusion_rate(per_call), "ar": p.ar_rate, "mock_ar": batch / p.mock_ar}
            predicted = rates.get(row["mode"])
        yield row["mode"], batch, row["tokens per second"], per_call, predicted
