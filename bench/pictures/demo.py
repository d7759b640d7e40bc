"""The demo as a picture that moves: an SVG in which each mode writes, one after the other, in slow motion.

What does not move, in a viewer that shows no animation too, is the end: the texts, and in turns of two colours what
each model call, or each verified draft, added to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

from twotower_kernels.bench.report.tables import about

COLUMNS, WIDE, HIGH, LEFT = 80, 7.8, 17, 14  # characters in a line; pixels
SLOWER, PAUSE = 24, 0.8  # than it was written; seconds between two modes
BACKGROUND, DIM, OPEN = "#0d1117", "#6e7681", "#8b949e"
TURNS = ("#e6edf3", "#7ee787")


@dataclass(frozen=True)
class Cursor:
    """Where the next character stands."""

    row: int
    column: int = 0


def spread(text: str, at: Cursor) -> tuple[list[tuple[Cursor, str]], Cursor]:
    """The text's pieces, each on one line of `COLUMNS` characters, and where it ends."""
    pieces = []
    for i, line in enumerate(text.split("\n")):
        if i:
            at = Cursor(at.row + 1)
        while line:
            room = COLUMNS - at.column
            if room <= 0:
                at = Cursor(at.row + 1)
                continue
            pieces.append((at, line[:room]))
            at, line = Cursor(at.row, at.column + len(line[:room])), line[room:]
    return pieces, at


def drawn(text: str, at: Cursor, color: str, shown: tuple[float, float | None] = (0.0, None)) -> Iterator[str]:
    """SVG of a text that is visible from one second to another (None: from then on)."""
    begin, end = shown
    for cursor, piece in spread(text, at)[0]:
        if not piece.strip():
            continue
        x, y = LEFT + cursor.column * WIDE, (cursor.row + 1) * HIGH
        # What is there at the end is so without animation too; what is not appears by it alone.
        hidden, motion = "", ""
        if end is not None:
            hidden = ' visibility="hidden"'
            motion = f'<set attributeName="visibility" to="visible" begin="{begin:.2f}s" dur="{end - begin:.3f}s"/>'
        elif begin:
            motion = f'<set attributeName="visibility" to="hidden" begin="0s" dur="{begin:.2f}s"/>'
        width = f'textLength="{len(piece) * WIDE:.1f}" lengthAdjust="spacingAndGlyphs"'
        yield f'<text x="{x:.1f}" y="{y}" fill="{color}" {width}{hidden}>{escape(piece)}{motion}</text>'


def mode(name: str, found: dict[str, Any], prompt: str, row: int, begin: float) -> tuple[list[str], int, float]:
    """One mode's part of the picture: its elements, the row behind it, and the second at which it ends."""
    lines = list(drawn(f"── {name} {'─' * (COLUMNS - 4 - len(name))}", Cursor(row), DIM))
    start = Cursor(row + 1)
    lines += drawn(prompt, start, DIM)
    start = spread(prompt, start)[1]
    at, kept, turn = start, "", 0
    ends = [frame["seconds"] for frame in found["frames"][1:]] + [found["frames"][-1]["seconds"] + 0.01]
    for frame, until in zip(found["frames"], ends, strict=True):
        second = begin + frame["seconds"] * SLOWER
        new = frame["kept"][len(kept) :]
        if new:
            lines += drawn(new, at, TURNS[turn % 2], (second, None))
            at, kept, turn = spread(new, at)[1], frame["kept"], turn + 1
        if frame["open"]:
            lines += drawn(frame["open"], at, OPEN, (second, begin + until * SLOWER))
    return lines, at.row + 1, begin + found["seconds"] * SLOWER + PAUSE


def table(run: dict[str, Any]) -> list[str]:
    """What each mode cost, and whether its text is autoregression's."""
    modes = run["modes"]
    alone = next(iter(modes.values()))
    lines = [f"{'':18}{'tokens/s':>10}{'NFE':>6}{'tokens per NFE':>17}{'accepted':>11}{'text as AR':>13}"]
    for name, found in modes.items():
        accepted = "" if found["accepted"] is None else f"{found['accepted']:.2f}"
        same = "" if found is alone else "yes" if found["text"] == alone["text"] else "no"
        rate, calls = f"{found['tokens'] / found['seconds']:.0f}", found["calls"]
        per_call = f"{found['tokens'] / calls:.2f}"
        lines.append(f"{name:18}{rate:>10}{calls:>6}{per_call:>17}{accepted:>11}{same:>13}")
    return lines


def demo(run: dict[str, Any], path: Path) -> str:
    """The picture of a recorded demo. Returns what was written."""
    elements: list[str] = []
    row, second = 0, 0.5
    for name, found in run["modes"].items():
        part, row, second = mode(name, found, run["prompt"], row, second)
        elements += part
        row += 1
    for line in table(run):
        elements += drawn(line, Cursor(row), TURNS[0], (second, None))
        row += 1
    for line in [*about(run).splitlines(), f"in motion {SLOWER} times slower than it was written"]:
        for part in wrap(line, COLUMNS):
            elements += drawn(part, Cursor(row + 1), DIM)
            row += 1
    width, height = int(2 * LEFT + COLUMNS * WIDE), (row + 2) * HIGH
    written = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" xml:space="preserve">',
            f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
            *elements,
            "</svg>\n",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    return written
