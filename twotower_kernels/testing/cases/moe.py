"""The router's product and choice, the plan, and the experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.ops import MoePlan, moe_plan
from twotower_kernels.ops import moe as ops
from twotower_kernels.reference import moe
from twotower_kernels.testing import drawing
from twotower_kernels.testing.budget import (
    FACTOR,
    ORDERS,
    Mismatch,
    assert_equal,
    assert_gate_faithful,
    assert_same_kind,
    assert_within_budget,
)
from twotower_kernels.testing.cases.op import Arguments, Inputs, Judge, Op, empty
from twotower_kernels.testing.needs import strategies as st

ULPS = 4  # by which scores of float32 may differ between math libraries

# --- the router's product ---------------------------------------------------------------------------------------------


def products() -> st.SearchStrategy[dict[str, int]]:
    """Sizes of `moe_gate`."""
    return st.fixed_dictionaries(
        {"n": st.integers(0, 7), "e": st.integers(0, 19), "h": drawing.sizes(70, 511, 513, 1025)}
    )


@st.composite
def _gate(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    inputs = moe.make_inputs("moe_gate", draw(products()), dtype=dtype, seed=draw(drawing.seeds()))
    scale, narrow = draw(st.sampled_from([1e-3, 1.0, 1e4])), draw(st.booleans())
    inputs["gate_weight"] = (inputs["gate_weight"] * scale).to(dtype if narrow else torch.float32)
    return arguments.kept(inputs)


class JudgeGate(Judge):
    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        (logits,) = results
        x, part = self.yardstick.inputs["x"], slice(None) if row is None else slice(row, row + 1)
        assert_same_kind(logits, self.yardstick.naive[0], "result 0")
        assert_gate_faithful(logits[part], x[part], self.yardstick.inputs["gate_weight"])


# --- the choice -------------------------------------------------------------------------------------------------------

# Sigmoids of 0, ½ and 1 and biases of quarters: every score and sum is exact, and most are ties.
TIED_LOGITS, TIED_BIASES = [-800.0, 0.0, 50.0, 800.0], [-0.75, -0.5, 0.0, 0.25]


@st.composite
def routings(draw: st.DrawFn, values: list[float], biases: list[float]) -> Inputs:
    """Any sizes and options of `moe_route`, logits, biases and scales from the given values."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    e, n = groups * draw(st.integers(1, 6)), draw(st.integers(0, 4))
    logits = draw(st.lists(st.sampled_from(values), min_size=n * e, max_size=n * e))
    bias, scale = (draw(st.none() | st.lists(st.sampled_from(biases), min_size=e, max_size=e)) for _ in range(2))
    kept, dropped = draw(st.integers(1, groups)), draw(st.sampled_from(moe.DROPPED))
    return dict(
        logits=torch.tensor(logits, dtype=draw(drawing.dtypes())).reshape(n, e),
        correction_bias=None if bias is None else torch.tensor(bias, dtype=draw(drawing.dtypes())),
        top_k=draw(st.integers(1, e if dropped == "zero" else e // groups * kept)),
        n_group=groups,
        topk_group=kept,
        renormalize=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        dropped=dropped,
        per_expert_scale=None if scale is None else torch.tensor(scale, dtype=draw(drawing.dtypes())),
    )


@st.composite
def _route(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    inputs = draw(routings(TIED_LOGITS, TIED_BIASES))
    if not {"n_group", "topk_group"} <= arguments.taken:
        inputs |= dict(n_group=1, topk_group=1, dropped="zero")
    elif "dropped" not in arguments.taken:
        inputs["dropped"] = "zero"
    tied, shape = draw(st.booleans()), inputs["logits"].shape
    generator = torch.Generator().manual_seed(draw(drawing.seeds()))

    def vector(name: str, values: Tensor) -> Tensor | None:
        given = inputs[name]
        if given is None and name not in arguments.demanded:
            return None
        return values.float() if given is None or not tied else given.float()

    bias = vector("correction_bias", torch.rand(shape[1], generator=generator) - 0.5)
    scale = vector("per_expert_scale", 1 + 0.3 * torch.randn(shape[1], generator=generator))
    if not tied:
        spread = draw(st.sampled_from([1e-3, 1.0, 1.0, 30.0]))
        inputs["logits"] = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):  # as close as float64 tells apart, and float32 does not
            inputs["logits"] = inputs["logits"].round() + 1e-9 * inputs["logits"]
    elif draw(st.booleans()):  # no expert has a score
        inputs["logits"][:1] = min(TIED_LOGITS)
    score = draw(st.sampled_from(moe.SCORES))
    inputs |= dict(logits=inputs["logits"].to(dtype), correction_bias=bias, per_expert_scale=scale, score=score)
    for name, default in (("renormalize", True), ("scaling", 1.0), ("score", "sigmoid")):
        if name not in arguments.taken:
            inputs[name] = default
    if "top_k" in inputs:
        inputs["top_k"] = min(inputs["top_k"], shape[1])
    return arguments.kept(inputs)


class JudgeRoute(Judge):
    """The experts are those of the specification, in its dtype or in float64, but for scores so close that math
    libraries rank them otherwise; equal logits and biases take the lowest expert. Weights where the experts agree."""

    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        if len(results) != 2:
            raise Mismatch(f"{len(results)} results, expected weights and experts")
        (weights, experts), (naive, chosen), (exact, wide) = results, self.yardstick.naive, self.yardstick.exact
        for n, (got, plain) in enumerate(zip(results, (naive, chosen), strict=True)):
            assert_same_kind(got, plain, f"result {n}")
        asked = torch.ones(len(experts), dtype=torch.bool) if row is None else torch.arange(len(experts)) == row
        ours = asked & (experts == chosen).all(1)
        for n in torch.nonzero(asked & ~ours & ~(experts == wide).all(1)).flatten().tolist():
            self.assert_close_call(experts, n)
        same = ours & (chosen == wide).all(1)
        lost = lambda: [x[same] for x in self.yardstick.losses[0]]  # noqa: E731
        factor = ORDERS * FACTOR if self.any_order else FACTOR
        truth = exact[same].double()
        assert_within_budget(weights[same], naive[same], truth, factor=factor, what="result 0", lost=lost)

    def assert_close_call(self, experts: Tensor, row: int) -> None:
        """Every place of a row has an expert whose score is, within some ulp, that which belongs there."""
        inputs, expected = self.yardstick.inputs, self.yardstick.exact[1][row].long()
        logits, got = inputs["logits"][row].double(), experts[row].long()
        bias = inputs.get("correction_bias")
        bias = torch.zeros_like(logits) if bias is None else bias.double()
        fits = bool(((got >= 0) & (got < len(logits))).all()) and len(set(got.tolist())) == len(got)
        if fits and inputs.get("n_group", 1) == 1:
            scores = logits.softmax(0) if inputs.get("score") == "softmax" else logits.sigmoid()
            choice = scores + bias
            ulp = torch.finfo(torch.promote_types(inputs["logits"].dtype, torch.float32)).eps
            near = (choice[got] - choice[expected]).abs() <= ULPS * ulp * choice.abs().amax()
            equal = (logits[got] == logits[expected]) & (bias[got] == bias[expected])
            if bool((near & (~equal | (got == expected))).all()):
                return
        assert_equal(got, expected, f"result 1, row {row}")


# --- the plan ---------------------------------------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn, experts: int) -> Tensor:
    """Experts of some tokens, among them some that are elsewhere: integers [N, k]."""
    n, top_k, elsewhere = draw(st.integers(0, 7)), draw(st.integers(0, 5)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(drawing.seeds()))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.randint(-elsewhere, experts + elsewhere, (n, top_k), generator=generator, dtype=dtype)


@st.composite
def _plan(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    count = draw(st.integers(1, 9))
    return arguments.kept(dict(experts=draw(choices(count)), num_experts=count))


class JudgePlan(Judge):
    """What stands behind the last offset is free."""

    def __call__(self, results: Sequence[Tensor], row: int | None = None) -> None:
        end = int(self.yardstick.naive[1][-1])
        for n, (got, expected) in enumerate(zip(results, self.yardstick.naive, strict=True)):
            assert_same_kind(got, expected, f"result {n}")
            assert_equal(got[:end] if n == 2 else got, expected[:end] if n == 2 else expected, f"result {n}")


# --- the experts ------------------------------------------------------------------------------------------------------


def mixtures() -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of `moe_experts`, of every activation; some experts may be elsewhere."""
    return st.fixed_dictionaries(
        dict(
            n=st.integers(0, 9),
            e=st.integers(1, 6),
            of=st.integers(6, 8),
            top_k=st.integers(1, 6),
            h=st.integers(1, 70),
            i=st.integers(1, 40),
            shared=st.integers(0, 20),
            activation=st.sampled_from(moe.ACTIVATIONS),
            biased=st.booleans(),
        )
    )


def clamps() -> st.SearchStrategy[dict[str, float]]:
    """Of "clamped_gated"."""
    return st.fixed_dictionaries(dict(alpha=st.floats(-2, 3), limit=st.floats(0, 3) | st.just(float("inf"))))


@st.composite
def _mixture(draw: st.DrawFn, arguments: Arguments, dtype: torch.dtype) -> Inputs:
    given, clamp = draw(mixtures()), draw(clamps())
    if draw(st.booleans()):  # all experts are here
        given |= dict(of=given["e"], top_k=min(given["top_k"], given["e"]))
    if "activation" not in arguments.taken:
        given["activation"] = "relu2"
    if not {"shared_up", "shared_down"} <= arguments.taken:
        given["shared"] = 0
    elif {"shared_up", "shared_down"} & arguments.demanded:
        given["shared"] = max(1, given["shared"])
    given["biased"] = arguments.gives("up_bias", given["biased"]) and "down_bias" in arguments.taken
    inputs = moe.make_inputs("moe_experts", given, dtype=dtype, seed=draw(drawing.seeds()))
    if draw(st.booleans()) and draw(st.booleans()):  # one expert twice
        inputs["experts"][:, -1:] = inputs["experts"][:, :1]
    if given["activation"] == "clamped_gated":
        inputs |= {name: x for name, x in clamp.items() if name in arguments.taken}
    if arguments.gives("plan", draw(st.booleans())):
        inputs["plan"] = MoePlan(*moe.moe_plan(inputs["experts"], given["e"]))
    return arguments.kept(inputs)


def _refusable(inputs: Inputs) -> list[str]:
    """Also experts that are in another process."""
    elsewhere = (inputs["experts"] < 0) | (inputs["experts"] >= len(inputs["w_up"]))
    return ["experts that are not here"] * bool(elsewhere.any()) + empty(inputs)


OPS = {
    "moe_gate": Op(
        ops.moe_gate, moe.moe_gate, moe.CASES["moe_gate"], partial(moe.make_inputs, "moe_gate"), _gate,
        own=("x",), rows=lambda inputs: ("x",), judge=JudgeGate,
    ),
    "moe_route": Op(
        ops.moe_route, moe.moe_route, moe.CASES["moe_route"], partial(moe.make_inputs, "moe_route"), _route,
        own=("logits",), rows=lambda inputs: ("logits",), judge=JudgeRoute, dtypes=drawing.DTYPES,
    ),
    "moe_plan": Op(
        moe_plan, moe.moe_plan, moe.CASES["moe_plan"], partial(moe.make_inputs, "moe_plan"), _plan,
        judge=JudgePlan,
    ),
    "moe_experts": Op(
        ops.moe_experts, moe.moe_experts, moe.CASES["moe_experts"], partial(moe.make_inputs, "moe_experts"), _mixture,
        own=("x",), rows=lambda inputs: () if inputs.get("plan") else ("x", "weights", "experts"),
        refusable=_refusable,
    ),
}  # fmt: skip
