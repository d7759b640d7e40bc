"""What drafts are worth in time: part `speculative` of `bench.generation`.

The shipped model goes on from held-out contexts, a batch of one, autoregressively and by drafts of every length, in
turns; of each prompt and way the fastest of several runs counts, and the runs' texts are compared. What is accepted
there, a memory-bound model is then credited with: the mid-size one, whose weights are random, but whose tokens, drafts
and verifications take their time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

import twotower_kernels as tt
from twotower_kernels.bench.measure.watched import generated
from twotower_kernels.bench.quality.positions import positions, trained_lines
from twotower_kernels.bench.quality.runs import starting
from twotower_kernels.reference import demo_data

DRAFTS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
CONTEXT, NEW = 512, 64  # tokens


def prompts(count: int) -> list[list[int]]:
    """Contexts from held-out files, as many of each source."""
    corpus = demo_data.corpus()
    words = Tokenizer.from_file(str(tt.demo_path() / "tokenizer.json"))
    places = positions(corpus, trained_lines(corpus), words, count, context=CONTEXT, new=32)
    return [place.prompt for place in places]


def of_shipped(
    model: tt.TwoTowerModel, rows: Sequence[list[int]], drafts: Sequence[int] = DRAFTS, new: int = NEW, times: int = 5
) -> list[dict[str, Any]]:
    """Autoregression, then drafts of each length.

    Returns:
        Per way "draft" (0: autoregression), "seconds" (of all prompts, prefill not counted), "tokens per second",
        "accepted" and "identical" (the share of prompts whose text is autoregression's); both None for autoregression.
    """
    ways: dict[int, dict[str, Any]] = {0: dict(mode="ar")}
    ways |= {size: dict(mode="speculative", block_size=size) for size in drafts}
    seconds, verified, same = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for ids in rows:
        prompt, best = torch.tensor([ids]), dict.fromkeys(ways, float("inf"))
        results: dict[int, tt.GenerateResult] = {}
        for _ in range(times):
            for size, way in ways.items():
                with starting(model, model.prefill(prompt)):
                    results[size] = model.generate(prompt, max_new_tokens=new, **way)
                best[size] = min(best[size], results[size].seconds)
        for size, result in results.items():
            seconds[size] += best[size]
            verified[size] += sum(result.verifications or [])
            same[size] += torch.equal(result.new_tokens[0], results[0].new_tokens[0])
    tokens = new * len(rows)
    return [
        {
            "draft": size,
            "seconds": seconds[size],
            "tokens per second": tokens / seconds[size],
            "accepted": tokens / verified[size] if size else None,
            "identical": same[size] / len(rows) if size else None,
        }
        for size in ways
    ]


def of_random(
    model: tt.TwoTowerModel,
    state: Callable[[], tt.ContextState],
    accepted: dict[int, float],
) -> list[dict[str, Any]]:
    """A model of random weights, one row.

    Args:
        state: makes the state that a generation starts from.
        accepted: by a draft's length, the tokens of it that another model's verifications keep.

    Returns:
        Per length "draft", "token seconds" (autoregression's), "round seconds" (a draft and its verification; medians),
        "accepted", and "times": how many times as fast as autoregression it would be.
    """
    prompt = torch.tensor([[5, 6]])
    token, _ = generated(model, prompt, lambda *_: state(), mode="ar", max_new_tokens=12)
    rows = []
    for size, kept in accepted.items():
        options = dict(mode="speculative", block_size=size, max_new_tokens=12)
        found, _ = generated(model, prompt, lambda *_: state(), **options)
        again, _ = generated(model, prompt, lambda *_: state(), mode="ar", max_new_tokens=12)
        alone, round_ = min(token["block seconds"], again["block seconds"]), found["block seconds"]
        rows.append(
            {
                "draft": size,
                "token seconds": alone,
                "round seconds": round_,
                "accepted": kept,
                "times": kept * alone / round_,
            }
        )
    return rows
