"""One look for every picture: column width, grey first, and below each what it was measured on."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from twotower_kernels.bench.measure.timing import ORIGINAL, OURS
from twotower_kernels.bench.report.tables import about

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLUMN = 3.5  # inches: one column of a printed page; every letter is 7 points or more at that width
BEST = "best PyTorch"
# A colour, a marker and a line of its own for each: told apart without colours too.
PROGRAMS = {OURS: ("black", "o", "-"), BEST: ("tab:blue", "^", "--"), ORIGINAL: ("tab:red", "s", ":")}
_FONT = {"font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7}


def page(panels: int = 1, height: float = 2.6, columns: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in one row, so many columns of a page wide. ImportError: no matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib: pip install 'twotower-kernels[bench]' ({error})") from error
    with rc_context(_FONT):
        figure = Figure(figsize=(COLUMN * columns, height), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])
    for each in axes:
        each.grid(alpha=0.3, linewidth=0.5)
    return figure, axes


def finish(figure: Figure, run: dict[str, Any], path: Path, keys: Iterable[Any] = (), per_row: int = 3) -> Figure:
    """Legend (what `keys` draw, by their labels) and machine below the panels, and the file: PNG, 150 dots an inch."""
    letters = int(17 * figure.get_figwidth())  # of 7 points in a line
    where = "\n".join(fill(line, letters) for line in about(run).splitlines())
    figure.supxlabel(where, fontsize=7, color="0.3")
    keys = list(keys)
    if keys:
        names = [str(key.get_label()) for key in keys]
        figure.legend(keys, names, loc="outside upper center", ncols=per_row, frameon=False, fontsize=7)
    from PIL import Image  # as matplotlib itself does

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(path, format="PNG", optimize=True)  # a third of the size
    return figure


def plain(axis: Axis, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """A logarithmic axis with numbers as they are spoken: 1, 2, 5, 10 instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def fastest(seconds: dict[str, Any], but: tuple[str, ...] = (OURS,)) -> float | None:
    """Seconds, the median, of the fastest program but these; None: there is no other."""
    return min((timing["median"] for name, timing in seconds.items() if name not in but), default=None)


def spoken(value: int) -> str:
    """1024 as 1k, 8 as 8."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)
