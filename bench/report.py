"""Tables of results: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import twotower_kernels as tt
from bench.ceilings import Ceilings
from bench.timing import ORIGINAL, OURS, PYTORCH, Result
from twotower_kernels import cpu

HEADER = ("op", "shape", "dtype", "µs", "spread", "vs original", "vs best PyTorch", "of ceiling", "GB/s", "GFLOP/s")
HEADER += ("vs others",)


@dataclass(frozen=True)
class Skipped:
    """A program that was not timed; where it is ours, its case was not."""

    op: str
    shape: str
    program: str
    reason: str


def not_timed(result: Result) -> list[Skipped]:
    """The programs of a case that could not run, or disagreed with ours."""
    reasons = {**result.skipped, **{name: f"disagrees, {how}" for name, how in result.wrong.items()}}
    return [Skipped(result.case.op, result.case.shape, name, why) for name, why in reasons.items()]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.findall(r"model name\s*:\s*(.+)", text)[0]
        family = " ".join(re.findall(rf"^{key}\s*:\s*(\d+)", text, re.MULTILINE)[0] for key in ("cpu family", "model"))
        model += f", family and model {family}"
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    gpu = torch.cuda.is_available()
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
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
        "commit": described.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


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
    others = [name for name in result.timings if name not in (OURS, ORIGINAL) and not name.startswith(PYTORCH)]
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
        ", ".join(f"{name} {_ratio(result.ratio(name), None)}" for name in others),
    )


def rows(results: Sequence[Result], ceilings: Ceilings) -> list[tuple[str, ...]]:
    """HEADER and a row per result, without the columns in which no row says anything."""
    whole = [HEADER, *(cells(result, ceilings) for result in results)]
    columns = [column for column in zip(*whole, strict=True) if any(column[1:]) or not results]
    return list(zip(*columns, strict=True))


def table(results: Sequence[Result], ceilings: Ceilings) -> Table:
    found = Table()
    header, *body = rows(results, ceilings)
    for name in header:
        found.add_column(name, justify="left" if name in ("op", "shape", "dtype") else "right")
    for row in body:
        found.add_row(*row)
    return found


def table_of_skipped(skipped: Sequence[Skipped]) -> Table:
    found = Table("op", "shape", "program", "not timed, because")
    for entry in skipped:
        found.add_row(entry.op, entry.shape, entry.program, entry.reason)
    return found


def where() -> str:
    """The machine, in a line."""
    about = machine()
    if about["gpu"] is not None:
        where = f"{about['gpu']}"
    else:
        threads = f"{about['threads']} threads of {about['cores']} cores"
        where = f"{about['processor']}, {threads}, {about['instruction set']}"
    made = f"torch {about['torch']}, Python {about['python']}; commit {about['commit']}, {about['date']}"
    return f"{where}; clocks {about['clocks'] or 'unknown'}; {made}"


def heading(ceilings: Ceilings) -> str:
    c = ceilings
    return (
        f"{where()}. Ceilings, measured: memory read {c.read:.1f} GB/s, copy {c.copy:.1f} GB/s; matrix product "
        f"{c.fp64:.0f} GFLOP/s float64, {c.fp32:.0f} float32, {c.fp16:.0f} float16, {c.bf16:.0f} bfloat16; "
        f"launch {c.launch * 1e6:.1f} µs."
    )


def markdown(results: Sequence[Result], ceilings: Ceilings, skipped: Sequence[Skipped] = ()) -> str:
    header, *body = rows(results, ceilings)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *body)]
    note = (
        "µs are medians, the spread goes from the tenth to the ninetieth percentile; goals stand in parentheses. "
        "Programs ran in turns in one process, and their outputs agreed before they were timed. Ceilings are the "
        "better of two measurements, before and after."
    )
    left = [f"- {' '.join((s.op, s.shape)).strip()}: {s.program} not timed, {s.reason}" for s in skipped]
    return "\n".join([heading(ceilings), "", *lines, "", note, "", *left])


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
        "machine": machine(),
        "ceilings": asdict(ceilings),
        "results": list(entries),
        "skipped": [asdict(s) for s in skipped],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return run


def save(
    results: Sequence[Result], ceilings: Ceilings, folder: Path, stem: str, skipped: Sequence[Skipped] = ()
) -> dict[str, Any]:
    """<stem>.json with every program's times, which is returned too, and <stem>.md, the table."""
    run = write([entry(result, ceilings) for result in results], ceilings, folder / f"{stem}.json", skipped)
    (folder / f"{stem}.md").write_text(markdown(results, ceilings, skipped), encoding="utf-8")
    return run
