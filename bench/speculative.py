"""When speculative decoding pays: `python -m bench.speculative`, predicted; with `--measure`, the shipped model.

Predicted are the tokens that a verification must accept on average to be faster than autoregression, by the cost
model. Measured are autoregression, drafts of the denoiser and prompt lookup on held-out text, in turns, and of each the
least time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

import twotower_kernels as tt
from twotower_kernels.bench.baselines.prompt_lookup import generate_by_lookup
from twotower_kernels.bench.costs.machines import MACHINES
from twotower_kernels.bench.costs.speculative import rounds
from twotower_kernels.bench.sizes.configs import config
from twotower_kernels.bench.thresholds import held_out
from twotower_kernels.options.flags import integer
from twotower_kernels.reference.demo_data import windows

SIZES = (4, 8, 16)  # of drafts
CASES: tuple[tuple[str, int, float | None], ...] = (  # machine, batch, experts hit
    *(("h200", batch, None) for batch in (1, 4, 16, 64)),
    ("h200", 1, 30.0),
    *(("b200", batch, None) for batch in (1, 16)),
    *(("gb10", batch, None) for batch in (1, 16)),
    ("gb10", 1, 30.0),
)
CONTEXT = 4096
Run = Callable[[], tt.GenerateResult]


def predicted() -> list[str]:
    """A table, line by line: accepted tokens from which one draft of each size pays, with one step and with two."""
    drafts = " | ".join(f"{size} tokens" for size in SIZES)
    head = f"| machine, rows | draft and verification of {SIZES[-1]}, AR token | {drafts} |"
    lines = [head, "|---|---|" + "---|" * len(SIZES)]
    c = config()
    for name, batch, hit in CASES:
        found = [rounds(c, MACHINES[name], batch, CONTEXT, size, hit) for size in SIZES]
        last = found[-1]
        rows = f"{batch} row{'s' if batch > 1 else ''}" + ("" if hit is None else f", {hit:g} experts hit")
        cost = f"{(last.draft + last.verification) * 1e3:.1f} ms, {last.ar * 1e3:.1f} ms"
        even = [f"{_number(r.break_even())} ({_number(r.break_even(2))})" for r in found]
        lines.append(f"| {MACHINES[name].name}, {rows} | {cost} | {' | '.join(even)} |")
    return lines


def _number(even: float | None) -> str:
    return "–" if even is None else f"{even:.1f}"


def measured(new: int, prompts: int, turns: int) -> list[str]:
    """A table, line by line: tokens per verification, and the time of autoregression over that of each."""
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    text = windows(held_out(), 64, prompts, torch.Generator().manual_seed(0))
    alone = [row[None] for row in text]

    def each(**options: object) -> tt.GenerateResult:
        return _joined([model.generate(prompt, max_new_tokens=new, **options) for prompt in alone])  # type: ignore[arg-type]

    runs: dict[str, Run] = {"autoregression": partial(each, mode="ar")}
    for size in (4, 8, 16):
        for steps in (1, 2):
            name = f"drafts of {size}, {steps} step{'s' if steps > 1 else ''}"
            runs[name] = partial(each, mode="speculative", block_size=size, draft_steps=steps)
    for size in (4, 8):
        lookup = partial(generate_by_lookup, model, text.tolist(), max_new_tokens=new, block_size=size)
        runs[f"prompt lookup, {size}"] = lookup
    results = {name: run() for name, run in runs.items()}
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(turns):
        for name, run in runs.items():
            seconds[name] = min(seconds[name], run().seconds)
    wanted = [row.tolist() for row in results["autoregression"].sequences]
    lines = ["| | tokens per verification | speed, AR = 1 | text identical to AR |", "|---|---|---|---|"]
    for name, result in results.items():
        accepted = "–" if result.accepted is None else f"{result.accepted:.2f}"
        same = sum(ours.tolist() == theirs for ours, theirs in zip(result.sequences, wanted, strict=True))
        speed = seconds["autoregression"] / seconds[name]
        lines.append(f"| {name} | {accepted} | {speed:.2f} | {same} of {len(wanted)} |")
    return lines


def _joined(results: Sequence[tt.GenerateResult]) -> tt.GenerateResult:
    """As of one request, its rows one after the other."""
    verifications = [count for result in results for count in result.verifications or []]
    return tt.GenerateResult(
        sequences=[row for result in results for row in result.sequences],
        new_tokens=[row for result in results for row in result.new_tokens],
        nfe=[count for result in results for count in result.nfe],
        finish_reason=[reason for result in results for reason in result.finish_reason],
        seconds=sum(result.seconds for result in results),
        verifications=verifications or None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speculative", description="When speculative decoding pays.")
    parser.add_argument("--measure", action="store_true", help="the shipped model here, instead of predictions")
    parser.add_argument("--new", type=integer(2, 2**20), default=64, metavar="N", help="tokens per text (default: 64)")
    parser.add_argument("--prompts", type=integer(1, 2**20), default=16, metavar="N", help="texts (default: 16)")
    parser.add_argument("--turns", type=integer(1, 1000), default=5, metavar="N", help="of each (default: 5)")
    options = parser.parse_args(argv)
    lines = measured(options.new, options.prompts, options.turns) if options.measure else predicted()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
