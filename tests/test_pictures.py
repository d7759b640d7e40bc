"""The pictures and the measurements they are drawn from: what is drawn is what was saved, and what is saved adds up."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import twotower_kernels as tt
from bench import generation, pictures, shares, thresholds
from bench.generation_report import markdown
from bench.pictures_of_text import step_shares, trace
from bench.pictures_of_text import thresholds as thresholds_picture
from bench.timing import ORIGINAL, OURS

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
CONFIG = tt.TwoTowerConfig(
    vocab_size=64,
    hidden_size=32,
    hybrid_override_pattern="M*E",
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=1,
    conv_kernel=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)


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
    assert near(drawn(axis, "best rival"), [(2, 1)]), "the fastest of the rivals"
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


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tt.TwoTowerModel:
    return tt.TwoTowerModel.from_pretrained(tt.demo_path())


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion"])
def test_a_generation_is_counted_as_its_events_say(shipped: tt.TwoTowerModel, mode: str) -> None:
    blocks, size = (3, 16) if mode == "mask_diffusion" else (5, 1)
    row, events = generation.generated(
        shipped, torch.arange(4, 24).view(2, 10), mode=mode, max_new_tokens=blocks * size
    )
    ends = [event for event in events if event.committed]
    assert len(ends) == blocks and all(event.after.shape == (2, size) for event in ends)
    assert row["tokens per second"] == pytest.approx(2 * size / row["block seconds"])
    calls = int((ends[-1].nfe - ends[0].nfe).sum())
    assert row["tokens per NFE"] == pytest.approx((blocks - 1) * size * 2 / calls)
    assert row["prefill seconds"] > 0 and (row["step seconds"] is None) == (mode != "mask_diffusion")
    assert row["bytes"] is None or row["bytes"] > 10 * 2**20
    assert "prefill" not in vars(shipped), "the model is as it was"


def test_one_block_says_nothing(shipped: tt.TwoTowerModel) -> None:
    with pytest.raises(ValueError, match="expected two blocks at least, got 1"):
        generation.generated(shipped, torch.tensor([[5, 6]]), max_new_tokens=16)


def test_the_random_model_commits_four_tokens_a_call_whatever_its_context() -> None:
    rows = list(generation.random((40, 70), CONFIG, blocks=2))
    assert {(row["mode"], row["batch"], row["context"]) for row in rows} == {
        (mode, batch, context) for mode in generation.MODES for batch in (1, 4, 16) for context in (40, 70)
    }
    for row in rows:
        diffusion = row["mode"] == "mask_diffusion"
        assert row["tokens per NFE"] == (4 if diffusion else 1)
        if diffusion:
            at, step, commit = row["tokens per second at"], row["step seconds"], row["commit seconds"]
            assert at[2] == pytest.approx(row["batch"] * 16 / (8 * step + commit))
    assert "| mask_diffusion | 16 | 70 |" in markdown(saved(random=rows))


def test_a_reusable_state_is_read_alike_after_a_generation() -> None:
    model = tt.TwoTowerModel(CONFIG, dtype=torch.bfloat16)
    state, ids = generation.reusable_state(model, 2, 20, 32), torch.arange(10).view(2, 5)
    before = model.denoise(ids, state, 0.5)
    model.commit(ids, state.replaced())
    assert state.lengths.tolist() == [20, 20] and state.k[1].shape[1] == 52
    assert torch.equal(model.denoise(ids, state, 0.5), before)


def test_the_parts_of_a_step_are_its_time() -> None:
    (step,) = shares.over_context((32,), CONFIG, seconds=0.2)
    assert set(step["parts"]) == {*shares.OPERATIONS, shares.OTHER}
    assert all(seconds > 0 for seconds in step["parts"].values()), "every operation is used and clocked"
    assert "sum of these" in markdown(saved(shares=[step]))


def test_a_trace_is_what_the_events_say(shipped: tt.TwoTowerModel) -> None:
    prompt = torch.arange(100, 120)
    found = thresholds.trace(shipped, prompt, 32, threshold=0.3)
    again = shipped.generate(prompt[None], max_new_tokens=32, confidence_threshold=0.3)
    assert found["token"] == again.new_tokens[0].tolist() and found["calls"] == again.nfe[0]
    first, second = found["call"][:16], found["call"][16:]
    assert min(first) >= 1 and max(first) < min(second) and max(second) == found["calls"]
    assert set(found["call"]) == set(range(1, found["calls"] + 1)), "every call commits something"


def test_a_lower_threshold_commits_more_a_call(shipped: tt.TwoTowerModel) -> None:
    prompts = torch.arange(64 * 2).view(2, 64) + 100
    rows = thresholds.sweep(shipped, shipped, prompts, 32, (0.1, 0.95))
    assert [row["threshold"] for row in rows] == [None, 0.1, 0.95]
    rates = [row["tokens per NFE"] for row in rows]
    assert rates[0] == 1 and rates[1] > rates[2] >= 1
    assert all(row["tokens per second"] > 0 and row["nats per token"] > 0 for row in rows)
    real = {"nats per token": 1.0, "distinct 4-grams": 1.0}
    counts = {"prompts": 2, "prompt tokens": 64, "new tokens": 32}
    assert "mask_diffusion, γ = 0.95" in markdown(saved(thresholds={"sweep": rows, "real text": real, **counts}))


def test_peaks_are_since_the_last_look() -> None:
    if generation.peak() is None:
        pytest.skip("this system does not say how much memory was resident")
    kept = torch.ones(2**24)  # 64 MB
    much = generation.peak()
    del kept
    generation.peak()
    less = generation.peak()
    assert much is not None and less is not None and much - less > 48 * 2**20


def test_sizes_are_spoken() -> None:
    assert [pictures.spoken(n) for n in (1, 64, 1000, 1024, 131072)] == ["1", "64", "1000", "1k", "128k"]
    assert all(a < b for a, b in pairwise(thresholds.THRESHOLDS))
