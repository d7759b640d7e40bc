"""Machines as the cost model sees them: what their memory, their arithmetic and their launches allow."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.options.config import DTYPES

# What kernels reach of the vendors' figures: assumptions, until one of these machines was measured.
READ_SHARE, MATRIX_SHARE = 0.9, 0.8
# Seconds from one kernel of a CUDA graph to the next: an assumption.
GRAPH_LAUNCH = 2e-6


@dataclass(frozen=True)
class Machine:
    """One device, and what joins it to a second one.

    Attributes:
        memory: bytes.
        read: bytes per second of main memory that a kernel reaches.
        flops: per second that a matrix product reaches, by the name of the dtype.
        launch: seconds that an operation takes at the least.
        link: bytes per second, one way, to the device of the other tower.
        source: where the figures come from.
    """

    name: str
    memory: float
    read: float
    flops: dict[str, float]
    launch: float
    link: float
    source: str


def _gpu(
    name: str, memory: float, read: float, bf16: float, fp32: float, fp64: float, link: float, source: str
) -> Machine:
    """From a data sheet: GB, GB/s, TFLOP/s without sparsity, GB/s of the link in one direction."""
    flops = {"bfloat16": bf16, "float16": bf16, "float32": fp32, "float64": fp64}
    reached = {dtype: MATRIX_SHARE * peak * 1e12 for dtype, peak in flops.items()}
    return Machine(name, memory * 1e9, READ_SHARE * read * 1e9, reached, GRAPH_LAUNCH, link * 1e9, source)


MACHINES = {
    "h100": _gpu("H100 SXM", 80, 3350, 989, 67, 67, 450, "https://www.nvidia.com/en-us/data-center/h100/"),
    "h200": _gpu("H200 SXM", 141, 4800, 989, 67, 67, 450, "https://www.nvidia.com/en-us/data-center/h200/"),
    "b200": _gpu("B200", 180, 8000, 2250, 75, 37, 900, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    # One petaflop of FP4 with sparsity is all that is published. Taken from it: bfloat16 without sparsity an eighth,
    # float32 a quarter of that, float64 a sixty-fourth of float32; the link is 200 Gb/s Ethernet.
    "gb10": _gpu("GB10", 128, 273, 125, 31, 0.5, 25, "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"),
}


def by_name(card: str) -> Machine | None:
    """The machine above that a GPU of this name is."""
    return next((machine for key, machine in MACHINES.items() if re.search(rf"\b{key}\b", card, re.I)), None)


def of_ceilings(name: str, limits: Ceilings, memory: float, source: str) -> Machine:
    """A device by what was measured on it."""
    flops = {dtype: limits.matrix(getattr(torch, dtype)) * 1e9 for dtype in DTYPES}
    read = limits.read * 1e9
    return Machine(name, memory, read, flops, limits.launch, read, source)


def measured(run: Path) -> Machine:
    """The CPU of a saved run of the benchmarks, by the ceilings that it measured.

    Raises:
        OSError: no such file. ValueError: not a saved run.
    """
    try:
        saved = json.loads(run.read_text(encoding="utf-8"))
        about, limits = saved["machine"], Ceilings(**saved["ceilings"])
        name, source = f"{about['processor']}, {about['threads']} threads", f"{about['date']}, commit {about['commit']}"
        return of_ceilings(name, limits, _installed_memory(), f"measured, {source}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run}: expected a run saved by the benchmarks, got {error!r}") from None


def _installed_memory() -> float:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return float(text.split("MemTotal:")[1].split()[0]) * 1024
