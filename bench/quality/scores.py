"""How near a text that a model wrote is to the one that stands in the file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from twotower_kernels.bench.baselines.prompt_lookup import lookup


def first_line(text: str) -> str | None:
    """What stands before the first newline; None: there is none."""
    line, newline, _ = text.partition("\n")
    return line if newline else None


def same_line(text: str, true: str) -> bool:
    """Whether the line is finished as in the file, to the letter."""
    return first_line(text) == first_line(true) is not None


def matching_prefix(text: str, true: str) -> int:
    """Characters before the first difference."""
    return _alike(text, true)


def _alike(a: Sequence[object], b: Sequence[object]) -> int:
    """How many elements stand before the first that differs."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that make one of the other (Levenshtein), a column of the table at a time
    in the bits of two integers (Hyyrö 2001, after Myers 1999)."""
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = defaultdict(int)
    for i, letter in enumerate(a):
        places[letter] |= 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for letter in b:
        match = places.get(letter, 0)
        zero = (((match & up) + up) ^ up) | match | down
        right, left = down | (~(zero | up) & every), up & zero
        distance += bool(right & last) - bool(left & last)
        right, left = (right << 1 | 1) & every, (left << 1) & every
        up, down = left | (~(zero | right) & every), right & zero
    return distance


def edit_similarity(a: str, b: str) -> float:
    """1 for equal texts, 0 for texts that share nothing."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def agreement(tokens: list[int], others: list[int]) -> float:
    """The share of the tokens that stand before the first one that differs."""
    return _alike(tokens, others) / max(len(tokens), len(others), 1)


def lookups(prompt: list[int], text: list[int], draft: int) -> int:
    """Verifications that prompt lookup needs to write a text that is known to be autoregression's.

    A draft is the known next token and what `lookup` finds behind it; verified, it yields as many tokens as agree with
    the text, the known one included.
    """
    known, written, calls = [*prompt], 0, 0
    while written < len(text):
        known.append(text[written])  # which the last verification has chosen
        guess = lookup(known, draft - 1)
        agreed = 1
        while agreed <= len(guess) and written + agreed < len(text) and guess[agreed - 1] == text[written + agreed]:
            agreed += 1
        known += text[written + 1 : written + agreed]
        written, calls = written + agreed, calls + 1
    return calls
