"""`python -m bench.drop_in` on models small enough for tests: everything is compared, then timed, then told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import drop_in
from bench.baselines import diffusion_lms
from tests.examples.random_systems import CONFIGS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "CONFIGS", CONFIGS)


@pytest.mark.parametrize("system", drop_in.LINES)
def test_both_programs_agree_and_are_timed(system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drop_in.main(["--system", system, "--seconds", "0", "--save", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "drop_in.json").read_text())["rows"]
    assert len(rows) >= 4 and {row["system"] for row in rows} == {system}
    for row in rows:
        assert row["difference"] == ""
        assert all(row["seconds"][program]["median"] > 0 for program in (drop_in.ORIGINAL, drop_in.OURS))
    said = capsys.readouterr().out
    assert said.count(": equal\n") == len(rows) and "times as fast" in said


def test_what_differs_is_told_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion_lms.Sdar, "unmask", lambda self, logits, block, *_: block.zero_())
    rows = list(drop_in.measured("sdar", 0.0))
    wrong = [row for row in rows if row["difference"]]
    assert [row["part"].split(",")[0] for row in wrong] == ["sampler", "generation"]
    assert all("tokens differ" in row["difference"] and "seconds" not in row for row in wrong)
    assert drop_in.main(["--system", "sdar", "--seconds", "0"]) == 1
    assert "tokens differ" in capsys.readouterr().out


def test_logits_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = diffusion_lms.attend
    monkeypatch.setattr(diffusion_lms, "attend", lambda *arguments: attend(*arguments) * 1.01)
    rows = list(drop_in.measured("dream", 0.0))
    assert rows[0]["part"].startswith("forward") and "relative error" in rows[0]["difference"]
    assert torch.is_inference_mode_enabled() is False
