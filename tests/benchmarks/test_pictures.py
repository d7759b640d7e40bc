"""The pictures show what was saved, and the sweeps save what is drawn."""

import itertools
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower_kernels.bench import sweeps
from twotower_kernels.bench.costs.costs import Cost
from twotower_kernels.bench.measure import shares
from twotower_kernels.bench.measure.ceilings import Ceilings
from twotower_kernels.bench.measure.timing import ORIGINAL, OURS, Case, measure
from twotower_kernels.bench.pictures import operations as pictures
from twotower_kernels.bench.pictures.drawing import spoken
from twotower_kernels.bench.pictures.text import speed, step_shares, trace
from twotower_kernels.bench.pictures.text import thresholds as thresholds_picture
from twotower_kernels.bench.report import tables

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "instruction set": "avx2",
    "torch": "2.8.0",
    "twotower_kernels": "0.1",
    "gpu": None,
    "commit": "0123abc",
    "date": "2026-01-02",
}
CEILINGS = {"read": 10.0, "copy": 10.0, "fp32": 100.0, "bf16": 50.0}


def result(op: str, seconds: dict[str, float], bytes: int = 0, flops: int = 0, **more: Any) -> dict[str, Any]:
    timings = {name: {"median": t, "low": t, "high": t, "calls": 3} for name, t in seconds.items()}
    return {"op": op, "dtype": "bfloat16", "bytes": bytes, "flops": flops, "seconds": timings, **more}


def saved(*results: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {"machine": MACHINE, "ceilings": CEILINGS, "results": list(results), **parts}


def drawn(axis: Any, label: str) -> list[tuple[float, float]]:
    """The points of the lines with this label."""
    lines = [line for line in axis.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for line in lines for x, y in line.get_xydata()]


def near(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> bool:
    return len(found) == len(expected) and all(f == pytest.approx(e) for f, e in zip(found, expected, strict=True))


# --- pictures -------------------------------------------------------------------------------------------------------


def test_roofline_shows_rates_under_the_measured_roof(tmp_path: Path) -> None:
    run = saved(
        result("a", {OURS: 1e-3, ORIGINAL: 8e-3, "PyTorch: one": 4e-3, "PyTorch: two": 2e-3}, 10**6, 2 * 10**6),
        result("a", {OURS: 1e-3}, 10**6, 50 * 10**6),
        result("no FLOPs", {OURS: 1e-3}, 10**6),
        result("no bytes", {OURS: 1e-3}, flops=10**6),
        result("no ceiling", {OURS: 1e-3}, 10**6, 10**6) | {"dtype": "float64"},
    )
    figure = pictures.roofline(run, tmp_path / "roofline.png")
    (axis,) = figure.axes
    assert near(drawn(axis, "a"), [(2, 2), (50, 50)])
    assert near(drawn(axis, "best baseline"), [(2, 1)]), "the fastest of the baselines"
    roof = dict(zip(*axis.get_lines()[0].get_data(), strict=True))
    assert roof[10.0] == 100 and roof[max(roof)] == 100 and roof[1.0] == 10, "float32's peak, at ten bytes a second"
    footer = figure.get_supxlabel()
    assert "a processor" in footer and "2026-01-02" in footer and "0123abc" in footer
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_roofline_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a case with bytes"):
        pictures.roofline(saved(result("a", {OURS: 1.0})), tmp_path / "roofline.png")


def test_a_point_has_the_peak_of_its_dtype() -> None:
    assert pictures.peak(CEILINGS, "float32") == 100
    assert pictures.peak(CEILINGS | {"bf16": 300.0}, "bfloat16") == 300
    assert pictures.peak(CEILINGS, "float64") is None


def test_time_over_a_size_has_a_panel_per_operation_and_a_line_per_program(tmp_path: Path) -> None:
    def at(op: str, context: int, **seconds: float) -> dict[str, Any]:
        names = {"ours": OURS, "original": ORIGINAL, "torch": "PyTorch: it", "other": "PyTorch: other"}
        timed = {names[name]: t for name, t in seconds.items()}
        return result(op, timed, sizes={"batch": 1, "context": context}, sweep="context")

    run = saved(
        at("attention", 2048, ours=2e-3, original=9e-3, torch=5e-3, other=4e-3),
        at("attention", 1024, ours=1e-3, torch=3e-3, other=4e-3),
        at("step", 1024, ours=0.5),
        result("step", {OURS: 1.0}, sizes={"batch": 4}, sweep="batch"),
    )
    figure = pictures.over(run, "context", tmp_path / "over.png")
    first, second = figure.axes
    assert near(drawn(first, OURS), [(1024, 1), (2048, 2)])
    assert near(drawn(first, "best PyTorch"), [(1024, 3), (2048, 4)])
    assert near(drawn(first, ORIGINAL), [(2048, 9)]), "left out where it was too slow"
    assert near(drawn(second, OURS), [(1024, 500)])
    assert "batch 1" in first.get_title() and [t.get_text() for t in first.get_xticklabels()] == ["1k", "2k"]
    looks = {(line.get_marker(), line.get_linestyle()) for line in first.get_lines()}
    assert len(looks) == 3, "told apart without colours"
    with pytest.raises(ValueError, match="vocabulary"):
        pictures.over(run, "vocabulary", tmp_path / "none.png")


def test_the_bars_of_a_step_sum_to_one(tmp_path: Path) -> None:
    parts = {name: 1e-3 * (i + 1) for i, name in enumerate((*shares.OPERATIONS, shares.OTHER))}
    steps = [{"batch": 1, "context": n, "whole": 0.05, "parts": parts} for n in (8, 16)]
    figure = step_shares(saved(shares=steps), tmp_path / "shares.png")
    (axis,) = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert [sum(bars) for bars in zip(*heights, strict=True)] == pytest.approx([1, 1])
    linear = next(bars for bars in axis.containers if bars.get_label() == "linear")
    assert linear[0].get_height() == pytest.approx(parts["linear"] / sum(parts.values()))
    assert [text.get_text() for text in axis.texts] == ["50 ms", "50 ms"]


def test_the_speed_of_diffusion_stands_beside_the_other_modes(tmp_path: Path) -> None:
    rows = [
        {"mode": mode, "batch": batch, "context": context, "tokens per second": 1000.0 * batch / context}
        for batch, context in itertools.product((1, 4), (100, 50))
        for mode in ("mask_diffusion", "mock_ar", "ar")
    ]
    for row in rows[::3]:
        row["tokens per second at"] = {str(n): n * row["tokens per second"] for n in (1, 2, 4)}  # as JSON spells keys
    first, second = speed(saved(random=rows), tmp_path / "speed.png").axes
    assert near(drawn(first, "ar"), [(50, 20), (100, 10)])
    assert near(drawn(second, "mask_diffusion, 4 per NFE"), [(50, 320), (100, 160)])
    assert second.get_title() == "batch 4"


def test_the_trace_shows_each_token_at_its_call(tmp_path: Path) -> None:
    found = {"threshold": 0.5, "block": 2, "calls": 3, "token": [5, 6, 7, 8], "call": [2, 1, 3, 3]}
    run = saved(thresholds={"trace": {**found, "text": ["a", "\n", " $", "b"]}})
    (axis,) = trace(run, tmp_path / "trace.png").axes
    assert near(drawn(axis, "committed"), [(0, 2), (1, 1), (2, 3), (3, 3)])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a", "⏎", r"␣\$", "b"]


def test_the_threshold_picture_shows_the_sweep_beside_ar(tmp_path: Path) -> None:
    names = ("tokens per NFE", "tokens per second", "nats per token")

    def row(mode: str, threshold: float | None, *figures: float) -> dict[str, Any]:
        return {"mode": mode, "threshold": threshold, **dict(zip(names, figures, strict=True))}

    sweep = [row("ar", None, 1, 9, 0.5), row("mask_diffusion", 0.5, 2, 20, 3), row("mask_diffusion", 0.9, 1, 10, 2)]
    figure = thresholds_picture(saved(thresholds={"sweep": sweep}), tmp_path / "thresholds.png")
    for axis, name in zip(figure.axes, names, strict=True):
        assert near(drawn(axis, "mask_diffusion"), [(0.5, sweep[1][name]), (0.9, sweep[2][name])])
        assert drawn(axis, "ar")[0][1] == sweep[0][name]


def slow() -> torch.Tensor:
    time.sleep(0.02)
    return torch.ones(1)


def test_a_slow_baseline_is_left_out_of_its_point_and_named() -> None:
    programs = {OURS: slow, ORIGINAL: slow, "PyTorch: it": lambda: torch.ones(1)}
    case = Case("op", "a shape", torch.float32, programs, lambda ours, theirs: None, Cost(0, 0))
    kept, left_out = sweeps.affordable(case, limit=0.01)
    assert set(kept.programs) == {OURS, "PyTorch: it"}, "ours stays, however slow"
    assert [skipped.program for skipped in left_out] == [ORIGINAL]
    assert re.fullmatch(r"a call takes [\d.]+ s", left_out[0].reason)


def test_a_sweep_is_saved_with_its_sizes_and_can_be_drawn(tmp_path: Path) -> None:
    limits, entries = Ceilings(10, 10, 50, 100, 100, 100, 1e-5), []
    for case in itertools.islice(sweeps.over_context("cpu"), 2):
        ours = replace(case, programs={OURS: case.programs[OURS]})
        entries.append({"sweep": "context", **tables.entry(measure(ours, seconds=0), limits)})
    assert [entry["sizes"]["context"] for entry in entries] == [256, 1024]
    (axis,) = pictures.over(saved(*entries), "context", tmp_path / "over.png").axes
    medians = [entry["seconds"][OURS]["median"] * 1e3 for entry in entries]
    assert near(drawn(axis, OURS), list(zip([256, 1024], medians, strict=True)))


def test_sizes_are_spoken() -> None:
    assert [spoken(n) for n in (1, 64, 1000, 1024, 131072)] == ["1", "64", "1000", "1k", "128k"]
