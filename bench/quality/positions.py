"""Where the shipped model is asked to go on: places inside lines of files that were held out of its training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from twotower_kernels.reference.demo_data import SOURCES, Corpus

SHORTEST, LEFT = 8, 4  # characters of a line without its indentation, and behind the place, at least
LONG = 20  # characters, from which on it says something that a line stands in training files


@dataclass(frozen=True)
class Position:
    """A place in a held-out file.

    prompt: the tokens before it. true: the text of the next `new` tokens, as it goes on in the file. duplicated: the
    line, without its indentation, stands in a file that was trained on.
    """

    source: str
    prompt: list[int]
    true: str
    duplicated: bool


@dataclass(frozen=True)
class Duplicates:
    """Of a source's held-out lines of `LONG` characters and more, how many there are, and stand in training files."""

    lines: int
    duplicated: int


def trained_lines(corpus: Corpus) -> set[str]:
    """Every line that was trained on, without its indentation."""
    return {line.strip() for text in corpus.train.values() for line in text.split("\n")}


def duplicates(corpus: Corpus, known: set[str]) -> dict[str, Duplicates]:
    found = {}
    for source in SOURCES:
        lines = [line.strip() for text in corpus.held_out_texts(source) for line in text.split("\n")]
        long = [line for line in lines if len(line) >= LONG]
        found[source] = Duplicates(len(long), sum(line in known for line in long))
    return found


def positions(
    corpus: Corpus, known: set[str], tokenizer: Tokenizer, count: int, *, context: int, new: int, seed: int = 0
) -> list[Position]:
    """`count` places of each source, each in another line where there are enough of them.

    A place is a boundary of tokens, at or behind the first letter of a line, with `LEFT` characters of the line behind
    it at least, whose end is `new` tokens away at most. The prompt is the last `context` tokens before it, `<bos>`
    included where the file begins there.
    """
    draw, found = random.Random(seed), []
    for source in SOURCES:
        candidates = [c for text in corpus.held_out_texts(source) for c in _places(text, tokenizer, context, new, draw)]
        draw.shuffle(candidates)
        for line, prompt, true in candidates[:count]:
            found.append(Position(source, prompt, true, line in known))
    return found


def _places(
    text: str, tokenizer: Tokenizer, context: int, new: int, draw: random.Random
) -> Iterator[tuple[str, list[int], str]]:
    """One place of each line that has one: the line, the prompt, the text that follows."""
    encoded = tokenizer.encode(text)
    ids = [1, *encoded.ids]
    starts = [start for start, _ in encoded.offsets]
    begin, first = 0, 0
    for line in text.split("\n"):
        end, words = begin + len(line), line.strip()
        while first < len(starts) and starts[first] < begin:
            first += 1
        letters = begin + len(line) - len(line.lstrip())
        inside, i = [], first
        while i < len(starts) and starts[i] <= end - LEFT:
            # A token of a character's later bytes has that character's offset: no boundary.
            if starts[i] >= letters and (i == 0 or starts[i] > starts[i - 1]):
                inside.append(i)
            i += 1
        begin = end + 1
        if len(words) < SHORTEST or not inside:
            continue
        place = draw.choice(inside)
        ends = place + new
        if ends < len(starts) and starts[ends - 1] > end:  # the line's end is among the tokens to be written
            yield words, ids[max(0, place + 1 - context) : place + 1], text[starts[place] : starts[ends]]
