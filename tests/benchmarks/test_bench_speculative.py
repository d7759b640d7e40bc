"""When speculative decoding pays, predicted and measured, and the baseline that needs no denoiser."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.model.small_model import VOCAB, package_model
from tests.paths import ROOT
from twotower_kernels.bench import speculative
from twotower_kernels.bench.baselines.prompt_lookup import generate_by_lookup, lookup
from twotower_kernels.bench.costs.machines import MACHINES
from twotower_kernels.bench.costs.speculative import Rounds, rounds
from twotower_kernels.bench.sizes.configs import config


def test_the_page_has_the_programs_table(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "speculative.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- python -m bench.speculative -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert table
    speculative.main([])
    assert capsys.readouterr().out == table[1]


def test_a_round_is_a_draft_and_a_verification() -> None:
    found = rounds(config(), MACHINES["h200"])
    assert found.draft + found.verification == pytest.approx(17.4e-3, rel=0.01)
    assert found.ar == pytest.approx(2.0e-3, rel=0.01)
    assert found.break_even() == pytest.approx((found.draft + found.verification) / found.ar)
    assert found.speedup(found.break_even() or 0) == pytest.approx(1)
    plain = Rounds(4, draft=1.0, verification=2.0, ar=1.0)
    assert (plain.break_even(), plain.break_even(2), plain.speedup(4, 2)) == (3.0, 4.0, 1.0)
    assert plain.break_even(3) is None
    few, many = (rounds(config(), MACHINES["h200"], hit=hit) for hit in (30.0, 1e9))
    assert few.verification < found.verification == many.verification and few.ar == found.ar


def test_what_followed_before_is_looked_up() -> None:
    text = [1, 2, 3, 9, 5, 2, 3, 8, 7, 2, 3]
    assert lookup(text, 3) == [8, 7, 2]  # the latest place of the longest end
    assert lookup([1, 2, 3, 9, 1, 2, 3], 9) == [9, 1, 2, 3]
    assert lookup([4, 4], 3) == [4] and lookup([1, 2, 3], 4) == lookup([5], 4) == lookup(text, 0) == []


@settings(max_examples=10)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=3),
    new=st.integers(1, 12),
    size=st.integers(1, 6),
    eos=st.none() | st.integers(0, VOCAB - 1),
)
def test_prompt_lookup_writes_autoregressions_text(
    prompts: list[list[int]], new: int, size: int, eos: int | None
) -> None:
    options = dict(max_new_tokens=new, eos_token_id=eos)
    wanted = package_model().generate(prompts, mode="ar", **options)
    got = generate_by_lookup(package_model(), prompts, block_size=size, **options)  # type: ignore[arg-type]
    for name in ("sequences", "new_tokens"):
        assert all(map(torch.equal, getattr(got, name), getattr(wanted, name)))
    assert got.finish_reason == wanted.finish_reason and got.nfe == got.verifications


def test_a_measurement_compares_the_texts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tt.TwoTowerModel, "from_pretrained", lambda path: package_model())
    monkeypatch.setattr(speculative, "held_out", lambda: torch.arange(400) % VOCAB)
    speculative.main(["--measure", "--new", "5", "--prompts", "2", "--turns", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 9 and all(line.endswith("| 2 of 2 |") for line in lines)
    assert lines[0].startswith("| autoregression | – | 1.00 |")
