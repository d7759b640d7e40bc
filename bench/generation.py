"""Text end to end: `python -m bench.generation --save bench/results/cpu`.

Five parts, each of which can be asked for alone (`--part`):

* `shipped`: the shipped model in its modes, over batches and contexts: seconds of prefill, tokens per second
  after the first block, tokens per model call (NFE), memory.
* `random`: the same of the mid-size random model of `bench.cases.model`, from a state of random contents: a prefill of
  16 × 32768 tokens takes minutes on a CPU, and what a context says does not change what it costs. Its steps and
  commits are measured while it generates; tokens per second at 1, 2 and 4 tokens per NFE follow from them.
* `speculative`: what drafts are worth, of which length, beside autoregression (`bench.speculation`).
* `shares`: where the time of a denoiser step goes (`bench.measure.shares`).
* `thresholds`: what the un-masking threshold buys and costs, and the trace of one text (`bench.thresholds`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench import speculation, thresholds
from twotower_kernels.bench.cases.model import BLOCK, CONFIG, random_model, random_state
from twotower_kernels.bench.measure import shares
from twotower_kernels.bench.measure.watched import generated
from twotower_kernels.bench.report import tables
from twotower_kernels.bench.report.generation import markdown
from twotower_kernels.bench.report.tables import about
from twotower_kernels.bench.thresholds import held_out
from twotower_kernels.reference.demo_data import windows

MODES = ("mask_diffusion", "mock_ar", "ar")  # `speculative` has a part of its own
PARTS = ("shipped", "random", "speculative", "shares", "thresholds")
BATCHES = (1, 4, 16)
MOST = 65536  # prompt tokens of the whole batch: beyond, the prefills alone take minutes


def of_shipped(mode: str, batch: int, context: int, new: int) -> dict[str, Any]:
    """One generation of the shipped model, on texts that it was not trained on."""
    model, text = tt.TwoTowerModel.from_pretrained(tt.demo_path()), held_out()
    model.generate(text[None, :64], mode=mode, max_new_tokens=BLOCK)  # the first calls find out about the processor
    prompts = windows(text, context, batch, torch.Generator().manual_seed(context))
    row, _ = generated(model, prompts, mode=mode, max_new_tokens=new)
    return {"mode": mode, "batch": batch, "context": context, **row}


def shipped(contexts: tuple[int, ...] = (1024, 4096, 16384, 32768), new: int = 128) -> Iterator[dict[str, Any]]:
    """The shipped model over batches and contexts. Every row has a process of its own: memory that one has freed, an
    allocator may keep, and it would count for the next."""
    fresh = multiprocessing.get_context("forkserver")
    slow = (f"twotower_kernels.bench.{name}" for name in ("measure.watched", "thresholds", "tables.generation"))
    fresh.set_forkserver_preload(list(slow))  # imported once
    for batch in BATCHES:
        for context in (context for context in contexts if batch * context <= MOST):
            for mode in MODES:
                with ProcessPoolExecutor(1, fresh) as process:
                    row = process.submit(of_shipped, mode, batch, context, new).result()
                yield row


def reusable_state(model: tt.TwoTowerModel, batch: int, context: int, room: int) -> tt.ContextState:
    """A random context whose storage has room, so that no generation of up to `room` tokens moves it."""
    state = random_state(model, batch, context + room)
    return state.replaced(lengths=state.lengths - room, longest=context)


def random(
    contexts: tuple[int, ...] = (1024, 8192, 32768), config: tt.TwoTowerConfig = CONFIG, blocks: int = 3
) -> Iterator[dict[str, Any]]:
    """The mid-size model of random weights. No confidence of it passes a threshold, so that four steps a block commit
    four tokens each."""
    torch.manual_seed(0)
    model = random_model(torch.bfloat16, "both", config)
    for batch in BATCHES:
        prompts = torch.randint(4, config.vocab_size, (batch, 2))
        for context in contexts:
            state = reusable_state(model, batch, context, blocks * BLOCK)

            def ready(*_: Tensor, state: tt.ContextState = state) -> tt.ContextState:
                return state.replaced()  # what one generation appends behind the context, the next one overwrites

            for mode in MODES:
                in_blocks = dict(max_new_tokens=blocks * BLOCK, steps_per_block=4)
                options = in_blocks if mode == "mask_diffusion" else dict(max_new_tokens=9)
                row, _ = generated(model, prompts, ready, mode=mode, **options)
                del row["prefill seconds"], row["prefill bytes"]
                if row["step seconds"] is not None:
                    step, commit = row["step seconds"], row["commit seconds"]
                    row["tokens per second at"] = {
                        str(n): batch * BLOCK / (BLOCK / n * step + commit) for n in (1, 2, 4)
                    }
                yield {"mode": mode, "batch": batch, "context": context, **row}
            del state, ready


def speculative(prompts: int = 8, contexts: tuple[int, ...] = (1024, 8192)) -> dict[str, Any]:
    """The shipped model by drafts of every length beside autoregression; and the mid-size model, batch 1, at what the
    shipped one accepts of drafts of 4, 8 and 16."""
    found = speculation.of_shipped(tt.TwoTowerModel.from_pretrained(tt.demo_path()), speculation.prompts(prompts))
    accepted = {row["draft"]: row["accepted"] for row in found if row["draft"] in (4, 8, 16)}
    torch.manual_seed(0)
    model, rows = random_model(torch.bfloat16, "both"), []
    for context in contexts:
        state = reusable_state(model, 1, context, 64)
        timed = speculation.of_random(model, state.replaced, accepted)
        rows += [{"context": context, **row} for row in timed]
    return {"prompts": 2 * prompts, "new tokens": speculation.NEW, "shipped": found, "random": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description="Text end to end.")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given again")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/generation.json and generation.md")
    options = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "shipped": lambda: list(shipped()),
        "random": lambda: list(random()),
        "speculative": speculative,
        "shares": lambda: list(shares.over_context()),
        "thresholds": thresholds.measure,
    }
    run: dict[str, Any] = {"machine": tables.machine("cpu")}
    print(about(run))
    for name in options.part or PARTS:
        start = time.perf_counter()
        run[name] = parts[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    text = markdown(run)
    print(text)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        written = json.dumps(run, indent=1, ensure_ascii=False) + "\n"
        (options.save / "generation.json").write_text(written, encoding="utf-8")
        (options.save / "generation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
