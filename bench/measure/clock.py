"""Time on a CPU: programs in turns, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, and the tenth and ninetieth percentile. graph: replayed from a CUDA graph."""

    median: float
    low: float
    high: float
    calls: int
    graph: bool = False


def interleaved(programs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """All programs in turns, in alternating order, until each had `seconds`, and three calls at least. Between two
    calls next to nothing happens: what it threw out of the caches would be charged to the next. (`measure` has called
    each before.)"""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    total, order = dict.fromkeys(programs, 0.0), list(programs.items())
    while any(len(taken[name]) < 3 or total[name] < seconds for name in programs):
        for name, call in order:
            if len(taken[name]) >= 3 and total[name] >= 3 * seconds:
                continue  # the slow need not wait for the fast
            start = time.perf_counter()
            call()
            spent = time.perf_counter() - start
            taken[name].append(spent)
            total[name] += spent
        order.reverse()
    return {name: timing_of(times) for name, times in taken.items()}


def timing_of(times: list[float], graph: bool = False) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1], len(times), graph)
