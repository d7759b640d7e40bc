"""The demo's recording is what the model wrote, and its picture shows it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import Tokenizer

import twotower_kernels as tt
from tests.benchmarks.test_pictures import saved
from twotower_kernels.bench import demo, speculation
from twotower_kernels.bench.cases.model import random_model
from twotower_kernels.bench.generation import reusable_state
from twotower_kernels.bench.pictures.demo import COLUMNS, Cursor, spread
from twotower_kernels.bench.pictures.demo import demo as picture
from twotower_kernels.bench.report.generation import markdown
from twotower_kernels.cli.command import PROMPT

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_ends_with_what_was_written(tmp_path: Path) -> None:
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    words = Tokenizer.from_file(str(tt.demo_path() / "tokenizer.json"))
    run = json.loads(json.dumps(saved(**demo.record(model, words, new=24, times=1))))
    assert run["prompt"] == PROMPT, "the prompt of the program's demo"
    prompt = [[model.config.bos_token_id, *words.encode(PROMPT).ids]]
    for name, found in run["modes"].items():
        options = demo.MODES[name]
        wanted = model.generate(prompt, max_new_tokens=24, **options)
        times = [frame["seconds"] for frame in found["frames"]]
        assert found["text"] == found["frames"][-1]["kept"] == words.decode(wanted.new_tokens[0].tolist())
        assert found["calls"] == sum(wanted.nfe) and found["tokens"] == 24 and times == sorted(times)
        assert any(frame["open"] for frame in found["frames"]) == (name != "autoregressive")
    assert run["modes"]["speculative"]["text"] == run["modes"]["autoregressive"]["text"]
    root = ElementTree.fromstring(picture(run, tmp_path / "demo.svg"))
    still = [text for text in root.iter(f"{SVG}text") if text.get("visibility") != "hidden"]
    lines: dict[int, dict[float, str]] = {}
    for text in still:
        lines.setdefault(int(text.get("y", "")), {})[float(text.get("x", ""))] = text.text or ""
    shown = ["".join(part for _, part in sorted(line.items())) for _, line in sorted(lines.items())]
    for found in run["modes"].values():
        for line in found["text"].split("\n"):
            assert "".join(line.split()) in "".join("".join(shown).split())
    assert any(line.startswith("speculative ") and line.endswith("yes") for line in shown)
    drafts = [text for text in root.iter(f"{SVG}text") if text.get("visibility") == "hidden"]
    assert drafts and all(text.find(f"{SVG}set") is not None for text in drafts)


def test_a_long_line_goes_on_in_the_next() -> None:
    pieces, end = spread("ab\n" + "x" * (COLUMNS + 3), Cursor(2, 5))
    assert pieces == [(Cursor(2, 5), "ab"), (Cursor(3), "x" * COLUMNS), (Cursor(4), "xxx")]
    assert end == Cursor(4, 3)


def test_drafts_write_autoregressions_text_and_their_worth_is_arithmetic() -> None:
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    found = speculation.of_shipped(model, [list(range(100, 130))], drafts=(4,), new=16, times=1)
    alone, drafts = found
    assert (alone["draft"], alone["accepted"]) == (0, None) and drafts["identical"] == 1
    assert 1 <= drafts["accepted"] <= 4
    assert drafts["tokens per second"] * drafts["seconds"] == pytest.approx(16)
    c = tt.TwoTowerConfig.from_dict(json.loads((tt.demo_path() / "config.json").read_text(encoding="utf-8")))
    small = random_model(torch.bfloat16, "both", c)
    (row,) = speculation.of_random(small, reusable_state(small, 1, 40, 64).replaced, {4: 2.5})
    assert row["times"] == pytest.approx(2.5 * row["token seconds"] / row["round seconds"]) and row["times"] > 0
    run = {"prompts": 1, "new tokens": 16, "shipped": found, "random": [{"context": 40, **row}]}
    text = markdown(saved(speculative=run))
    assert "| 4 |" in text and "| 100% |" in text and "| 40 | 4 |" in text
