"""Tables of results: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import twotower_kernels as tt
from twotower_kernels import cpu
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, Result
from twotower_kernels.bench.report.checkout import ROOT
from twotower_kernels.bench.report.saved import write_json, write_text

HEADER = ("op", "shape", "dtype", "µs", "spread", "vs original", "vs best PyTorch", "of ceiling", "GB/s", "GFLOP/s")


@dataclass(frozen=True)
class Skipped:
    """A program that was not timed; where it is ours, its case was not."""

    op: str
    shape: str
    program: str
    reason: str


def not_timed(result: Result) -> list[Skipped]:
    """The programs of a case that could not run, or disagreed with ours."""
    reasons = {**result.skipped, **result.wrong}
    return [Skipped(result.case.op, result.case.shape, name, why) for name, why in reasons.items()]


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on: a processor, or a GPU beside it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.findall(r"model name\s*:\s*(.+)", text)[0]
        family = " ".join(re.findall(rf"^{key}\s*:\s*(\d+)", text, re.MULTILINE)[0] for key in ("cpu family", "model"))
        model += f", family and model {family}"
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    gpu = device == "cuda"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": cpu.kernels().isa(),
        "clocks": _gpu_clocks() if gpu else _cpu_clocks(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "twotower_kernels": tt.__version__,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def about(run: dict[str, Any]) -> str:
    """What a saved run was measured on and when, in two lines."""
    m = run["machine"]
    if m.get("gpu"):
        where = m["gpu"]
    else:
        where = f"{m['processor']}; {m['threads']} threads of {m['cores']} cores, {m['instruction set']}"
    return f"{where}\ntorch {m['torch']}, twotower_kernels {m['twotower_kernels']} at {m['commit']}, {m['date']}"


def _commit() -> str | None:
    """Of this checkout, wherever the command was called."""
    if ROOT is None:
        return None
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return said.stdout.strip() or None


def _cpu_clocks() -> str | None:
    """The cores' clocks at this moment, as Linux says them."""
    try:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    clocks = sorted(map(float, found))
    return f"{clocks[0]:.0f} to {clocks[-1]:.0f} MHz" if clocks else None


def _gpu_clocks() -> str | None:
    """Clocks of processors and memory, and the highest that the driver would set."""
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    try:
        said = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return None
    return " ".join(said.stdout.splitlines()[:1]) or None


def _ratio(value: float | None, goal: float | None, form: str = "{:.1f}×") -> str:
    if value is None:
        return ""
    return form.format(value) + (f" ({form.format(goal)})" if goal is not None else "")


def cells(result: Result, ceilings: Ceilings) -> tuple[str, ...]:
    """A row of HEADER; goals in parentheses."""
    case, ours, best = result.case, result.timings[OURS], result.best()
    original, pytorch, share = case.goals
    return (
        case.op,
        case.shape,
        str(case.dtype).removeprefix("torch."),
        f"{ours.median * 1e6:.1f}",
        f"{ours.low * 1e6:.0f} to {ours.high * 1e6:.0f}",
        _ratio(result.ratio(ORIGINAL), original),
        _ratio(None if best is None else result.ratio(best), pytorch),
        _ratio(100 * result.share(ceilings), None if share is None else 100 * share, "{:.0f} %"),
        f"{case.cost.bytes / ours.median / 1e9:.1f}",
        f"{case.cost.flops / ours.median / 1e9:.0f}",
    )


def rows(results: Sequence[Result], ceilings: Ceilings) -> list[tuple[str, ...]]:
    """HEADER and a row per result, without the columns in which no row says anything."""
    whole = [HEADER, *(cells(result, ceilings) for result in results)]
    columns = [column for column in zip(*whole, strict=True) if any(column[1:]) or not results]
    return list(zip(*columns, strict=True))


def table(rows: Sequence[tuple[str, ...]]) -> Table:
    """A header and rows, for the terminal; what says how much stands to the right."""
    found = Table()
    for name in rows[0]:
        found.add_column(name, justify="right" if name in HEADER[3:] or name == "vs ours" else "left")
    for row in rows[1:]:
        found.add_row(*row)
    return found


def others(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A header, and a row for every program that stands for none of the table's columns."""
    found: list[tuple[str, ...]] = [("op", "shape", "dtype", "program", "µs", "vs ours")]
    for result in results:
        case = result.case
        for name, timing in result.timings.items():
            if name not in (OURS, ORIGINAL, result.best()):
                dtype, ratio = str(case.dtype).removeprefix("torch."), _ratio(result.ratio(name), None)
                found.append((case.op, case.shape, dtype, name, f"{timing.median * 1e6:.1f}", ratio))
    return found


def left_out(skipped: Sequence[Skipped]) -> list[tuple[str, ...]]:
    """A header, and a row for every program that was not timed."""
    return [("op", "shape", "program", "not timed, because"), *map(astuple, skipped)]


def where(device: str) -> str:
    """The machine, in a line."""
    about = machine(device)
    threads = f"{about['threads']} threads of {about['cores']} cores"
    place = about["gpu"] or f"{about['processor']}, {threads}, {about['instruction set']}"
    made = f"torch {about['torch']}, Python {about['python']}; commit {about['commit']}, {about['date']}"
    return f"{place}; clocks {about['clocks'] or 'unknown'}; {made}"


def heading(ceilings: Ceilings) -> str:
    c = ceilings
    return (
        f"{where(c.device)}. Ceilings, measured: memory read {c.read:.1f} GB/s, copy {c.copy:.1f} GB/s; matrix product "
        f"{c.fp64:.0f} GFLOP/s float64, {c.fp32:.0f} float32, {c.fp16:.0f} float16, {c.bf16:.0f} bfloat16; "
        f"launch {c.launch * 1e6:.1f} µs."
    )


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    header, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ("---",) * len(header), *body))


def markdown(results: Sequence[Result], ceilings: Ceilings, skipped: Sequence[Skipped] = ()) -> str:
    note = (
        "µs are medians, the spread goes from the tenth to the ninetieth percentile; goals stand in parentheses. "
        "Programs ran in turns in one process, and their outputs agreed before they were timed. Ceilings are the "
        "better of two measurements, before and after.\n"
    )
    parts = [heading(ceilings) + "\n", _markdown(rows(results, ceilings)), note]
    parts += [_markdown(more) for more in (others(results), left_out(skipped)) if len(more) > 1]
    return "\n".join(parts)


def entry(result: Result, ceilings: Ceilings) -> dict[str, Any]:
    """A result as a saved run holds it."""
    case, seconds = result.case, result.timings[OURS].median
    return {
        "op": case.op,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.cost.bytes,
        "flops": case.cost.flops,
        "GB/s": case.cost.bytes / seconds / 1e9,
        "TFLOP/s": case.cost.flops / seconds / 1e12,
        "share of ceiling": result.share(ceilings),
        "seconds": {name: asdict(timing) for name, timing in result.timings.items()},
    }


def write(
    entries: Sequence[dict[str, Any]], ceilings: Ceilings, path: Path, skipped: Sequence[Skipped]
) -> dict[str, Any]:
    """A run as JSON, which is returned too."""
    run = {
        "machine": machine(ceilings.device),
        "ceilings": asdict(ceilings),
        "results": list(entries),
        "skipped": [asdict(s) for s in skipped],
    }
    write_json(path, run)
    return run


def save(
    results: Sequence[Result], ceilings: Ceilings, folder: Path, stem: str, skipped: Sequence[Skipped] = ()
) -> dict[str, Any]:
    """<stem>.json with every program's times, which is returned too, and <stem>.md, the table."""
    run = write([entry(result, ceilings) for result in results], ceilings, folder / f"{stem}.json", skipped)
    write_text(folder / f"{stem}.md", markdown(results, ceilings, skipped))
    return run
