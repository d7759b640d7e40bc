"""Time on a GPU: programs replayed from CUDA graphs, behind a read that leaves the second-level cache cold.

In a model's step a kernel follows another in a graph, and finds in the cache nothing of its own weights and states. So
a graph holds the program many times, each behind a sum over a buffer of twice the cache; what such sums take alone is
measured beside it and subtracted. (Sums: a buffer that is written would leave the cache to be written back at the
program's expense.) Neither the host's launches nor the clock's resolution are in the figure.

A program that waits for the device, as a loop over the experts in use does, cannot be recorded. It is timed call by
call, between two events behind the same sum, and what the host needs is part of it, as it is in use.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from twotower_kernels.bench.measure.clock import Timing, timing_of
from twotower_kernels.model.capture import Recorder, cuda_graph

CALLS = 32  # of a program in its graph, at most
GRAPH = 2e-3  # seconds that a graph should take

Program = Callable[[], Any]
Turn = Callable[[], tuple[float, float]]  # seconds per call, and seconds that it took to find out


def on_gpu(
    programs: Mapping[str, Program], seconds: float, device: str = "cuda", record: Recorder = cuda_graph
) -> dict[str, Timing]:
    """All programs in turns, in alternating order, until each had `seconds`, and five turns at least. Each was called
    before."""
    where = torch.device(device)
    buffer = torch.ones(2 * torch.cuda.get_device_properties(where).L2_cache_size // 4, device=where)
    total = torch.empty((), device=where)

    def flush() -> None:
        torch.sum(buffer, dim=0, out=total)

    flush()
    flushing = lasting(flush)
    recorded = {name: _recorded(call, flush, flushing, where, record) for name, call in programs.items()}
    turns = {name: recorded[name] or _called(call, flush) for name, call in programs.items()}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    spent, order = dict.fromkeys(programs, 0.0), list(turns.items())
    while any(len(taken[name]) < 5 or spent[name] < seconds for name in programs):
        for name, turn in order:
            if len(taken[name]) < 5 or spent[name] < seconds:
                found, whole = turn()
                taken[name].append(found)
                spent[name] += whole
        order.reverse()
    return {name: timing_of(times, graph=recorded[name] is not None) for name, times in taken.items()}


def lasting(call: Program) -> float:
    """Seconds of a call between two events; everything before it is waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _recorded(call: Program, flush: Program, flushing: float, device: torch.device, record: Recorder) -> Turn | None:
    """Replays of many calls; None for a program that cannot be recorded."""
    if waits(call):
        return None
    number = max(1, min(CALLS, int(GRAPH / (flushing + lasting(call)))))

    def all_calls(*parts: Program) -> None:
        for _ in range(number):
            for part in parts:
                part()

    try:
        both, _ = record(lambda: all_calls(flush, call), device)
        alone, _ = record(lambda: all_calls(flush), device)
    except RuntimeError:  # it asked for what a graph cannot hold
        return None

    def replayed() -> tuple[float, float]:
        whole, less = lasting(both), lasting(alone)
        return (whole - less) / number, whole + less

    return replayed


def _called(call: Program, flush: Program) -> Turn:
    def called() -> tuple[float, float]:
        flush()
        taken = lasting(call)
        return taken, taken

    return called


def waits(call: Program) -> bool:
    """Whether a call waits for the device, as far as PyTorch notices, or fails when it must not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def median(call: Program, times: int = 20) -> float:
    """Seconds per call of something that takes milliseconds."""
    return statistics.median(lasting(call) for _ in range(times))
