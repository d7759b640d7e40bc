"""The scores of generated text, where they are taken, and what the tables say."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import twotower_kernels as tt
from twotower_kernels.bench.quality import __main__ as quality
from twotower_kernels.bench.quality import scores
from twotower_kernels.bench.quality.positions import LEFT, duplicates, positions, trained_lines
from twotower_kernels.bench.report.quality import markdown
from twotower_kernels.reference import demo_data
from twotower_kernels.reference.demo_data import Corpus

LINES = [f"    self.layer_{i} = nn.Linear({i}, {i + 1}, bias=False)" for i in range(30)]
FILE = "class Words:\n\n" + "\n".join(LINES) + "\n" + "\n" * 40
KNOWN = "\n".join(LINES[:10])
CORPUS = Corpus(
    {("transformers", "a.py"): KNOWN, ("stdlib", "b.py"): "import sys\n"},
    {("transformers", "c.py"): FILE, ("stdlib", "d.py"): FILE.replace("layer", "größe")},
    "0",
    {},
)


@cache
def words() -> Tokenizer:
    return Tokenizer.from_file(str(tt.demo_path() / "tokenizer.json"))


def table_of_distances(a: str, b: str) -> int:
    """Levenshtein's, as it is defined."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=200)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distances_are_levenshteins(a: str, b: str) -> None:
    assert scores.edit_distance(a, b) == table_of_distances(a, b)
    assert 0 <= scores.edit_similarity(a, b) <= 1 and scores.edit_similarity(a, a) == 1


def test_a_line_is_the_files_only_if_it_is_finished() -> None:
    assert scores.same_line("x = 1\ny", "x = 1\nz = 2\n")
    assert not scores.same_line("x = 1", "x = 1\n") and not scores.same_line("x = 12\n", "x = 1\n")
    assert scores.matching_prefix("abcd", "abx") == 2
    assert scores.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5 and scores.agreement([1], [1]) == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 8))
def test_lookups_need_no_more_calls_than_tokens(text: list[int], prompt: int, draft: int) -> None:
    calls = scores.lookups([0, 1, 2, 0][:prompt], text, draft)
    assert -(-len(text) // draft) <= calls <= len(text)


def test_a_repetition_is_looked_up() -> None:
    """After 1 2 came 3 4 5 6: with the known 3 a draft of four holds all that follows but one."""
    assert scores.lookups([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6, 1], 4) == 2
    assert scores.lookups([1, 2, 3, 4, 5, 6, 1, 2], [3, 9, 9, 9], 4) == 3, "what did not follow before costs calls"


def test_places_lie_in_lines_and_their_texts_join() -> None:
    known = trained_lines(CORPUS)
    found = positions(CORPUS, known, words(), 20, context=64, new=32)
    assert [place.source for place in found] == ["transformers"] * 20 + ["stdlib"] * 20
    files = {"transformers": FILE, "stdlib": FILE.replace("layer", "größe")}
    for place in found:
        before = words().decode(place.prompt).lstrip("\N{REPLACEMENT CHARACTER}")  # where it begins inside a character
        text = files[place.source]
        at = text.index(before + place.true) + len(before)
        line = text[text.rfind("\n", 0, at) + 1 : text.index("\n", at)]
        assert place.duplicated == (line in LINES[:10] and place.source == "transformers")
        assert "\n" in place.true and text.index("\n", at) - at >= LEFT and len(place.prompt) <= 64
        assert len(text[: at + 1].rpartition("\n")[2].strip()) >= 1, "not in the indentation"
    assert found == positions(CORPUS, known, words(), 20, context=64, new=32), "the same every time"
    assert vars(duplicates(CORPUS, known)["transformers"]) == {"lines": 30, "duplicated": 10}


def test_speculative_is_autoregression_and_the_tables_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "corpus", lambda: CORPUS)
    monkeypatch.setattr(quality, "NEW", 12)
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    found = json.loads(json.dumps(quality.measure(model, words(), 2, context=48)))
    for group in found["groups"]:
        alone = group["runs"]["AR, greedy"]
        assert alone["tokens per call"] == 1 and alone["agreement with AR"] == 1
        for name, run in group["runs"].items():
            if name.startswith(("speculative", "prompt lookup")):
                same = ("line exact match", "matching prefix", "edit similarity", "nats per token", "distinct 4-grams")
                assert {key: run[key] for key in same} == {key: alone[key] for key in same}
                assert run["agreement with AR"] == 1 and run["tokens per draft"] >= 1
    text = markdown(found)
    assert text.count("| speculative, 16 tokens, 1 call |") >= 2
    assert "Of their 30 lines of 20 characters and more 33% also stand in training files" in text


def test_nats_are_the_towers_own() -> None:
    """Of greedy text they are what the tower said of its tokens while it wrote them."""
    from twotower_kernels.bench.quality.runs import likelihoods

    model = tt.TwoTowerModel.from_pretrained(tt.demo_path(), dtype=torch.float32)
    prompts = torch.arange(100, 140).view(2, 20)
    result = model.generate(prompts, mode="ar", max_new_tokens=12, logprobs=True)
    found = likelihoods(model, model.prefill(prompts), torch.stack(result.new_tokens))
    assert result.logprobs is not None
    assert found == pytest.approx([-float(row.mean()) for row in result.logprobs], rel=1e-3)
