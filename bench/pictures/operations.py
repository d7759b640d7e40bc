"""The pictures of operations: their rates under the measured roof, and their time over a size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower_kernels.bench.measure.timing import ORIGINAL, OURS
from twotower_kernels.bench.pictures.drawing import BEST, PROGRAMS, fastest, finish, page, plain, spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The ceiling that belongs to a dtype; a 16-bit type may always be widened, so float32's counts for it too.
PEAKS = {"bfloat16": ("bf16", "fp32"), "float16": ("fp16", "fp32"), "float32": ("fp32",), "float64": ("fp64",)}
MARKERS = "osD^vP*X<>hp"


def peak(ceilings: dict[str, float], dtype: str) -> float | None:
    """GFLOP/s of a matrix product in this dtype; None: not measured."""
    return max((ceilings[name] for name in PEAKS.get(dtype, ()) if ceilings.get(name)), default=None)


def roofline(run: dict[str, Any], path: Path) -> Figure:
    """GFLOP/s over FLOPs per byte, one panel per dtype: ours filled, the fastest baseline of the same case hollow.

    Cases whose bytes or FLOPs were not counted, or whose dtype has no measured ceiling, are left out.

    Args:
        run: a saved run of the operations' benchmark.
        path: of the PNG file.

    Raises:
        ValueError: nothing is left to draw.
    """
    ceilings = run["ceilings"]
    cases = [r for r in run["results"] if r["bytes"] and r["flops"] and peak(ceilings, r["dtype"])]
    if not cases:
        raise ValueError("roofline: expected a case with bytes, FLOPs and a ceiling of its dtype, got none")
    dtypes = [dtype for dtype in PEAKS if any(r["dtype"] == dtype for r in cases)]
    ops = list(dict.fromkeys(r["op"] for r in cases))
    figure, axes = page(len(dtypes), 3.4, columns=min(2, len(dtypes)), sharey=True)
    intensities = [r["flops"] / r["bytes"] for r in cases]
    ends = min(intensities) / 2, max(intensities) * 2
    keys: dict[str, Any] = {}
    for axis, dtype in zip(axes, dtypes, strict=True):
        limit, read = peak(ceilings, dtype) or 0.0, ceilings["read"]
        corner = min(max(limit / read, ends[0]), ends[1])
        axis.plot([ends[0], corner, ends[1]], [min(limit, read * x) for x in (ends[0], corner, ends[1])], color="0.4")
        axis.set_title(f"{dtype}: {limit:.0f} GFLOP/s, {read:.0f} GB/s", fontsize=8)
        for result in (r for r in cases if r["dtype"] == dtype):
            n = ops.index(result["op"])
            style = dict(marker=MARKERS[n % len(MARKERS)], color=f"C{n % 10}", markersize=5, linestyle="none")
            x, seconds = result["flops"] / result["bytes"], result["seconds"]
            ours, baseline = result["flops"] / seconds[OURS]["median"] / 1e9, fastest(seconds)
            (drawn,) = axis.plot([x], [ours], label=result["op"], **style)
            keys.setdefault(result["op"], drawn)
            if baseline is not None:
                reached = result["flops"] / baseline / 1e9
                (drawn,) = axis.plot([x], [reached], label="best baseline", fillstyle="none", **style)
                axis.plot([x, x], [reached, ours], color=f"C{n % 10}", linewidth=0.5, label="_")
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", xlim=ends)
        plain(axis.xaxis, subs=(1,))
        plain(axis.yaxis)
    axes[0].set_ylabel("GFLOP/s (filled: ours, hollow: best baseline)")
    return finish(figure, run, path, keys.values(), per_row=3)


def over(run: dict[str, Any], size: str, path: Path) -> Figure:
    """Time over one size, a panel per operation: ours, the best PyTorch and the original style.

    Args:
        run: a saved run of `bench.sweeps`.
        size: context, batch or vocabulary: what the sweep's results differ by.
        path: of the PNG file.

    Raises:
        ValueError: the run has no such sweep.
    """
    results = [r for r in run["results"] if r["sweep"] == size]
    if not results:
        raise ValueError(f"time over {size}: expected a run with such a sweep, got none")
    ops = list(dict.fromkeys(r["op"] for r in results))
    figure, axes = page(len(ops), 2.7, columns=min(2, len(ops)))
    keys: dict[str, Any] = {}
    for axis, op in zip(axes, ops, strict=True):
        found = sorted((r for r in results if r["op"] == op), key=lambda r: r["sizes"][size])
        medians: dict[str, Callable[[dict[str, Any]], float | None]] = {
            OURS: lambda seconds: seconds[OURS]["median"],
            BEST: lambda seconds: fastest(seconds, but=(OURS, ORIGINAL)),
            ORIGINAL: lambda seconds: seconds[ORIGINAL]["median"] if ORIGINAL in seconds else None,
        }
        for name, median in medians.items():
            points = [(r["sizes"][size], t * 1e3) for r in found if (t := median(r["seconds"])) is not None]
            if points:
                color, marker, line = PROGRAMS[name]
                style = dict(color=color, marker=marker, linestyle=line, markersize=4, linewidth=1)
                (keys[name],) = axis.plot(*zip(*points, strict=True), label=name, **style)
        constant = [
            f"{name} {found[0]['sizes'][name]}"
            for name in ("batch", "context")
            if name != size
            and all(name in r["sizes"] and r["sizes"][name] == found[0]["sizes"].get(name) for r in found)
        ]
        axis.set_title(", ".join([op, *constant, found[0]["dtype"]]), fontsize=7)
        axis.set(xscale="log", yscale="log", xlabel=size)
        plain(axis.yaxis)
        values = [r["sizes"][size] for r in found]
        axis.set_xticks(values, [spoken(value) for value in values], rotation=90 if len(values) > 6 else 0)
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("ms, median")
    return finish(figure, run, path, keys.values())
