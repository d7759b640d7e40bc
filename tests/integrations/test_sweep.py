"""The sweep over transformers' models tells what agrees from what is refused, what is not reached and what is wrong."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests import transformers_sweep as sweep
from twotower_kernels.integrations.transformers import BlockCache


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


def test_other_caches_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that agrees, one that views its keys, and one whose cache is wrong; written between the markers."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sweep.MARKERS[0]}\nold\n{sweep.MARKERS[1]}\nbehind\n")
    monkeypatch.setattr(sweep, "PAGE", page)
    assert sweep.main(["qwen3", "bloom", "blt", "--write"]) == 0
    assert "pages refused: twotower BlockCache: pages and rows of different lengths" in capsys.readouterr().out
    written = page.read_text()
    assert "old" not in written and written.endswith("behind\n")
    assert "| agrees | attention | 1 | qwen3 |" in written and "| static | 2 of 2 | | | |" in written
    assert "| pages | 1 of 2 | | | |" in written and "| 1 | bloom |" in written and "| not run | its conf" in written

    def doubled(model: PreTrainedModel) -> dict[str, object]:
        cache = BlockCache(model.config, 2, 128)
        layer, peek = cache.layers[0], cache.layers[0].peek
        layer.peek = lambda k, v: peek(2 * k, v)
        return {"past_key_values": cache}

    monkeypatch.setitem(sweep.CACHES, "BlockCache", (doubled, sweep.DYNAMIC))
    assert sweep.main(["qwen3"]) == 1
    assert "; BlockCache wrong: " in capsys.readouterr().out


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
