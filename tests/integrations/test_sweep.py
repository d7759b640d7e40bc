"""The sweep over transformers' models tells what agrees from what is refused, what is not reached and what is wrong."""

import pytest
import torch

from tests import transformers_sweep as sweep


def test_its_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["llama", "recurrent_gemma", "doge", "bloom"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, kind, verdict in zip(
        lines,
        ("llama", "recurrent_gemma", "doge", "bloom"),
        ("agrees       attention", "agrees       attention; as sdpa, not as eager", "refused", "not reached"),
        strict=False,
    ):
        assert line.startswith(f"{kind:32} {verdict}"), line
    assert lines[-1] == "2 agrees, 1 refused, 1 not reached"


def test_it_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_padding(*arguments: object, **options: object) -> object:
        return sweep_mask(*arguments, **{**options, "attention_mask": None})

    sweep_mask = sweep.mask
    monkeypatch.setattr(sweep, "mask", without_padding)
    assert sweep.main(["llama"]) == 1
    assert "llama                            wrong        logits off by" in capsys.readouterr().out


def test_difference() -> None:
    same = torch.zeros(2, 3), torch.zeros(2, 4)
    assert sweep.difference(same, same) == ""
    assert sweep.difference((same[0] + torch.nan, same[1]), same) == "logits off by nan, 0 other tokens"
    assert sweep.difference(same, (same[0], same[1] + 1)) == "logits off by 0.0e+00, 8 other tokens"
