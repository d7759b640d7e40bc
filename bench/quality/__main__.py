"""How good the shipped model's text is: `python -m bench.quality`; `--card` writes it into the model's card.

From 500 places of each source's held-out files, inside lines, the model goes on by 32 tokens in every mode; what it
writes is compared with how the file goes on, and with what greedy autoregression writes.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from tokenizers import Tokenizer

import twotower_kernels as tt
from twotower_kernels.bench.quality.positions import LONG, duplicates, positions, trained_lines
from twotower_kernels.bench.quality.runs import figures, write
from twotower_kernels.bench.report.quality import markdown
from twotower_kernels.reference import demo_data, demo_report
from twotower_kernels.reference.demo_data import SOURCES

CONTEXT, NEW = 512, 32  # tokens


def measure(model: tt.TwoTowerModel, words: Tokenizer, count: int, context: int = CONTEXT) -> dict[str, Any]:
    """The scores of every run, per source and kind of line, from `count` places of each source."""
    corpus = demo_data.corpus()
    known = trained_lines(corpus)
    places = positions(corpus, known, words, count, context=context, new=NEW)
    found = write(model, [place.prompt for place in places], NEW)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, place in enumerate(places):
        for lines in ("all", "duplicated" if place.duplicated else "novel"):
            groups.setdefault((place.source, lines), []).append(i)
    return {
        "context": context,
        "new tokens": NEW,
        "long": LONG,
        "duplicates": {name: vars(of) for name, of in duplicates(corpus, known).items()},
        "groups": [
            {"source": source, "lines": lines, "positions": len(chosen), "runs": figures(found, places, words, chosen)}
            for (source, lines), chosen in sorted(groups.items(), key=lambda group: SOURCES.index(group[0][0]))
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="The shipped model's text, scored.")
    parser.add_argument("--positions", type=int, default=500, help="places per source (default: 500)")
    parser.add_argument("--threads", type=int, help="processor threads (default: PyTorch's choice)")
    parser.add_argument("--card", action="store_true", help="write the figures into the shipped model's card")
    options = parser.parse_args()
    if options.positions < 1:
        parser.error(f"--positions: expected 1 or more, got {options.positions}")
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = tt.demo_path()
    start = time.perf_counter()
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = measure(tt.TwoTowerModel.from_pretrained(folder), words, options.positions)
    print(markdown(found))
    print(f"{time.perf_counter() - start:.0f} s")
    if options.card:
        (folder / "quality.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        demo_report.write_card(folder, markdown(found))


if __name__ == "__main__":
    main()
