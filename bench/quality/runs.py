"""The modes of generation side by side, from the same contexts: what each writes, and in how many calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import twotower_kernels as tt
from twotower_kernels.bench.quality.positions import Position
from twotower_kernels.bench.quality.scores import agreement, edit_similarity, lookups, matching_prefix, same_line

GREEDY = "AR, greedy"
THRESHOLDS, PREFIXES = (0.5, 0.8, 0.9), (0.5, 0.8)
DRAFTS, LOOKUPS = ((4, 1), (8, 1), (16, 1), (16, 2)), (8, 16)  # tokens and denoiser calls; tokens of prompt lookup
BATCH = 50


def runs() -> dict[str, dict[str, Any]]:
    """The options of every run that a model makes, by name; autoregression first."""
    return {
        GREEDY: dict(mode="ar"),
        **{f"lossy, γ {g}": dict(confidence_threshold=g) for g in THRESHOLDS},
        **{f"contiguous prefix, γ {g}": dict(policy=tt.RemaskPolicy.prefix(g)) for g in PREFIXES},
        **{
            f"speculative, {size} tokens, {steps} call{'s' * (steps > 1)}": dict(
                mode="speculative", block_size=size, draft_steps=steps
            )
            for size, steps in DRAFTS
        },
    }


@dataclass
class Written:
    """What one run wrote from every position.

    tokens: the new ones. calls: model calls (NFE). verifications: drafts that the context tower read; 0: none. nats:
    the negative log-likelihood per token that the context tower gives to the text; None: it is autoregression's.
    """

    tokens: list[list[int]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    verifications: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)


@contextmanager
def starting(model: tt.TwoTowerModel, state: tt.ContextState) -> Iterator[None]:
    """A generation of the model starts from this state, whose prefill is done. It consumes it."""
    model.prefill = lambda *_: state  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.prefill


def likelihoods(model: tt.TwoTowerModel, state: tt.ContextState, tokens: Tensor) -> list[float]:
    """Nats per token that the context tower gives to `tokens [B, n]` behind this state."""
    first = state.logits
    behind = model.verify(tokens, state.fork(1)).logits
    logits = torch.cat([first[:, None], behind[:, :-1]], 1).float()
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found: list[float] = nll.mean(1).tolist()
    return found


def write(model: tt.TwoTowerModel, prompts: Sequence[list[int]], new: int) -> dict[str, Written]:
    """Every run from every prompt, prompt lookup included, which is counted on autoregression's text."""
    chosen = runs()
    written = {name: Written() for name in chosen}
    for first in range(0, len(prompts), BATCH):
        rows = [torch.tensor(prompt) for prompt in prompts[first : first + BATCH]]
        lengths = torch.tensor([len(row) for row in rows])
        state = model.prefill(pad_sequence(rows, batch_first=True), lengths)
        for name, options in chosen.items():
            with starting(model, state.fork(1)):
                result = model.generate(rows, max_new_tokens=new, **options)
            of = written[name]
            of.tokens += [row.tolist() for row in result.new_tokens]
            of.calls += result.nfe
            of.verifications += result.verifications or [0] * len(rows)
            of.nats += likelihoods(model, state, torch.stack(result.new_tokens))
    greedy = written[GREEDY]
    for size in LOOKUPS:
        calls = [lookups(prompt, text, size) for prompt, text in zip(prompts, greedy.tokens, strict=True)]
        written[f"prompt lookup, {size} tokens"] = Written(greedy.tokens, calls, calls, greedy.nats)
    return written


def figures(
    found: dict[str, Written], places: Sequence[Position], words: Tokenizer, chosen: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Per run the scores of the positions with these indices, which are not none.

    Returns:
        "line exact match", "edit similarity", "agreement with AR" (shares), "matching prefix" (characters),
        "characters per call", "tokens per call", "tokens per draft" (None without drafts), "nats per token",
        "distinct 4-grams".
    """
    scores = {}
    for name, written in found.items():
        texts = [words.decode(written.tokens[i]) for i in chosen]
        pairs = [(text, places[i].true) for text, i in zip(texts, chosen, strict=True)]
        tokens = [written.tokens[i] for i in chosen]
        greedy = [found[GREEDY].tokens[i] for i in chosen]
        calls, drafts = sum(written.calls[i] for i in chosen), sum(written.verifications[i] for i in chosen)
        scores[name] = {
            "line exact match": fmean(same_line(*pair) for pair in pairs),
            "matching prefix": fmean(matching_prefix(*pair) for pair in pairs),
            "edit similarity": fmean(edit_similarity(*pair) for pair in pairs),
            "agreement with AR": fmean(agreement(a, b) for a, b in zip(tokens, greedy, strict=True)),
            "characters per call": sum(map(len, texts)) / calls,
            "tokens per call": sum(map(len, tokens)) / calls,
            "tokens per draft": sum(map(len, tokens)) / drafts if drafts else None,
            "nats per token": fmean(written.nats[i] for i in chosen),
            "distinct 4-grams": fmean(distinct(row) for row in tokens),
        }
    return scores


def distinct(tokens: list[int]) -> float:
    """The share of 4-grams that do not repeat an earlier one."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(grams)) / max(1, len(grams))
