"""The tables of `bench.generation`, in Markdown."""

from __future__ import annotations

from typing import Any

from twotower_kernels.bench.report.tables import about
from twotower_kernels.reference.demo_report import table


def _form(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _rows(rows: list[dict[str, Any]]) -> str:
    """One line per mode, batch and context. Figures that a part does not have are left out with their column."""
    columns = {
        "prefill, s": lambda r: _form(r.get("prefill seconds"), "{:.2f}"),
        "step, ms": lambda r: _form(r.get("step seconds"), "{:.1f}", 1e-3),
        "commit, ms": lambda r: _form(r.get("commit seconds"), "{:.1f}", 1e-3),
        "tokens per NFE": lambda r: _form(r["tokens per NFE"], "{:.2f}"),
        "tokens/s": lambda r: _form(r["tokens per second"], "{:.0f}" if r["tokens per second"] > 100 else "{:.1f}"),
        **{
            f"at {n} per NFE": lambda r, n=n: _form(r.get("tokens per second at", {}).get(n), "{:.1f}")
            for n in ("1", "2", "4")
        },
        "prefill, peak MB": lambda r: _form(r.get("prefill bytes"), "{:.0f}", 1e6),
        "peak MB": lambda r: _form(r["bytes"], "{:.0f}", 1e6),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    used = {name: column for name, column in cells.items() if any(column)}
    first = [[r["mode"], r["batch"], r["context"]] for r in rows]
    lines = [[*line, *(column[i] for column in used.values())] for i, line in enumerate(first)]
    return table(["mode", "batch", "context", *used], lines)


def _drafts(rows: list[dict[str, Any]]) -> str:
    """One line per length of drafts."""
    alone = rows[0]["seconds"]
    lines = [
        [
            row["draft"],
            f"{row['tokens per second']:.0f}",
            f"{alone / row['seconds']:.2f}",
            _form(row["accepted"], "{:.2f}"),
            _form(row["identical"], "{:.0%}"),
        ]
        for row in rows
    ]
    return table(["draft", "tokens/s", "times AR", "accepted", "identical"], lines)


def _rounds(rows: list[dict[str, Any]]) -> str:
    """One line per context and length of drafts."""
    lines = [
        [
            row["context"],
            row["draft"],
            f"{row['token seconds'] * 1e3:.1f}",
            f"{row['round seconds'] * 1e3:.1f}",
            f"{row['accepted']:.2f}",
            f"{row['times']:.2f}",
        ]
        for row in rows
    ]
    return table(["context", "draft", "token, ms", "round, ms", "accepted", "times AR"], lines)


def _shares(found: list[dict[str, Any]]) -> str:
    """Milliseconds per operation, one column per context."""
    lines = []
    for name in found[0]["parts"]:
        cells = [(step["parts"][name], step["parts"][name] / sum(step["parts"].values())) for step in found]
        lines.append([name, *(f"{seconds * 1e3:.2f} ({100 * share:.0f} %)" for seconds, share in cells)])
    lines.append(["sum of these", *(f"{sum(step['parts'].values()) * 1e3:.2f}" for step in found)])
    lines.append(["a step without clocks", *(f"{step['whole'] * 1e3:.2f}" for step in found)])
    return table(["ms at context", *(step["context"] for step in found)], lines)


def _thresholds(found: dict[str, Any]) -> str:
    real = found["real text"]
    lines = [["the real text", "", "", f"{real['nats per token']:.2f}", f"{real['distinct 4-grams']:.2f}"]]
    for row in found["sweep"]:
        name = row["mode"] if row["threshold"] is None else f"{row['mode']}, γ = {row['threshold']:g}"
        figures = (row["tokens per NFE"], row["tokens per second"], row["nats per token"], row["distinct 4-grams"])
        lines.append([name, *(form.format(x) for form, x in zip(FORMS, figures, strict=True))])
    return table(["run", "tokens per NFE", "tokens/s", "nats per token", "distinct 4-grams"], lines)


FORMS = ("{:.2f}", "{:.0f}", "{:.2f}", "{:.2f}")


def markdown(run: dict[str, Any]) -> str:
    """What a run of `bench.generation` found, whichever parts it had."""
    parts = [about(run).replace("\n", "; ") + "."]
    if "shipped" in run:
        parts += [
            "## The shipped model",
            "Greedy, threshold 0.8, on texts held out of its training, 128 new tokens a row. Tokens per second are of "
            "the whole batch, by the median time of a block (`ar`, `mock_ar`: of a token) after the first. Memory is "
            "the most that was resident, Python and libraries included: during the prefill, and after it.",
            _rows(run["shipped"]),
        ]
    if "random" in run:
        parts += [
            "## The mid-size random model",
            "bfloat16, from a context of random keys, values and states. In mask diffusion, blocks of 16 in four "
            "steps: `tokens/s` is measured so, and `at n per NFE` is computed from the measured step and commit: "
            "batch · 16 / (16/n · step + commit).",
            _rows(run["random"]),
        ]
    if "speculative" in run:
        found = run["speculative"]
        parts += [
            "## Speculative decoding",
            f"The shipped model, batch 1, greedy, {found['new tokens']} tokens from {found['prompts']} held-out "
            "contexts; the ways in turns, of each prompt the fastest of five runs, prefill not counted. Draft 0 is "
            "autoregression; identical: the share of texts that are autoregression's.",
            _drafts(found["shipped"]),
            "The mid-size random model, batch 1, bfloat16: a token of autoregression, and a round, a draft and "
            "its verification, as measured; and how many times as fast as autoregression it would write if it accepted "
            "what the shipped model accepts.",
            _rounds(found["random"]),
        ]
    if "shares" in run:
        parts += [
            "## Where the time of a denoiser step goes",
            "The mid-size random model, batch 1, bfloat16; medians of steps with a clock around every operation.",
            _shares(run["shares"]),
        ]
    if "thresholds" in run:
        found = run["thresholds"]
        parts += [
            "## The un-masking threshold",
            f"The shipped model, greedy, {found['prompts']} held-out prompts of {found['prompt tokens']} tokens, "
            f"{found['new tokens']} tokens more. Nats per token: what the context tower, in float32, gives to the "
            "continuation. Greedy text repeats itself, which lowers them: read them beside the share of 4-grams that "
            "do not repeat.",
            _thresholds(found),
        ]
    return "\n\n".join(parts) + "\n"
