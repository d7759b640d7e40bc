"""What the tests of the remasking kernel share: a step of the package beside the specification's, and random
steps over the whole space of policies, filters, rows and unusable logits."""

import math
from functools import cache, partial
from typing import Any

import torch
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.compare import assert_within_budget, losses, widened
from tests.kernels.kernel_checks import DTYPES, awkward
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.remask import remask

MASK = 3


def assert_step_agrees(inputs: dict[str, Any], *, layout: int = 0) -> tt.RemaskResult:
    """The package's step against the specification's: tokens, candidates and counts equal, probabilities within the
    error budget, the inputs unchanged.

    Where float32 cannot tell two scores apart, the specification ranks them by its own rounding errors. A step that
    differs from it is right if it is the one that float64 takes, in everything it decides.
    """
    want, truth = remask(**inputs), remask(**widened(inputs))
    laid_out = {k: awkward(v, layout) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    got = tt.remask(**laid_out)
    decided = [n for n, result in enumerate(want) if not result.is_floating_point()]
    more_exact = all(got[n].equal(truth[n]) for n in decided)
    numbers = {name: inputs[name] for name in ("logits", "shift_logits") if name in inputs}
    options = {name: value for name, value in inputs.items() if name not in numbers}
    wide = inputs["logits"].dtype == torch.float64
    draws = cache(partial(losses, partial(remask, **options), numbers, narrower=wide))
    for n, (name, a, b, exact) in enumerate(zip(want._fields, got, want, truth, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if not a.is_floating_point():
            assert a.equal(exact if more_exact else b), name
        elif want.candidate.equal(truth.candidate):  # else the truth is that of another token
            assert_within_budget(a, b, exact, what=name, lost=lambda n=n: draws()[n])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(laid_out[name].nan_to_num(), value.nan_to_num()), f"{name} was changed"
    return got


unit = st.floats(0.03, 0.97)
flag = st.booleans()
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "suppress_mask": flag,
    "skip_mask_candidates": flag,
    "standing": st.sampled_from([False, False, True]),
    "greedy": flag,
    "statistics": st.sampled_from(["raw", "filtered"]),
    "top_p_first": flag,
    "top_p_tempered": flag,
    "top_p_keep_crossing": flag,
    "temperature_end": st.none() | st.floats(0.3, 1.5),
    "score": st.sampled_from(["confidence", "margin", "neg_entropy", "top", "gap", "random", "leftmost"]),
    "position_penalty": st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    "rank_temperature": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    "gate": st.sampled_from(["none", "threshold", "factor", "entropy_sum", "prefix"]),
    "gate_bound": unit,
    "strict": flag,
    "gate_on": st.sampled_from(["confidence", "score"]),
    "gate_slack": st.none() | st.floats(0.001, 0.3),
    "factor_last_free": flag,
    "entropy_includes_self": flag,
    "run_threshold": st.none() | unit,
    "schedule": st.sampled_from(
        [
            *("none", "remaining", "even", "carried", "noise", "truncated", "rounded", "coin", "posterior"),
            *("uniform", "corrupt"),
        ]
    ),
    "schedule_base": st.sampled_from(["masks", "block", "editable"]),
    "spread_remainder": flag,
    "alpha": st.sampled_from(["linear", "cosine", "exponential", "sine", "cosine_floor"]),
    "min_t": st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
    "alpha_floor": st.sampled_from([0.0, 1e-3, 0.2]),
    "long_grid": flag,
    "warmup": st.sampled_from([0.0, 0.0, 0.4]),
    "min_commits": st.integers(0, 3),
    "finish": flag,
    "window": flag,
    "combine": st.sampled_from(["fill", "union", "cap"]),
    "sub_block": st.sampled_from([0, 0, 1, 3, 4]),
    "complete_threshold": st.none() | unit,
    "edit_threshold": st.none() | unit,
    "remask_threshold": st.none() | unit,
    "renoise": flag,
    "renoise_as": st.sampled_from(["random", "mask"]),
    "time": st.sampled_from(["masked_fraction", "schedule"]),
}


@st.composite
def policies(draw: Any) -> RemaskPolicy:
    """Any policy: half of the fields at their defaults, so that rare ones do not always come together."""
    fields = {name: draw(values) for name, values in FIELDS.items() if draw(flag)}
    if fields.get("combine") == "cap" and fields.get("gate", "none") == "none":
        fields["gate"] = "threshold"
    if fields.get("schedule") == "uniform":
        fields |= {"renoise": True, "renoise_as": "random", "standing": False}
    if fields.get("standing") or fields.get("renoise_as") == "mask":
        fields["renoise"] = True
    if fields.get("renoise"):
        fields |= {"edit_threshold": None, "remask_threshold": None}
    if fields.get("schedule") == "posterior":
        fields["suppress_mask"] = True
    if fields.get("complete_threshold") is not None and not fields.get("sub_block"):
        fields["sub_block"] = 2
    if fields.get("rank_temperature"):  # noise is for ranks alone
        meaningless = {"score": ("random",), "gate_on": ("score",), "schedule": ("coin", "posterior", "uniform")}
        fields = {name: value for name, value in fields.items() if value not in meaningless.get(name, ())}
    return RemaskPolicy(**fields)


def row_numbers(generator: torch.Generator, batch: int, block: int, vocab: int) -> dict[str, torch.Tensor]:
    """A tensor for every parameter that may differ from row to row."""

    def choice(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (batch,), generator=generator)]

    num_steps = torch.randint(1, 7, (batch,), generator=generator)
    return {
        "step": torch.randint(0, 8, (batch,), generator=generator) % (num_steps + 1),
        "num_steps": num_steps,
        "temperature": choice([0.0, 0.0, 0.5, 1.0, 1.7]),
        "top_k": choice([0, 0, 1, 2, 5, vocab, 10 * vocab]),
        "top_p": choice([1.0, 1.0, 0.4, 0.8, 0.95]).double(),
        "seed": torch.randint(-(2**62), 2**62, (batch,), generator=generator),
        "offset": torch.randint(0, 2**32, (batch,), generator=generator),
        "gate_bound": choice([0.2, 0.5, 0.8, math.inf]),
        "initial_num_masked": torch.randint(0, block + 1, (batch,), generator=generator),
        "valid_lens": torch.randint(0, block + 1, (batch,), generator=generator),
    }


@st.composite
def steps(draw: Any) -> dict[str, Any]:
    """Arguments of one step; positions beyond `valid_lens` hold NaN, some others NaN, infinities or nothing finite."""
    policy = draw(policies())
    batch, block = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5, 9]))
    vocab = draw(st.sampled_from([4, 5, 11, 37, 515]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(batch, block, vocab, generator=generator)
    favourite = torch.randint(0, vocab, (batch, block, 1), generator=generator)
    logits = logits.scatter_add(2, favourite, 8 * torch.rand(batch, block, 1, generator=generator))
    unscored = draw(st.sampled_from([False, False, True]))
    # far apart, confidences are exactly 0 and 1; unscored tokens must not overflow to infinity in float16, see below
    logits = logits * draw(st.sampled_from([1.0, 1.0, 0.01, 1e3 if unscored else 1e4]))
    tokens = torch.randint(0, vocab, (batch, block), generator=generator)
    waits = torch.rand(batch, block, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    inputs: dict[str, Any] = {"mask_token_id": MASK, "policy": policy}
    inputs["tokens"] = torch.where(waits, MASK, tokens).to(draw(st.sampled_from([torch.int64, torch.int32])))
    for name, values in row_numbers(generator, batch, block, vocab).items():
        if draw(flag):
            inputs[name] = values
    if "num_steps" not in inputs:
        inputs["num_steps"] = draw(st.integers(1, 9))
    if "temperature" not in inputs:
        inputs["temperature"] = draw(st.sampled_from([0.0, 0.8, 1.0]))
    if draw(flag):
        inputs["editable"] = torch.rand(batch, block, generator=generator) < 0.8
    if draw(flag):
        inputs["suppress_ids"] = draw(st.lists(st.integers(0, vocab - 1), max_size=2))
    if draw(flag):
        inputs["rank_noise"] = torch.rand(batch, block, generator=generator, dtype=torch.float64)
    if draw(flag):
        inputs["candidates"] = torch.randint(-1, vocab, (batch, block), generator=generator)
    if unscored:  # then no infinities: the specification's words and program differ on one at an unscored token
        inputs["confidence_suppress_ids"] = torch.randint(0, vocab, (2,), generator=generator)
    elif draw(flag) and batch and block:
        where = torch.rand(batch, block, generator=generator) < 0.3
        kind = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        logits[where, :: 1 if kind < 0 else vocab] = kind
    shift = draw(st.sampled_from([None, None, 0, 1]))
    before = 3 * torch.randn(batch, vocab, generator=generator) if shift and draw(flag) else None
    if "valid_lens" in inputs:
        logits[torch.arange(block) >= inputs["valid_lens"][:, None]] = torch.nan
    inputs["logits"] = logits.to(draw(st.sampled_from(DTYPES)))
    if shift is not None:
        inputs["shift"] = shift
    if draw(flag):
        inputs["noise"] = draw(st.sampled_from(["block", "sequence"]))
    if before is not None:
        inputs["shift_logits"] = before.to(inputs["logits"].dtype)
    return inputs
