"""Tables of results: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import twotower_kernels as tt
from bench.ceilings import Ceilings
from bench.timing import ORIGINAL, OURS, Result
from twotower_kernels import cpu

HEADER = ("op", "shape", "dtype", "µs", "spread", "vs original", "vs best PyTorch", "of ceiling", "GB/s", "GFLOP/s")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.findall(r"model name\s*:\s*(.+)", text)[0]
        family = " ".join(re.findall(rf"^{key}\s*:\s*(\d+)", text, re.MULTILINE)[0] for key in ("cpu family", "model"))
        model += f", family and model {family}"
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": cpu.kernels().isa(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "twotower_kernels": tt.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": described.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def _ratio(value: float | None, goal: float | None, form: str = "{:.1f}×") -> str:
    if value is None:
        return ""
    return form.format(value) + (f" ({form.format(goal)})" if goal is not None else "")


def cells(result: Result, ceilings: Ceilings) -> tuple[str, ...]:
    """A row of HEADER; goals in parentheses."""
    case, ours, best = result.case, result.timings[OURS], result.best()
    original, pytorch, share = case.goals
    reached = result.share(ceilings)
    return (
        case.op,
        case.shape,
        str(case.dtype).removeprefix("torch."),
        f"{ours.median * 1e6:.1f}",
        f"{ours.low * 1e6:.0f} to {ours.high * 1e6:.0f}",
        _ratio(result.against(ORIGINAL), original),
        _ratio(None if best is None else result.against(best), pytorch),
        _ratio(None if reached is None else 100 * reached, None if share is None else 100 * share, "{:.0f} %"),
        f"{case.bytes / ours.median / 1e9:.1f}" if case.bytes else "",
        f"{case.flops / ours.median / 1e9:.0f}" if case.flops else "",
    )


def table(results: Sequence[Result], ceilings: Ceilings) -> Table:
    found = Table()
    for n, name in enumerate(HEADER):
        found.add_column(name, justify="left" if n < 3 else "right")
    for result in results:
        found.add_row(*cells(result, ceilings))
    return found


def heading(ceilings: Ceilings) -> str:
    about = machine()
    if about["gpu"] is not None:
        where = f"{about['gpu']}; torch {about['torch']}, Python {about['python']}"
    else:
        where = (
            f"{about['processor']}, {about['threads']} threads of {about['cores']} cores, {about['instruction set']}; "
            f"torch {about['torch']}, Python {about['python']}"
        )
    return (
        f"{where}; commit {about['commit']}, {about['date']}. Ceilings, "
        f"measured: memory read {ceilings.read:.1f} GB/s, copy {ceilings.copy:.1f} GB/s; matrix product "
        f"{ceilings.fp32:.0f} GFLOP/s float32, {ceilings.bf16:.0f} GFLOP/s bfloat16."
    )


def markdown(results: Sequence[Result], ceilings: Ceilings) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(cells(result, ceilings) for result in results)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = (
        "µs are medians, the spread goes from the tenth to the ninetieth percentile; goals stand in parentheses. "
        "Programs ran in turns in one process, and their outputs agreed before they were timed. Ceilings are the "
        "better of two measurements, before and after."
    )
    return "\n".join([heading(ceilings), "", *lines, "", note, ""])


def save(results: Sequence[Result], ceilings: Ceilings, folder: Path, stem: str) -> None:
    """<stem>.json with every program's times, and <stem>.md, the table."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        {
            "op": r.case.op,
            "shape": r.case.shape,
            "dtype": str(r.case.dtype).removeprefix("torch."),
            "bytes": r.case.bytes,
            "flops": r.case.flops,
            "share of ceiling": r.share(ceilings),
            "seconds": {name: asdict(timing) for name, timing in r.timings.items()},
        }
        for r in results
    ]
    whole = {"machine": machine(), "ceilings": asdict(ceilings), "results": found}
    (folder / f"{stem}.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(results, ceilings), encoding="utf-8")
