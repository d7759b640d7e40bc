"""Types of command-line arguments: what a number must be is checked, and said, before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

LONGEST = 40  # characters of a value that an error shows


def checked(kind: Callable[[str], Any], words: str, allowed: Callable[[Any], Any]) -> Callable[[str], Any]:
    """An argument type: text that `kind` makes a value of which is allowed. Comparisons must fail for NaN."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            shown = repr(text) if len(text) <= LONGEST else f"{text[:LONGEST]!r}..."
            raise argparse.ArgumentTypeError(f"expected {words}, got {shown}")
        return value

    return parse


def integer(least: int, most: int) -> Callable[[str], Any]:
    """An integer of a range."""
    return checked(int, f"an integer from {least} to {most}", lambda n: least <= n <= most)


def number(least: float = -math.inf, *, above: float = -math.inf, most: float = math.inf) -> Callable[[str], Any]:
    """A finite number, `least` or more, more than `above`, `most` at most."""
    bounds = [
        *[f"{least:g} or more"] * (least > -math.inf),
        *[f"above {above:g}"] * (above > -math.inf),
        *[f"at most {most:g}"] * (most < math.inf),
    ]
    words = ", ".join(["a finite number", *bounds])
    return checked(float, words, lambda x: math.isfinite(x) and least <= x <= most and x > above)
