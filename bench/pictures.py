"""Every picture, from saved measurements alone: `python -m bench.pictures [RESULTS_FOLDER] [OUT_FOLDER]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.drawing import fastest, finish, page, plain
from bench.timing import OURS

# The ceiling that belongs to a dtype; a 16-bit type may always be widened, so float32's counts for it too.
PEAKS = {"bfloat16": ("bf16", "fp32"), "float16": ("fp16", "fp32"), "float32": ("fp32",), "float64": ("fp64",)}
MARKERS = "osD^vP*X<>hp"


def peak(ceilings: dict[str, float], dtype: str) -> float | None:
    """GFLOP/s of a matrix product in this dtype; None: not measured."""
    return max((ceilings[name] for name in PEAKS.get(dtype, ()) if ceilings.get(name)), default=None)


def roofline(run: dict[str, Any], path: Path) -> Figure:
    """GFLOP/s over FLOPs per byte, one panel per dtype: ours filled, the fastest rival of the same case hollow.

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
            ours, rival = result["flops"] / seconds[OURS]["median"] / 1e9, fastest(seconds)
            (drawn,) = axis.plot([x], [ours], label=result["op"], **style)
            keys.setdefault(result["op"], drawn)
            if rival is not None:
                reached = result["flops"] / rival / 1e9
                (drawn,) = axis.plot([x], [reached], label="best rival", fillstyle="none", **style)
                axis.plot([x, x], [reached, ours], color=f"C{n % 10}", linewidth=0.5, label="_")
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", xlim=ends)
        plain(axis.xaxis)
        plain(axis.yaxis)
    axes[0].set_ylabel("GFLOP/s (filled: ours, hollow: best rival)")
    return finish(figure, run, path, keys.values(), per_row=3)
