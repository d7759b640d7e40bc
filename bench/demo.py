"""The demo, recorded: what each mode had written at what time. `python -m bench.demo --save bench/results/cpu`.

The prompt of `twotower demo`, continued by the shipped model in each mode several times, in turns; of each mode the
fastest is kept. `bench.pictures` draws it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import twotower_kernels as tt
from twotower_kernels.bench.report import tables

PROMPT = """class TinyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
""".rstrip()
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": dict(mode="ar"),
    "speculative": dict(mode="speculative"),
    "block diffusion": dict(mode="mask_diffusion"),
}


def frames(model: tt.TwoTowerModel, words: Tokenizer, ids: list[list[int]], **options: Any) -> dict[str, Any]:
    """One generation, as it was written.

    Returns:
        "frames": what each event left, by the seconds that the model had worked until then: "kept" (new text that
        stands), "open" (behind it: a draft, or a block with masks as ░). "tokens", "calls" (NFE), "accepted" (tokens
        per verified draft, or None), "seconds".
    """
    mask = model.config.mask_token_id
    events = model.stream(ids, **options)
    kept: list[int] = []
    found, seconds = [], 0.0
    while True:
        start = time.perf_counter()
        event = next(events, None)
        seconds += time.perf_counter() - start
        if event is None:
            break
        block, shown = event.after[0].tolist(), ""
        if event.committed:
            kept += block if event.accepted is None else block[: int(event.accepted[0])]
        else:
            parts = ["░" if token == mask else token for token in block]
            shown = _decoded(words, parts)
        found.append({"seconds": seconds, "kept": words.decode(kept[: options["max_new_tokens"]]), "open": shown})
    result = events.result()
    return {
        "frames": found,
        "tokens": len(result.new_tokens[0]),
        "calls": sum(result.nfe),
        "accepted": result.accepted,
        "seconds": result.seconds,
        "text": words.decode(result.new_tokens[0].tolist()),
    }


def _decoded(words: Tokenizer, parts: list[int | str]) -> str:
    """Tokens as text, masks as they are; tokens between masks together, because a character may span several."""
    text, run = "", list[int]()
    for part in [*parts, ""]:
        if isinstance(part, int):
            run.append(part)
        else:
            text, run = text + words.decode(run) + part, []
    return text


def record(
    model: tt.TwoTowerModel, words: Tokenizer, prompt: str = PROMPT, new: int = 64, times: int = 7
) -> dict[str, Any]:
    """Every mode's fastest of several generations."""
    ids = [[model.config.bos_token_id, *words.encode(prompt).ids]]
    fastest: dict[str, dict[str, Any]] = {}
    for _ in range(times + 1):  # the first is a warm-up, and never the fastest
        for name, mode in MODES.items():
            run = frames(model, words, ids, max_new_tokens=new, **mode)
            if name not in fastest or run["seconds"] < fastest[name]["seconds"]:
                fastest[name] = run
    return {"prompt": prompt, "modes": fastest}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description="The demo, recorded.")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/demo.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = tt.demo_path()
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    run = {"machine": tables.machine("cpu"), **record(tt.TwoTowerModel.from_pretrained(folder), words)}
    for name, found in run["modes"].items():
        print(f"--- {name}: {found['tokens']} tokens, {found['calls']} calls, {found['seconds']:.3f} s")
        print(run["prompt"] + found["text"])
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=1, ensure_ascii=False) + "\n"
        (options.save / "demo.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
