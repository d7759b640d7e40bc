"""Remasking over a vocabulary by TwoTower's rule, greedy and sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import twotower_kernels as tt
from twotower_kernels.bench.costs import costs
from twotower_kernels.bench.measure.timing import NO_GOALS, ORIGINAL, OURS, Case, Goals
from twotower_kernels.bench.sizes.shapes import RELEASED, Shapes
from twotower_kernels.reference import remask as specification

THRESHOLD = 0.8


def original(logits: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    """Cloned logits, the whole softmax, and a loop over rows."""
    mask_id, t, tokens = options["mask_token_id"], options["temperature"], tokens.clone()
    z = logits.clone().float()
    z[..., mask_id] = -torch.inf
    probabilities = z.softmax(-1)
    if t > 0:
        noise = -torch.log(-torch.log(torch.rand_like(z)))
        candidate = (z / t + noise).argmax(-1)
    else:
        candidate = probabilities.argmax(-1)
    confidence = probabilities.gather(-1, candidate[..., None])[..., 0]
    left = options["num_steps"] - options["step"]
    for b in range(len(tokens)):
        masked = tokens[b] == mask_id
        score = torch.where(masked, confidence[b], -torch.inf)
        count = max(-(-int(masked.sum()) // left), int((score > THRESHOLD).sum()))
        for position in score.argsort(descending=True, stable=True)[:count].tolist():
            tokens[b, position] = candidate[b, position]
    return tokens


def best_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit's probability and its token."""
    chosen, candidate = logits.max(-1)
    return (chosen.float() - logits.float().logsumexp(-1)).exp(), candidate


compiled_best_of = torch.compile(best_of, dynamic=False)


def best(logits: Tensor, tokens: Tensor, *, compiled: bool = False, **options: Any) -> Tensor:
    """One number per position instead of the softmax, noise in place, all rows at once."""
    mask_id, t = options["mask_token_id"], options["temperature"]
    keep = logits[..., mask_id].clone()
    logits[..., mask_id] = -torch.inf
    if t > 0:
        candidate = torch.empty_like(logits, dtype=torch.float32).exponential_().log_().neg_()
        candidate = candidate.add_(logits, alpha=1 / t).argmax(-1)
        chosen = logits.gather(-1, candidate[..., None])[..., 0]
        confidence = (chosen.float() - logits.float().logsumexp(-1)).exp()
    else:
        confidence, candidate = (compiled_best_of if compiled else best_of)(logits)
    logits[..., mask_id] = keep
    masked = tokens == mask_id
    score = torch.where(masked, confidence, -torch.inf)
    left = options["num_steps"] - options["step"]
    n = masked.sum(1, keepdim=True)
    count = torch.maximum((n + left - 1) // left, (score > THRESHOLD).sum(1, keepdim=True))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return torch.where(masked & (rank < count), candidate, tokens)


def case(
    batch: int,
    temperature: float,
    dtype: torch.dtype,
    device: str,
    goals: Goals = NO_GOALS,
    shapes: Shapes = RELEASED,
) -> Case:
    block, vocabulary = shapes.block_size, shapes.vocab_size
    given = dict(batch=batch, block=block, vocab=vocabulary, num_steps=16, step=0, temperature=temperature)
    inputs = specification.make_inputs("remask", given, dtype=dtype, device=device)
    inputs |= {"policy": tt.RemaskPolicy.twotower(THRESHOLD)}
    inputs["tokens"] = torch.full_like(inputs["tokens"], inputs["mask_token_id"])  # the first step: nothing is known

    mask_token_id = inputs["mask_token_id"]

    def same(ours: Any, theirs: Any) -> None:
        """`theirs` may be the tokens alone."""
        theirs = getattr(theirs, "tokens", theirs)
        if temperature == 0:
            assert torch.equal(ours.tokens, theirs), "other tokens"
        else:  # every program has draws of its own
            assert (theirs != mask_token_id).sum() >= batch, "nothing was committed"

    programs = {
        OURS: partial(tt.remask, **inputs),
        ORIGINAL: partial(original, **inputs),
        "PyTorch: logsumexp": partial(best, **inputs),
    }
    if not temperature:
        programs["PyTorch: logsumexp, compiled"] = partial(best, **inputs, compiled=True)
    return Case(
        "remask, sampled" if temperature else "remask, greedy",
        f"{batch * block} × {vocabulary}",
        dtype,
        programs,
        same,
        costs.remask(batch, block, vocabulary, dtype.itemsize),
        goals=goals,
        sizes=dict(batch=batch, block=block, rows=batch * block, vocabulary=vocabulary),
        inputs=inputs,
    )


def cases(
    device: str = "cpu",
    shapes: Shapes = RELEASED,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
) -> Iterator[Case]:
    for batch in batches or ((1, 16) if device == "cpu" else (1, 4, 16, 64)):
        cpu = device == "cpu"  # on a GPU: at least 80 % of the memory's speed at batch 64
        yield case(batch, 0.0, torch.float32, device, (10, 4, 0.7) if cpu else (None, None, 0.8), shapes)
        yield case(batch, 1.0, torch.float32, device, (10, 4, None) if cpu else NO_GOALS, shapes)
    for batch in batches or (1,):
        yield case(batch, 0.0, torch.bfloat16, device, shapes=shapes)
