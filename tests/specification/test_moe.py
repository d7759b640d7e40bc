"""reference/moe.py: router, choice and plan, against loops over tokens, against others' routers, and itself."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

from tests.paths import GOLDEN
from twotower_kernels.bench.baselines.foreign import nemotron_h
from twotower_kernels.reference.moe import CASES, make_inputs, moe_experts, moe_gate, moe_plan, moe_route

OPS: dict[str, Any] = dict(moe_gate=moe_gate, moe_route=moe_route, moe_plan=moe_plan, moe_experts=moe_experts)
LOW = [torch.float32, torch.bfloat16, torch.float16]


def small(op: str) -> list[str]:
    return [case for case in CASES[op] if not case.startswith("released")]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the router's product ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("case", small("moe_gate"))
def test_gate_is_faithful_to_float64(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("moe_gate", case, dtype=dtype)
    rows, weights = inputs["x"].tolist(), inputs["gate_weight"].tolist()
    expected = [[math.fsum(a * b for a, b in zip(x, w, strict=True)) for w in weights] for x in rows]
    close(moe_gate(**inputs), torch.tensor(expected, dtype=torch.float64).reshape(len(rows), len(weights)))


# --- routing ----------------------------------------------------------------------------------------------------------


def route(inputs: dict) -> tuple[list[list[float]], list[list[int]]]:
    """One token at a time in Python's float64, with an explicit sort: score down, then expert up."""
    bias, groups, kept_groups = inputs["correction_bias"], inputs.get("n_group", 1), inputs.get("topk_group", 1)
    all_weights, all_experts = [], []
    for logits in inputs["logits"].tolist():
        if inputs.get("score", "sigmoid") == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v)) for v in logits]
        else:
            powers = [math.exp(v - max(logits)) for v in logits]
            scores = [p / math.fsum(powers) for p in powers]
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        candidates = list(range(len(choice)))
        if groups > 1:
            size = len(choice) // groups
            best_two = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
            kept = sorted(range(groups), key=lambda g: (-best_two[g], g))[:kept_groups]
            choice = [c if e // size in kept else 0.0 for e, c in enumerate(choice)]
            if inputs.get("dropped") == "-inf":
                candidates = [e for e in candidates if e // size in kept]
        experts = sorted(candidates, key=lambda e: (-choice[e], e))[: inputs["top_k"]]
        weights = [scores[e] for e in experts]
        if inputs.get("renormalize", True):
            weights = [w / (math.fsum(weights) + 1e-20) for w in weights]
        scale = inputs.get("per_expert_scale")
        factors = [1.0] * len(scores) if scale is None else scale.tolist()
        all_weights.append([w * inputs.get("scaling", 1.0) * factors[e] for w, e in zip(weights, experts, strict=True)])
        all_experts.append(experts)
    return all_weights, all_experts


def routes_as_defined(inputs: dict) -> None:
    weights, experts = moe_route(**inputs)
    expected_weights, expected_experts = route(inputs)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    assert weights.shape == experts.shape == (len(inputs["logits"]), inputs["top_k"])
    assert experts.tolist() == expected_experts
    expected = torch.tensor(expected_weights, dtype=torch.float64).reshape(weights.shape)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", small("moe_route"))
def test_routes_as_defined(case: str, seed: int) -> None:
    routes_as_defined(make_inputs("moe_route", case, dtype=torch.float64, seed=seed))


@st.composite
def routings(draw: st.DrawFn, values: list[float], biases: list[float], distinct: bool) -> dict:
    """Any sizes and options, logits and biases from the given values; `distinct`: all of a token's logits differ."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    e, n = groups * draw(st.integers(1, 6)), draw(st.integers(0, 4))
    row = st.lists(st.sampled_from(values), min_size=e, max_size=e, unique=distinct)
    logits = draw(st.lists(row, min_size=n, max_size=n))
    bias, scale = (draw(st.none() | st.lists(st.sampled_from(biases), min_size=e, max_size=e)) for _ in range(2))
    kept, dropped = draw(st.integers(1, groups)), draw(st.sampled_from(["zero", "-inf"]))
    return dict(
        logits=torch.tensor(logits, dtype=torch.float64).reshape(n, e),
        correction_bias=None if bias is None else torch.tensor(bias),
        top_k=draw(st.integers(1, e if dropped == "zero" else e // groups * kept)),
        n_group=groups,
        topk_group=kept,
        renormalize=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        dropped=dropped,
        per_expert_scale=None if scale is None else torch.tensor(scale),
    )


@settings(max_examples=60)
@given(inputs=routings([-800.0, 0.0, 50.0, 800.0], [-0.75, -0.5, 0.0, 0.25], distinct=False))
def test_ties_take_the_lowest_expert_and_group(inputs: dict) -> None:
    """Sigmoids of 0, ½ and 1 and biases of quarters: every score and sum is exact, and most are ties."""
    routes_as_defined(inputs)


spread = [(n + 0.3) / 100 for n in range(-500, 500)]  # far apart, and no two add up to 0, as their sigmoids would to 1


@settings(max_examples=60)
@given(inputs=routings(spread, [b / 7 for b in spread], distinct=True), score=st.sampled_from(["sigmoid", "softmax"]))
def test_routes_any_logits_as_defined(inputs: dict, score: str) -> None:
    routes_as_defined(inputs | dict(score=score))


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    bias = torch.tensor([9.0, 0.0, 0.0, 8.0])
    weights, experts = moe_route(logits, bias, top_k=2, renormalize=False)
    assert experts.tolist() == [[0, 3]]
    assert torch.equal(weights, logits[:, [0, 3]].sigmoid().float())


def test_a_dropped_group_scores_zero_and_may_be_chosen_before_a_negative_score() -> None:
    """Choices 1.25, -0.4 | 0.3, 0.3: the first group is kept, the second then counts as 0, 0."""
    logits, bias = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0.75, -0.9, -0.2, -0.2])
    weights, experts = moe_route(logits, bias, top_k=2, n_group=2, topk_group=1, renormalize=False)
    assert experts.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_a_dropped_group_that_is_excluded_cannot_be_chosen() -> None:
    """The same choices, and with the second of the first group at -inf: it still comes before the others."""
    logits, bias = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0.75, -0.9, -0.2, -0.2])
    for second in (-0.9, -math.inf):
        bias[1] = second
        _, experts = moe_route(logits, bias, top_k=2, n_group=2, topk_group=1, dropped="-inf")
        assert experts.tolist() == [[0, 1]] if second > -math.inf else [[2, 3]]


def test_the_softmax_is_of_all_experts() -> None:
    """Not of those in the groups that stay: without renormalization, the weights sum to less."""
    inputs = make_inputs("moe_route", "dropped_all_kept", dtype=torch.float64)
    weights, experts = moe_route(**inputs | {"renormalize": False})
    torch.testing.assert_close(weights.double(), inputs["logits"].softmax(1).gather(1, experts.long()))
    assert (weights.sum(1) < 0.9).all()


def test_a_softmax_of_the_chosen_alone_is_that_of_all_renormalized() -> None:
    """gpt-oss chooses by logits and takes the softmax of what it has chosen."""
    logits = normal(9, 12)
    weights, experts = moe_route(logits, top_k=4, score="softmax")
    chosen, theirs = logits.topk(4)
    assert torch.equal(experts.long(), theirs)
    torch.testing.assert_close(weights, chosen.softmax(1).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_narrow_logits_are_computed_in_float32(score: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("moe_route", "dropped") | {"score": score}
    narrow = inputs["logits"].to(dtype)
    for got, wide in zip(
        moe_route(**inputs | dict(logits=narrow)), moe_route(**inputs | dict(logits=narrow.float())), strict=True
    ):
        assert torch.equal(got, wide)


@settings(max_examples=40)
@given(n=st.integers(1, 5), e=st.integers(1, 20), data=st.data(), scaling=st.floats(0.1, 10))
def test_weights_sum_to_the_scaling(n: int, e: int, data: st.DataObject, scaling: float) -> None:
    """After renormalization, whatever was chosen; descending in the selection score; no expert twice."""
    top_k, bias = data.draw(st.integers(1, e)), normal(e)
    logits = normal(n, e, seed=1)
    weights, experts = moe_route(logits, bias, top_k=top_k, scaling=scaling)
    torch.testing.assert_close(weights.double().sum(1), torch.full((n,), scaling, dtype=torch.float64))
    choice = (logits.sigmoid() + bias).gather(1, experts.long())
    assert (choice.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == top_k for row in experts.tolist())
    unscaled = moe_route(logits, bias, top_k=top_k)[0]
    torch.testing.assert_close(weights, unscaled * scaling, rtol=1e-6, atol=0)


def test_scores_that_all_vanish_give_no_nan() -> None:
    weights, experts = moe_route(torch.full((2, 4), -1000.0).double(), top_k=2)
    assert torch.equal(weights, torch.zeros(2, 2)) and experts.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("case", small("moe_route"))
def test_float32_logits_choose_the_same_where_scores_are_apart(case: str) -> None:
    inputs = make_inputs("moe_route", case, dtype=torch.float32)
    narrow, wide = moe_route(**inputs), moe_route(**inputs | dict(logits=inputs["logits"].double()))
    scores = inputs["logits"].double().sigmoid()
    choice = scores if inputs["correction_bias"] is None else scores + inputs["correction_bias"]
    gaps = choice.sort(dim=1).values.diff(dim=1).flatten()
    assert not len(gaps) or gaps.min() > 4 * torch.finfo(torch.float32).eps
    assert torch.equal(narrow[1], wide[1])
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-6, atol=0)


def test_float64_logits_are_honoured() -> None:
    """Two experts that float32 cannot tell apart."""
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert moe_route(logits, top_k=1)[1].item() == 1
    assert moe_route(logits.float(), top_k=1)[1].item() == 0


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_transformers_router(n_group: int, topk_group: int, renormalize: bool) -> None:
    """The same experts and weights; it promises no order. It drops a group by -inf, not by 0."""
    config = nemotron_h.Config(
        hidden_size=24,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    router = nemotron_h.Router(config).requires_grad_(False)
    router.weight.copy_(normal(16, 24) / 5)
    router.e_score_correction_bias.copy_(normal(16) * 0.1 - 1)
    x = normal(200, 24, seed=1, dtype=torch.float32)
    _, their_weights, their_experts = router(x)
    weights, experts = moe_route(
        moe_gate(x, router.weight),
        router.e_score_correction_bias,
        top_k=3,
        n_group=n_group,
        topk_group=topk_group,
        renormalize=renormalize,
        scaling=2.5,
        dropped="-inf",
    )
    theirs, ours = (torch.zeros(200, 16) for _ in range(2))
    theirs.scatter_(1, their_experts, their_weights)
    ours.scatter_(1, experts.long(), weights)
    assert torch.equal(theirs != 0, ours != 0)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_gemmas_router() -> None:
    """transformers' router of Gemma 4 and DiffusionGemma: softmax, renormalized, then a factor for every expert."""
    config = SimpleNamespace(hidden_size=24, num_experts=16, top_k_experts=3, rms_norm_eps=1e-6)
    router = Gemma4TextRouter(config).requires_grad_(False)
    router.proj.weight.copy_(normal(16, 24))
    router.scale.copy_(normal(24, seed=1).abs())
    router.per_expert_scale.copy_(1 + 0.3 * normal(16, seed=2))
    x = normal(50, 24, seed=3, dtype=torch.float32)
    _, their_weights, their_experts = router(x)
    logits = router.proj(router.norm(x) * router.scale * 24**-0.5)
    weights, experts = moe_route(logits, top_k=3, score="softmax", per_expert_scale=router.per_expert_scale)
    assert torch.equal(experts.long(), their_experts)
    torch.testing.assert_close(weights, their_weights, rtol=2e-6, atol=0)


def test_lladas_recorded_router() -> None:
    """A call of LLaDA2-MoE's own router."""
    folder = GOLDEN / "systems" / "llada2_moe"
    config = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["config"]
    io = load_file(folder / "io.safetensors")
    weights, experts = moe_route(
        io["route.logits"],
        io["route.bias"],
        top_k=config["num_experts_per_tok"],
        n_group=config["n_group"],
        topk_group=config["topk_group"],
        renormalize=config["norm_topk_prob"],
        scaling=config["routed_scaling_factor"],
        dropped="-inf",
    )
    assert torch.equal(experts.long(), io["route.experts"])
    torch.testing.assert_close(weights, io["route.weights"], rtol=2e-6, atol=0)


# --- the plan ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data(), e=st.integers(1, 9), n=st.integers(0, 7), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_the_plan_sorts_pairs_by_expert_and_stably(data: st.DataObject, e: int, n: int, dtype: torch.dtype) -> None:
    top_k = data.draw(st.integers(1, e))
    rows = [data.draw(st.permutations(range(e)))[:top_k] for _ in range(n)]
    counts, offsets, pairs = moe_plan(torch.tensor(rows, dtype=dtype).reshape(n, top_k), e)
    flat = [expert for chosen in rows for expert in chosen]
    assert pairs.tolist() == sorted(range(n * top_k), key=lambda pair: (flat[pair], pair))
    assert counts.tolist() == [flat.count(expert) for expert in range(e)]
    assert offsets.tolist() == [sum(expert < bound for expert in flat) for bound in range(e + 1)]
    assert counts.dtype == offsets.dtype == pairs.dtype == torch.int64


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(-3, 7), min_size=2, max_size=2), max_size=6),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_experts_elsewhere_are_left_out_of_the_plan(rows: list[list[int]], dtype: torch.dtype) -> None:
    """Their pairs stand behind the last offset."""
    counts, offsets, pairs = moe_plan(torch.tensor(rows, dtype=dtype).reshape(-1, 2), 5)
    flat = [expert if 0 <= expert < 5 else 5 for chosen in rows for expert in chosen]
    assert pairs.tolist() == sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert counts.tolist() == [flat.count(expert) for expert in range(5)]
    assert offsets.tolist() == [sum(expert < bound for expert in flat) for bound in range(6)]


@pytest.mark.parametrize("case", small("moe_plan"))
def test_every_case_has_a_plan(case: str) -> None:
    inputs = make_inputs("moe_plan", case)
    plan = moe_plan(**inputs)
    assert plan.counts.sum() == plan.offsets[-1] == inputs["experts"].numel() == len(plan.pairs)
    for expert in range(inputs["num_experts"]):
        mine = plan.pairs[plan.offsets[expert] : plan.offsets[expert + 1]]
        assert (inputs["experts"].flatten()[mine] == expert).all() and (mine.diff() > 0).all()


def test_gradients_reach_the_gate_through_the_weights() -> None:
    """In float32, the weights' dtype, against the derivative of the definition in float64."""
    x, gate = normal(4, 6).requires_grad_(), normal(8, 6, seed=1).requires_grad_()
    weights, experts = moe_route(moe_gate(x, gate), normal(8, seed=2), top_k=3, scaling=2.5)
    direction = normal(4, 3, seed=3)
    got = torch.autograd.grad((weights.double() * direction).sum(), (x, gate))
    scores = (x @ gate.T).sigmoid().gather(1, experts.long())
    expected = torch.autograd.grad((2.5 * scores / scores.sum(1, keepdim=True) * direction).sum(), (x, gate))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------

PAIR, SHARED = r"w_up\[0\], w_down\[0\]: expected", "shared_up, shared_down: expected"
BAD: dict[str, tuple[str, dict, type[Exception], str]] = {
    "gate of another width": ("moe_gate", dict(gate_weight=torch.ones(12, 32)), ValueError, "x, gate_weight: expected"),
    "gate of three dimensions": ("moe_gate", dict(x=torch.ones(1, 5, 33)), ValueError, r"x, gate_weight: expected"),
    "integer logits": ("moe_route", dict(logits=torch.ones(5, 8).long()), TypeError, "logits: expected .*int64"),
    "one row of logits": ("moe_route", dict(logits=torch.ones(8)), ValueError, r"logits: expected \[N, E\]"),
    "an unknown score": ("moe_route", dict(score="tanh"), ValueError, "score: expected one of .* got 'tanh'"),
    "groups that do not divide": ("moe_route", dict(n_group=3), ValueError, "n_group, topk_group: expected a divisor"),
    "no groups": ("moe_route", dict(n_group=0), ValueError, "n_group"),
    "more groups than there are": ("moe_route", dict(n_group=2, topk_group=3), ValueError, "1..n_group, got 2 and 3"),
    "no group kept": ("moe_route", dict(n_group=2, topk_group=0), ValueError, "topk_group"),
    "more experts than there are": ("moe_route", dict(top_k=9), ValueError, r"top_k: expected 1..8 .*, got 9"),
    "no expert": ("moe_route", dict(top_k=0), ValueError, "top_k: expected 1..8"),
    "bias of another size": ("moe_route", dict(correction_bias=torch.ones(7)), ValueError, "correction_bias: expected"),
    "scale of another size": ("moe_route", dict(per_expert_scale=torch.ones(9)), ValueError, "per_expert_scale: exp"),
    "another way to drop": ("moe_route", dict(dropped="inf"), ValueError, "dropped: expected one of .* got 'inf'"),
    "fewer experts than asked for": (
        "moe_route",
        dict(top_k=5, n_group=4, topk_group=2, dropped="-inf"),
        ValueError,
        r"top_k: expected 1\.\.4, the experts of 2 of 4 groups, got 5",
    ),
    "real expert numbers": ("moe_plan", dict(experts=torch.ones(5, 2)), ValueError, "experts: expected integers"),
    "flat expert numbers": ("moe_plan", dict(experts=torch.ones(5).long()), ValueError, r"\[N, k\]"),
    "an unknown activation": ("moe_experts", dict(activation="relu"), ValueError, "activation: expected one of"),
    "half a shared expert": ("moe_experts", dict(shared_up=None), ValueError, "shared_up and shared_down: expected"),
    "another half": ("moe_experts", dict(shared_down=None), ValueError, "shared_up and shared_down: expected"),
    "fewer weights than tokens": ("moe_experts", dict(weights=torch.ones(16, 3)), ValueError, "x, weights, experts:"),
    "fewer choices than weights": ("moe_experts", dict(experts=torch.ones(17, 2).int()), ValueError, "experts:"),
    "x of three dimensions": ("moe_experts", dict(x=torch.ones(1, 17, 17)), ValueError, "x, weights, experts:"),
    "one matrix of another shape": ("moe_experts", dict(w_up=torch.ones(8, 12, 17)), ValueError, PAIR),
    "gate rows missing": ("moe_experts", dict(activation="silu_gated"), ValueError, PAIR),
    "down of another width": ("moe_experts", dict(w_down=torch.ones(8, 16, 11)), ValueError, PAIR),
    "fewer down than up": ("moe_experts", dict(w_down=torch.ones(7, 17, 11)), ValueError, "w_up, w_down: expected"),
    "a bias of another width": ("moe_experts", dict(up_bias=torch.ones(8, 12)), ValueError, "up_bias: expected"),
    "a bias for fewer": ("moe_experts", dict(down_bias=torch.ones(7, 17)), ValueError, "down_bias: expected"),
    "shared of another width": ("moe_experts", dict(shared_up=torch.ones(23, 16)), ValueError, SHARED),
    "shared halves that do not meet": ("moe_experts", dict(shared_down=torch.ones(17, 22)), ValueError, SHARED),
    "matrices of another dtype": ("moe_experts", dict(w_down=torch.ones(8, 17, 11).half()), TypeError, "float16"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_explained(what: str) -> None:
    op, change, error, message = BAD[what]
    case = {"moe_gate": "odd", "moe_route": "plain", "moe_plan": "plain", "moe_experts": "shared"}[op]
    with pytest.raises(error, match=message):
        OPS[op](**make_inputs(op, case) | change)
