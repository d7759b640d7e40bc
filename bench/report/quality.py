"""The tables of `bench.quality`, in Markdown."""

from __future__ import annotations

from typing import Any

from twotower_kernels.reference.demo_report import table

NAMES = {"transformers": "transformers' model definitions", "stdlib": "the standard library"}
COLUMNS = {
    "tokens per draft": "{:.2f}",
    "tokens per call": "{:.2f}",
    "characters per call": "{:.2f}",
    "line exact match": "{:.3f}",
    "matching prefix": "{:.1f}",
    "edit similarity": "{:.3f}",
    "agreement with AR": "{:.3f}",
    "nats per token": "{:.2f}",
    "distinct 4-grams": "{:.2f}",
}
APART = ("tokens per draft", "tokens per call", "line exact match", "matching prefix")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _of_all(group: dict[str, Any]) -> str:
    """One line per run with every score."""
    rows = [
        [name, *(_cell(scores[column], form) for column, form in COLUMNS.items())]
        for name, scores in group["runs"].items()
    ]
    return table(["run", *COLUMNS], rows)


def _apart(groups: list[dict[str, Any]]) -> str:
    """One line per run, with the scores of each kind of line beside each other."""
    header = [f"{column}, {group['lines']}" for column in APART for group in groups]
    rows = [
        [name, *(_cell(group["runs"][name][column], COLUMNS[column]) for column in APART for group in groups)]
        for name in groups[0]["runs"]
    ]
    return table(["run", *header], rows)


def markdown(found: dict[str, Any]) -> str:
    """What `bench.quality` measured."""
    parts = [
        "**Text.** From places inside lines of held-out files, each with what stands before it there (up to "
        f"{found['context']} tokens), the model goes on by {found['new tokens']} tokens, greedily. Line exact match: "
        "the rest of the line is the file's. Matching prefix: characters before the first that differs from the file. "
        "Edit similarity: 1 - edit distance / length. Agreement with AR: the share of tokens before the first that "
        "differs from greedy autoregression's. A call is one of a tower (NFE); tokens per draft: kept, of a draft that "
        "the context tower verified. Nats per token: what the context tower gives to the text; repetition lowers them, "
        "so read them beside the share of 4-grams that do not repeat. Prompt lookup drafts what followed the latest "
        "occurrence of the last tokens, without a denoiser."
    ]
    for source, name in NAMES.items():
        groups = {group["lines"]: group for group in found["groups"] if group["source"] == source}
        if not groups:
            continue
        count, duplicates = groups["all"]["positions"], found["duplicates"][source]
        share = duplicates["duplicated"] / max(1, duplicates["lines"])
        parts += [
            f"*Held-out files of {name}*, {count} places. Of their {duplicates['lines']} lines of {found['long']} "
            f"characters and more {share:.0%} also stand in training files:",
            _of_all(groups["all"]),
        ]
        kinds = [groups[kind] for kind in ("duplicated", "novel") if kind in groups]
        if len(kinds) == 2:
            counts = " and ".join(f"{group['positions']} in {group['lines']} lines" for group in kinds)
            parts += [f"The same apart: {counts}.", _apart(kinds)]
    return "\n\n".join(parts) + "\n"
