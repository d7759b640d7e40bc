"""One way to time on a CPU: outputs checked first, rivals interleaved, medians with their spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from twotower_kernels import cpu


def interleaved(rivals: dict[str, Callable[[], Any]], *, seconds: float = 2.0) -> dict[str, list[float]]:
    """Seconds per call of every rival, taken in turns until each had `seconds` or 5 calls, whichever is more.

    One call of each warms up. Interleaving spreads whatever else the machine does over all of them.
    """
    for call in rivals.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    while any(len(t) < 5 or sum(t) < seconds for t in times.values()):
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def machine() -> str:
    """What the figures were measured on."""
    return (
        f"{platform.machine()}, {cpu.kernels().isa()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


class Report:
    """A table of medians: one row per shape and rival, the first rival being ours."""

    def __init__(self, title: str) -> None:
        self.table = Table(title=f"{title}\n{machine()}")
        for name in ("case", "program", "median µs", "spread", "GB/s", "GFLOP/s", "× ours"):
            self.table.add_column(name, justify="left" if name in ("case", "program") else "right")

    def add(self, case: str, rivals: dict[str, Callable[[], Any]], *, bytes: int = 0, flops: int = 0) -> None:
        """Times `rivals`, the first being ours. bytes, flops: what the operation must move and compute at least."""
        times = interleaved(rivals)
        ours = statistics.median(next(iter(times.values())))
        for name, taken in times.items():
            median = statistics.median(taken)
            low, high = statistics.quantiles(taken, n=10)[0], statistics.quantiles(taken, n=10)[-1]
            self.table.add_row(
                case,
                name,
                f"{median * 1e6:.1f}",
                f"{low * 1e6:.0f} to {high * 1e6:.0f}",
                f"{bytes / median / 1e9:.1f}" if bytes else "",
                f"{flops / median / 1e9:.1f}" if flops else "",
                f"{median / ours:.2f}",
            )

    def show(self) -> None:
        Console().print(self.table)
