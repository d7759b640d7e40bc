"""Remasking: random steps over the whole space of policies, filters, rows and unusable logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops.remask import remask as public
from twotower_kernels.options.remask_policy import RemaskPolicy
from twotower_kernels.reference.remask import CASES, make_inputs, remask
from twotower_kernels.testing import drawing
from twotower_kernels.testing.budget import (
    FACTOR,
    ORDERS,
    Mismatch,
    Yardstick,
    assert_equal,
    assert_same_kind,
    assert_within_budget,
)
from twotower_kernels.testing.cases.op import Arguments, Inputs, Judge, Op, empty
from twotower_kernels.testing.needs import strategies as st

MASK = 3

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


PUBLISHED = (
    RemaskPolicy.twotower(0.8),
    RemaskPolicy.llada(),
    RemaskPolicy.threshold(0.9),
    RemaskPolicy.threshold(0.6, strict=True),
    RemaskPolicy.sdar(0.85),
    RemaskPolicy.fast_dllm_factor(1.0),
    RemaskPolicy.entropy_bound(0.5),
    RemaskPolicy.dream("margin"),
    RemaskPolicy.llada2(0.6, edit_threshold=0.4),
    RemaskPolicy.diffusion_gemma(),
    RemaskPolicy.posterior(),
)


@st.composite
def policies(draw: st.DrawFn) -> RemaskPolicy:
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


def row_numbers(generator: torch.Generator, batch: int, block: int, vocab: int) -> dict[str, Tensor]:
    """A tensor for every parameter that may differ from row to row."""

    def choice(values: list[Any]) -> Tensor:
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
def steps(draw: st.DrawFn, lens: bool = True, dtype: torch.dtype | None = None) -> Inputs:
    """Arguments of one step; positions beyond `valid_lens` hold NaN, some others NaN, infinities or nothing finite.

    lens: `valid_lens` may be among them. dtype: of the logits; None: any.
    """
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
    inputs: Inputs = {"mask_token_id": MASK, "policy": policy}
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
    if not lens:
        inputs.pop("valid_lens", None)
    if "valid_lens" in inputs:
        logits[torch.arange(block) >= inputs["valid_lens"][:, None]] = torch.nan
    inputs["logits"] = logits.to(draw(drawing.dtypes()) if dtype is None else dtype)
    if shift is not None:
        inputs["shift"] = shift
    if draw(flag):
        inputs["noise"] = draw(st.sampled_from(["block", "sequence"]))
    if before is not None:
        inputs["shift_logits"] = before.to(inputs["logits"].dtype)
    return inputs


NUMBERS = ("step", "num_steps", "temperature", "top_k", "top_p", "seed", "offset", "gate_bound", "initial_num_masked")
PER_ROW = ("logits", "tokens", "editable", "valid_lens", "candidates", "rank_noise", "shift_logits", *NUMBERS)


def _flattened(logits: Tensor) -> Tensor:
    """The same, the largest about 2, in steps of about a quarter: no token is certain, and many are equal. The steps of
    positions differ, lest the same numbers in another order give scores that are equal but for their rounding."""
    finite = logits.double().nan_to_num(0.0, 0.0, 0.0)
    largest = finite.abs().amax() if logits.numel() else finite.new_ones(())
    step = 0.25 + torch.arange(logits.shape[1], dtype=torch.float64)[:, None] / 64
    return ((8 / largest.clamp(min=1e-3) * logits.double()).round() * step).to(logits.dtype)


@st.composite
def _step(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    """Also with numbers for all rows alike, with ties of tokens and of positions, and where filters matter."""
    inputs = draw(steps("valid_lens" in arguments.taken, dtype))
    if draw(flag):  # whose fields seldom come together by chance
        inputs["policy"] = draw(st.sampled_from(PUBLISHED))
    if draw(st.sampled_from([False, False, True])):  # a certain token's confidence is just that
        inputs["gate_bound"] = 1.0
    if draw(flag):  # many tokens that may be drawn, of which filters take some away
        inputs |= dict(logits=_flattened(inputs["logits"]), tokens=torch.full_like(inputs["tokens"], MASK))
        numbers = {
            "temperature": (0.7, 1.0, 1.5),
            "top_k": (0, 1, 2, 3, 5),
            "top_p": (1.0, 0.23, 0.47, 0.89),
            "seed": (7, -5, 2**40 + 3),
        }
        inputs |= {name: draw(st.sampled_from(values)) for name, values in numbers.items()}
    logits = inputs["logits"]
    batch, block, vocab = logits.shape
    tie = draw(st.sampled_from(["", "tokens", "positions"]))
    if tie == "tokens" and logits.numel():
        generator = torch.Generator().manual_seed(draw(drawing.seeds()))
        other = torch.randint(0, vocab, (batch, block, 1), generator=generator)
        inputs["logits"] = logits.scatter(2, other, logits.amax(-1, keepdim=True))
    elif tie == "positions" and logits.numel():
        inputs["logits"] = torch.where(torch.arange(block)[:, None] % 3 > 0, logits, logits[:, :1])
    if draw(flag) and batch:
        inputs |= {name: inputs[name][0].item() for name in NUMBERS if isinstance(inputs.get(name), Tensor)}
    if not {"temperature", "seed"} <= arguments.taken:
        inputs["temperature"] = 0.0  # draws with another seed are others
    if not {"step", "num_steps"} <= arguments.taken:
        inputs |= dict(step=0, num_steps=1)
    return arguments.kept(inputs)


def _padding(inputs: Inputs) -> dict[str, Tensor]:
    """The logits beyond `valid_lens`."""
    lens, logits = inputs.get("valid_lens"), inputs["logits"]
    if lens is None:
        return {}
    beyond = (torch.arange(logits.shape[-2]) >= lens.reshape(-1, 1))[..., None].expand(-1, -1, logits.shape[-1])
    beyond = beyond.reshape(logits.shape)
    return {"logits": beyond} if beyond.any() else {}


def _rows(inputs: Inputs) -> list[str]:
    return [name for name in PER_ROW if isinstance(inputs.get(name), Tensor)]


def _refusable(inputs: Inputs) -> list[str]:
    """Also a number per row."""
    return ["a number for each row"] * any(isinstance(inputs.get(name), Tensor) for name in NUMBERS) + empty(inputs)


class JudgeStep(Judge):
    """Tokens, candidates and counts equal, probabilities within the error budget.

    Where float32 cannot tell two scores apart, the specification ranks them by its own rounding errors. A row that
    differs from it is right if it is the one that float64 takes, in everything it decides.
    """

    def __init__(self, reference: Callable[..., Any], inputs: Inputs) -> None:
        numbers = {name: inputs[name] for name in ("logits", "shift_logits") if inputs.get(name) is not None}
        options = {name: value for name, value in inputs.items() if name not in numbers}
        self.yardstick = Yardstick(partial(reference, **options), numbers)
        self.alone = inputs["logits"].ndim == 2

    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        names, (want, truth) = self.yardstick.naive._fields, (self.yardstick.naive, self.yardstick.exact)
        if len(results) != len(want):
            raise Mismatch(f"{len(results)} results, expected {', '.join(names)}")
        for name, got, plain in zip(names, results, want, strict=True):
            assert_same_kind(got, plain, name)
        got, want, truth = (type(want)(*(x[None] if self.alone else x for x in all)) for all in (results, want, truth))
        asked = range(len(got.tokens)) if row is None else [row]
        for n in asked:
            decided = [m for m, x in enumerate(want) if not x.is_floating_point()]
            if not all(got[m][n].equal(truth[m][n]) for m in decided):
                for m in decided:
                    assert_equal(got[m][n], want[m][n], f"{names[m]} of row {n}")
        # else the truth is that of another token
        same = [n for n in asked if want.candidate[n].equal(truth.candidate[n])]
        for m, name in enumerate(names):
            if want[m].is_floating_point():
                lost = lambda m=m: [(x[None] if self.alone else x)[same] for x in self.yardstick.losses[m]]  # noqa: E731
                factor = ORDERS * FACTOR if self.any_order and got[m].dtype == torch.float32 else FACTOR
                tensors = got[m][same], want[m][same], truth[m][same].double()
                assert_within_budget(*tensors, factor=factor, what=name, lost=lost)


OPS = {
    "remask": Op(
        public, remask, CASES["remask"], partial(make_inputs, "remask"), _step, own=("logits", "shift_logits"),
        rows=_rows, judge=JudgeStep, padding=_padding, refusable=_refusable,
    )
}  # fmt: skip
