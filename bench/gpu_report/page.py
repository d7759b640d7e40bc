"""A report as a page of Markdown: to read in a terminal, and as it is in an issue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from twotower_kernels.bench.gpu_report.beside import Beside, card_of, result_of, steps, timed, writing
from twotower_kernels.bench.gpu_report.runner import DONE, HELD, outcome
from twotower_kernels.options.units import size

Lines = Iterator[str]


def cell(value: object) -> str:
    """A text in a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Lines:
    """Nothing, without rows."""
    if rows:
        yield f"| {' | '.join(header)} |"
        yield f"|{' --- |' * len(header)}"
        yield from (f"| {' | '.join(map(cell, row))} |" for row in rows)
        yield ""


def quoted(lines: Sequence[str]) -> Lines:
    """As they were printed."""
    yield "```text"
    yield from (line.replace("```", "'''") for line in lines)
    yield "```"
    yield ""


def microseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e6:.1f}"


def _parts(report: dict[str, Any]) -> Lines:
    yield "## The parts"
    yield ""
    yield from table(["part", "what became of it"], [(e["title"], outcome(e)) for e in report["parts"]])
    for entry in report["parts"]:
        if entry["state"] not in DONE or (entry["state"] != HELD and entry["result"] is None):
            yield f"The last words of “{entry['title']}”:"
            yield ""
            yield from quoted(entry["said"] or ["(none)"])


def _checks(report: dict[str, Any]) -> Lines:
    yield "## What held"
    yield ""
    found = result_of(report, "checks")
    if found is None:
        yield "The checks have not run, or left no result."
        yield ""
        return
    left = found["checks"] - found["held"] - len(found["failed"]) - len(found["refused"])
    again = "the same bits twice" + (", and from a replayed graph" if report["device"] == "cuda" else "")
    yield (
        f"{found['held']} of {found['checks']} checks held; {len(found['failed'])} failed, {len(found['refused'])} "
        f"were refused, {left} did not run. Every operation on its cases within the error budget against float64, "
        f"{again}; recorded tensors and texts; the shipped model's text."
    )
    yield ""
    for kind in ("failed", "refused"):
        why: dict[str, list[str]] = {}
        for entry in found[kind]:
            why.setdefault(entry["why"], []).append(entry["check"])
        yield from table([kind, "because"], [("; ".join(sorted(labels)), reason) for reason, labels in why.items()])


def _machine(report: dict[str, Any]) -> Lines:
    about = result_of(report, "machine")
    yield "## Where"
    yield ""
    if about is None:
        yield "Not known."
        yield ""
        return
    facts = {name: value for name, value in about.items() if not isinstance(value, dict) and value is not None}
    for name in ("versions", "card", "nvidia-smi"):
        if isinstance(about.get(name), dict):
            facts |= about[name]
    for name in ("memory", "total_memory", "L2_cache_size"):
        if isinstance(facts.get(name), int):
            facts[name] = size(facts[name])
    shown = [(name, ", ".join(map(str, v)) if isinstance(v, list) else v) for name, v in facts.items()]
    yield from table(["", ""], shown)
    limits = result_of(report, "ceilings")
    if limits:
        yield (
            f"Ceilings, measured: memory read {limits['read']:.4g} GB/s, copy {limits['copy']:.4g} GB/s; matrix "
            f"product {limits['fp64']:.4g} GFLOP/s float64, {limits['fp32']:.4g} float32, {limits['fp16']:.4g} "
            "float16, "
            f"{limits['bf16']:.4g} bfloat16; launch {limits['launch'] * 1e6:.1f} µs."
        )
        yield ""


def _columns(times: Beside) -> list[str]:
    ratio = "" if times.predicted is None else f"{times.measured / times.predicted:.2f}"
    return [*map(microseconds, (times.measured, times.predicted, times.from_data_sheet)), ratio]


def _times(report: dict[str, Any]) -> Lines:
    yield "## Times"
    yield ""
    sheet = card_of(report)
    yield (
        "Predicted: the larger of bytes at the memory's speed and products at theirs, and a launch, by the ceilings "
        "above" + (f"; from the data sheet, those of {sheet.name}" if sheet else "") + ". Of ceiling: the least time "
        "that bytes and products allow, over the time measured. vs PyTorch: how many times as long its best "
        "composition takes."
    )
    yield ""
    header = ["µs", "predicted, µs", "from the data sheet, µs", "measured / predicted"]
    rows = [
        [
            *(t.op, t.shape, t.dtype, *_columns(t.times), f"{t.gigabytes:.1f}", f"{t.teraflops:.2f}"),
            *(f"{100 * t.share:.0f} %", "" if t.ratio is None else f"{t.ratio:.1f}×"),
        ]
        for t in timed(report)
    ]
    yield from table(["op", "shape", "dtype", *header, "GB/s", "TFLOP/s", "of ceiling", "vs PyTorch"], rows)
    left = [
        (skipped["op"], skipped["shape"], skipped["program"], skipped["reason"])
        for entry in report["parts"]
        if entry["part"].startswith("times of ") and entry["result"]
        for skipped in entry["result"]["skipped"]
    ]
    yield from table(["op", "shape", "program", "not timed, because"], left)
    passes = list(steps(report))
    if passes:
        layers = len(result_of(report, "model")["layers"])
        yield f"The released model's size, random weights, {layers} layers of 52:"
        yield ""
        yield from table(["pass", *header], [(p.what, *_columns(p)) for p in passes])
    texts = [
        (mode, rows, f"{rate:.0f}", "" if predicted is None else f"{predicted:.0f}", f"{per_call:.2f}")
        for mode, rows, rate, per_call, predicted in writing(report)
    ]
    if texts:
        yield "The shipped model writes:"
        yield ""
        yield from table(["mode", "rows", "tokens/s", "predicted", "tokens per NFE"], texts)


def _first_calls(report: dict[str, Any]) -> Lines:
    found = result_of(report, "smoke")
    if found is None:
        return
    yield "## First calls"
    yield ""
    yield f"{found['builds']} builds in CUDA C++ compiled in {found['build seconds']:.1f} s."
    yield ""
    yield from table(["failed build"], [[said] for said in found["failed builds"]])
    rows = [
        (
            call["op"],
            call["case"],
            call.get("failed") or f"off by {call['off']:.2g}",
            f"{call['first call seconds']:.1f}",
        )
        if "off" in call
        else (call["op"], call["case"], call.get("failed") or "did not come to its end", "")
        for call in found["calls"]
    ]
    yield from table(["op", "case", "result", "first call, s"], rows)


def _switches(report: dict[str, Any]) -> Lines:
    found = result_of(report, "switches")
    if found is None:
        return
    yield "## What only measurement decides"
    yield ""
    rows = [(row["program"], row["way"], row.get("wrong") or microseconds(row["seconds"])) for row in found["rows"]]
    yield from table(["program", "way", "µs"], rows)


SECTIONS: tuple[Callable[[dict[str, Any]], Lines], ...] = (
    _checks, _machine, _times, _first_calls, _switches, _parts,
)  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """A report, finished or not, in Markdown."""
    about = result_of(report, "machine") or {}
    name = about.get("gpu") or about.get("processor") or report["device"]
    lines = [f"# twotower_kernels {report['twotower_kernels']} on {cell(name)}", ""]
    held = sum(entry["state"] == HELD for entry in report["parts"])
    state = "finished" if report["finished"] else "not finished"
    lines += [f"{report['date']}, {state}: {held} of {len(report['parts'])} parts held.", ""]
    for section in SECTIONS:
        lines += section(report)
    return "\n".join(lines).rstrip() + "\n"
