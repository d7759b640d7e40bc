"""`python -m bench.transformers_models` on layers small enough for tests: compared, then timed, then told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import transformers_models as bench

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL = {
    "diffusion_gemma": {
        **HEADS,
        "intermediate_size": 48,
        "sliding_window": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "canvas_length": 32,
    },
    "nemotron_h": {
        **HEADS,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {**HEADS, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PAGE = f"# Page\n\n{bench.MARKERS[0]}\nof before\n{bench.MARKERS[1]}\n\nbehind\n"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SIZES", {name: {**bench.SIZES[name], **sizes} for name, sizes in SMALL.items()})
    monkeypatch.setattr(bench, "CONTEXT", 40)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    bench.PAGE.write_text(PAGE)


def test_all_programs_agree_and_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--seconds", "0", "--save", str(tmp_path), "--write"]) == 0
    rows = json.loads((tmp_path / "transformers_models.json").read_text())["rows"]
    counts = {(row["model"], row["dtype"]): 0 for row in rows}
    for row in rows:
        counts[row["model"], row["dtype"]] += 1
        programs = [name for name in bench.PROGRAMS if name != bench.IN_PLACE or row["model"] != "nemotron_h"]
        assert row["difference"] == "" and list(row["seconds"]) == programs
    assert list(counts.values()) == [2, 2, 3, 3, 1, 1]
    assert capsys.readouterr().out.count(": equal\n") == len(rows)
    page = bench.PAGE.read_text()
    assert page.count("\n| ") == len(rows) + 2 and "of before" not in page and page.endswith("\n\nbehind\n")


def test_what_differs_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a context that only one program has."""
    filled = bench._filled

    def other(config: object, kind: str, context: int, dtype: torch.dtype) -> object:
        cache = filled(config, kind, context, dtype)
        if kind == bench.IN_PLACE:
            cache.layers[0].values.mul_(1.5)
        return cache

    monkeypatch.setattr(bench, "_filled", other)
    for row in bench.measured("qwen3_moe", 0.0, context=40):
        assert row["difference"].startswith(f"{bench.IN_PLACE} errs by ") and "seconds" not in row
    assert bench.main(["--model", "qwen3_moe", "--seconds", "0", "--write"]) == 1
    assert bench.PAGE.read_text() == PAGE
