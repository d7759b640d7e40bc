"""The router's kernels: product, choice and plan against the specification; registration; errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set
from twotower_kernels.bench.checks.operations import router_inputs
from twotower_kernels.ops.moe import moe_router
from twotower_kernels.reference import moe
from twotower_kernels.testing.budget import assert_gate_faithful
from twotower_kernels.testing.cases import moe as cases
from twotower_kernels.testing.drawing import DTYPES
from twotower_kernels.testing.layouts import awkward


def permuted(tensor: Tensor) -> Tensor:
    return awkward(tensor, 3)


# --- the router's product ---------------------------------------------------------------------------------------------


def assert_faithful(inputs: dict, layout: int = 0) -> None:
    assert_gate_faithful(tt.moe_gate(**{name: awkward(value, layout) for name, value in inputs.items()}), **inputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", moe.CASES["moe_gate"])
def test_gate_is_faithful_to_float64(case: str, isa: str) -> None:
    for dtype in DTYPES if case not in ("prompt", "released") else [torch.bfloat16]:
        with instruction_set(isa):
            assert_faithful(moe.make_inputs("moe_gate", case, dtype=dtype))


@settings(max_examples=60)
@given(
    sizes=cases.products(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_gate_of_any_shape_layout_and_pair_of_dtypes(sizes, dtypes, scale, isa, layout, seed):  # type: ignore[no-untyped-def]
    inputs = moe.make_inputs("moe_gate", sizes, dtype=dtypes[0], seed=seed)
    inputs["gate_weight"] = (inputs["gate_weight"] * scale).to(dtypes[1])
    with instruction_set(isa):
        assert_faithful(inputs, layout)


def test_gate_of_many_tokens() -> None:
    assert_faithful(moe.make_inputs("moe_gate", dict(n=300, e=9, h=20), dtype=torch.bfloat16))


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", moe.CASES["moe_route"])
def test_every_routing(case: str, isa: str) -> None:
    for dtype in (torch.float64, torch.float32):
        with instruction_set(isa):
            assert_op_within_budget(tt.moe_route, moe.moe_route, moe.make_inputs("moe_route", case, dtype=dtype))


@settings(max_examples=100)
@given(
    inputs=cases.routings(cases.TIED_LOGITS, cases.TIED_BIASES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
)
def test_ties_take_the_lowest_expert_and_group(inputs: dict, isa: str, layout: int) -> None:
    with instruction_set(isa):
        assert_op_within_budget(tt.moe_route, moe.moe_route, inputs, layout=layout)


@settings(max_examples=60)
@given(
    inputs=cases.routings([math.nan, math.inf, -math.inf, -800.0, 0.0, 0.5, 800.0], [0.0, 0.5, math.inf, -math.inf]),
    score=st.sampled_from(moe.SCORES),
    isa=st.sampled_from(EVERY_ISA),
)
def test_nan_and_infinity_are_ranked_as_torch_ranks_them(inputs: dict, score: str, isa: str) -> None:
    expected, experts = moe.moe_route(**inputs, score=score)
    with instruction_set(isa):
        got = tt.moe_route(**inputs, score=score)
    assert torch.equal(got[1], experts)
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=0, equal_nan=True)


@settings(max_examples=100)
@given(
    n=st.integers(1, 5),
    e=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    score=st.sampled_from(moe.SCORES),
    spread=st.sampled_from([1e-15, 1e-7, 1e-3, 1.0, 30.0]),
    biased=st.booleans(),
    isa=st.sampled_from(EVERY_ISA),
    seed=st.integers(0, 2**31),
)
def test_only_scores_within_four_ulp_may_change_places(n, e, data, dtype, score, spread, biased, isa, seed):  # type: ignore[no-untyped-def]
    """So the choice is that of float64 wherever neighbouring scores are further apart, however close they are."""
    top_k = data.draw(st.integers(1, e))
    generator = torch.Generator().manual_seed(seed)
    logits = (0.3 + spread * torch.randn(n, e, generator=generator, dtype=torch.float64)).to(dtype)
    bias = torch.rand(e, generator=generator) - 0.5 if biased else None
    wide = logits.double()
    scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)
    choice = scores if bias is None else scores + bias.double()
    _, truth = moe.moe_route(wide, bias, top_k=top_k, score=score)
    with instruction_set(isa):
        weights, experts = tt.moe_route(logits, bias, top_k=top_k, score=score)
    got, expected = choice.gather(1, experts.long()), choice.gather(1, truth.long())
    ulp = torch.finfo(dtype).eps * choice.abs().amax()
    assert ((got - expected).abs() <= 4 * ulp).all()
    assert all(len(set(row)) == top_k for row in experts.tolist())
    picked = scores.gather(1, experts.long())
    torch.testing.assert_close(weights.double(), picked / (picked.sum(1, keepdim=True) + 1e-20), rtol=3e-6, atol=1e-12)


def test_float64_logits_are_honoured() -> None:
    """Two experts that float32 cannot tell apart."""
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert tt.moe_route(logits, top_k=1)[1].item() == 1
    assert tt.moe_route(logits.float(), top_k=1)[1].item() == 0


# --- the plan ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    e=st.integers(1, 9),
    n=st.integers(0, 7),
    top_k=st.integers(0, 5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    elsewhere=st.integers(0, 3),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_plan_of_any_experts(e, n, top_k, dtype, elsewhere, isa, layout, seed):  # type: ignore[no-untyped-def]
    """Also of some that are not among those that are planned for: what stands behind the last offset is free."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(-elsewhere, e + elsewhere, (n, top_k), generator=generator, dtype=dtype)

    def planned(plan: tuple[Tensor, ...]) -> list[list[int]]:
        counts, offsets, pairs = plan
        return [counts.tolist(), offsets.tolist(), pairs[: offsets[-1]].tolist()]

    with instruction_set(isa):
        got = tt.moe_plan(awkward(experts, layout), e)
    assert planned(got) == planned(moe.moe_plan(experts, e))
    assert [x.shape for x in got] == [(e,), (e + 1,), (n * top_k,)] and {x.dtype for x in got} == {torch.int64}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", moe.CASES["moe_plan"])
def test_every_plan(case: str, isa: str) -> None:
    with instruction_set(isa):
        assert_op_within_budget(tt.moe_plan, moe.moe_plan, moe.make_inputs("moe_plan", case))


@pytest.mark.parametrize("case", moe.CASES["moe_route"])
def test_the_router_is_product_choice_and_plan(case: str) -> None:
    for dtype in DTYPES:
        inputs = router_inputs(case, dtype)
        weights, experts, plan = moe_router(**inputs)
        x, gate_weight = inputs.pop("x"), inputs.pop("gate_weight")
        alone = tt.moe_route(tt.moe_gate(x, gate_weight), **inputs)
        for got, expected in zip(
            (weights, experts, *plan), (*alone, *tt.moe_plan(experts, len(gate_weight))), strict=True
        ):
            assert torch.equal(got, expected)


# --- registration and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_registration(layout: str) -> None:
    lay = permuted if layout == "permuted" else lambda tensor: tensor
    gate = moe.make_inputs("moe_gate", "odd", dtype=torch.bfloat16)
    route = moe.make_inputs("moe_route", "grouped")
    options, scale = (4, False, 4, 2, True, 2.5, True), torch.rand(16)
    experts = lay(tt.moe_route(**route)[1])
    check = torch.library.opcheck
    check(torch.ops.twotower.moe_gate.default, (lay(gate["x"]), lay(gate["gate_weight"])))
    check(torch.ops.twotower.moe_route.default, (lay(route["logits"]), route["correction_bias"], scale, *options))
    check(torch.ops.twotower.moe_route.default, (lay(route["logits"]).bfloat16(), None, None, *options))
    check(torch.ops.twotower.moe_plan.default, (experts, 16))
    router = router_inputs("grouped", torch.bfloat16)
    factors = lay(router["x"]), lay(router["gate_weight"])
    check(torch.ops.twotower.moe_router.default, (*factors, router["correction_bias"], scale, *options))
    check(torch.ops.twotower.moe_router.default, (*factors, None, None, *options))


X, W, L, I = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 6), torch.zeros(2, 2, dtype=torch.int32)  # noqa: E741


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.moe_gate(X[0], W), ValueError, r"x: expected \[N, H\], got \[4\]"),
        (lambda: tt.moe_gate(X, W[:, 1:]), ValueError, r"gate_weight: expected \[E, 4\], got \[3, 3\]"),
        (lambda: tt.moe_gate(X, W[0]), ValueError, r"gate_weight: expected \[E, 4\], got \[4\]"),
        (lambda: tt.moe_gate(X.int(), W), TypeError, "x: expected float64.* got torch.int32"),
        (lambda: tt.moe_gate(X, W.long()), TypeError, "gate_weight: expected float64.* got torch.int64"),
        (lambda: tt.moe_gate(X, W.to("meta")), ValueError, "gate_weight: expected device cpu, got meta"),
        (lambda: tt.moe_route(L[0], top_k=1), ValueError, r"logits: expected \[N, E\], got \[6\]"),
        (lambda: tt.moe_route(L.int(), top_k=1), TypeError, "logits: expected float64, float32.*, got torch.int32"),
        (lambda: tt.moe_route(L, top_k=1, score="tanh"), ValueError, "score: expected one of .* got 'tanh'"),
        (lambda: tt.moe_route(L, top_k=0), ValueError, "top_k: expected 1..6 for 6 experts, got 0"),
        (lambda: tt.moe_route(L, top_k=7), ValueError, "top_k: expected 1..6 for 6 experts, got 7"),
        (lambda: tt.moe_route(L, top_k=1, n_group=4), ValueError, "n_group: expected a divisor of 6 experts, got 4"),
        (lambda: tt.moe_route(L, top_k=1, n_group=0), ValueError, "n_group: expected a divisor of 6 experts, got 0"),
        (lambda: tt.moe_route(L, top_k=1, n_group=2, topk_group=3), ValueError, "topk_group: expected 1..2 .* got 3"),
        (lambda: tt.moe_route(L, top_k=1, topk_group=0), ValueError, "topk_group: expected 1..1 .* got 0"),
        (lambda: tt.moe_route(L, L[0, 1:], top_k=1), ValueError, r"correction_bias: expected shape \[6\], got \[5\]"),
        (lambda: tt.moe_route(L, L[0].int(), top_k=1), TypeError, "correction_bias: expected float64"),
        (lambda: tt.moe_route(L, L[0].to("meta"), top_k=1), ValueError, "correction_bias: expected device cpu"),
        (lambda: tt.moe_route(L, top_k=1, dropped="none"), ValueError, "dropped: expected one of .* got 'none'"),
        (
            lambda: tt.moe_route(L, top_k=3, n_group=3, dropped="-inf"),
            ValueError,
            r"top_k: expected 1\.\.2, the experts of 1 of 3 groups, got 3",
        ),
        (lambda: tt.moe_route(L, top_k=1, per_expert_scale=L), ValueError, r"per_expert_scale: expected shape \[6\]"),
        (lambda: tt.moe_route(L, top_k=1, per_expert_scale=L[0].int()), TypeError, "per_expert_scale: expected float"),
        (lambda: moe_router(X, W[0], top_k=1), ValueError, r"gate_weight: expected \[E, 4\], got \[4\]"),
        (lambda: moe_router(X.int(), W, top_k=1), TypeError, "x: expected float64.* got torch.int32"),
        (lambda: moe_router(X, W, top_k=4), ValueError, "top_k: expected 1..3 for 3 experts, got 4"),
        (lambda: moe_router(X, W, W[0].to("meta"), top_k=1), ValueError, r"correction_bias: expected shape \[3\]"),
        (lambda: moe_router(X, W, W[:, 0].to("meta"), top_k=1), ValueError, "correction_bias: expected device cpu"),
        (lambda: tt.moe_plan(I[0], 3), ValueError, r"experts: expected \[N, k\], got \[2\]"),
        (lambda: tt.moe_plan(I.float(), 3), TypeError, "experts: expected int32 or int64, got torch.float32"),
        (lambda: tt.moe_plan(I, -1), ValueError, "num_experts: expected 0 or more, got -1"),
    ],
)
def test_bad_input_is_named(call, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
