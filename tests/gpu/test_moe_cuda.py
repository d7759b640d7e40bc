"""The router's CUDA C++ kernels, run on a host: the CPU kernels' demands, and what is peculiar to them."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch

import twotower_kernels as tt
from tests.kernels import test_moe_kernel as cpu_tests
from tests.kernels.kernel_checks import assert_op_within_budget
from tests.simt.overlay import cuda_kernels, simulated
from twotower_kernels.bench.checks.random_models import models
from twotower_kernels.cuda import build as cuda
from twotower_kernels.cuda import moe as cuda_moe
from twotower_kernels.reference import moe
from twotower_kernels.testing.drawing import DTYPES

PROPERTIES = (
    cpu_tests.test_gate_of_any_shape_layout_and_pair_of_dtypes,
    cpu_tests.test_gate_of_many_tokens,
    cpu_tests.test_ties_take_the_lowest_expert_and_group,
    cpu_tests.test_nan_and_infinity_are_ranked_as_torch_ranks_them,
    cpu_tests.test_only_scores_within_four_ulp_may_change_places,
    cpu_tests.test_float64_logits_are_honoured,
    cpu_tests.test_plan_of_any_experts,
)
MANY = dict(MANY_LOGITS=1, PLANNED_PAIRS=3)  # so that small cases are many tokens


@pytest.fixture(params=["few", "many"])
def tokens(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels for few tokens, or those for many."""
    with patch.dict(vars(cuda_moe), MANY if request.param == "many" else {}):
        yield request.param


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__.removeprefix("test_"))
def test_as_on_a_cpu(check) -> None:  # type: ignore[no-untyped-def]
    with cuda_kernels():
        check()


@pytest.mark.parametrize(
    "check",
    [
        cpu_tests.test_gate_of_any_shape_layout_and_pair_of_dtypes,
        cpu_tests.test_gate_of_many_tokens,
        cpu_tests.test_plan_of_any_experts,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_many_tokens_as_on_a_cpu(check) -> None:  # type: ignore[no-untyped-def]
    with cuda_kernels(), patch.dict(vars(cuda_moe), MANY):
        check()


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("case", moe.CASES["moe_gate"])
def test_every_gate(case: str, build: str, tokens: str) -> None:
    with cuda_kernels(build=build):
        for dtype in DTYPES if case not in ("prompt", "released") else [torch.bfloat16]:
            cpu_tests.assert_faithful(moe.make_inputs("moe_gate", case, dtype=dtype))


def test_a_token_alone_has_the_same_logits_bit_for_bit(tokens: str) -> None:
    """A block of four and one of two; 8 warps in two rounds, of which the second is not full. Or one block of 32."""
    inputs = moe.make_inputs("moe_gate", dict(n=6, e=5, h=2001), dtype=torch.bfloat16)
    with cuda_kernels():
        together = tt.moe_gate(**inputs)
        for n in range(6):
            alone = tt.moe_gate(inputs["x"][n : n + 1], inputs["gate_weight"])
            assert torch.equal(alone, together[n : n + 1])


def test_nan_stays_with_its_token_and_its_expert(tokens: str) -> None:
    inputs = moe.make_inputs("moe_gate", dict(n=35, e=38, h=40))
    with cuda_kernels():
        expected = tt.moe_gate(**inputs)
        inputs["x"][2, 39], inputs["gate_weight"][37, 0] = torch.nan, torch.nan
        expected[2], expected[:, 37] = torch.nan, torch.nan
        assert torch.equal(tt.moe_gate(**inputs).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_sums_of_one_sign_stay_faithful(dtype: torch.dtype, tokens: str) -> None:
    """Added one after the other, thousands of products of one sign would lose more than 4 roundings."""
    inputs = moe.make_inputs("moe_gate", dict(n=32, e=32, h=8000), dtype=dtype)
    with cuda_kernels():
        cpu_tests.assert_faithful({name: value.abs() for name, value in inputs.items()})


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("case", moe.CASES["moe_route"])
def test_every_routing_and_plan(case: str, build: str, tokens: str) -> None:
    with cuda_kernels(build=build):
        for dtype in (torch.float64, torch.float32):
            assert_op_within_budget(tt.moe_route, moe.moe_route, moe.make_inputs("moe_route", case, dtype=dtype))
        assert_op_within_budget(tt.moe_plan, moe.moe_plan, moe.make_inputs("moe_plan", case))


@pytest.mark.parametrize("case", moe.CASES["moe_route"])
def test_the_router_is_product_choice_and_plan(case: str) -> None:
    with cuda_kernels():
        cpu_tests.test_the_router_is_product_choice_and_plan(case)


def test_a_layer_takes_two_launches_for_its_routing() -> None:
    layer = models("E", torch.float32).ours.denoiser_tower.layers[0].mixer
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), cuda_kernels(), patch.object(cuda, "launch", wraps=cuda.launch) as launch:
        got = layer(x)
    names = [call.args[0].name for call in launch.call_args_list]
    assert names == ["moe_gate_kernel", "moe_route_plan_kernel"]
    torch.testing.assert_close(got, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n=64, e=128, top_k=6),  # the last bit of a mask
        dict(n=65, e=20, top_k=3),  # two launches, and a last block that is not full
        dict(n=3, e=1024, top_k=8, n_group=8, topk_group=4),  # two warps have room
        dict(n=2, e=96, top_k=40, n_group=48, topk_group=33),  # more choices and groups than lanes
    ],
)
def test_sizes_at_the_edges(sizes: dict) -> None:
    with cuda_kernels():
        for dtype in (torch.float64, torch.float32):
            assert_op_within_budget(tt.moe_route, moe.moe_route, moe.make_inputs("moe_route", sizes, dtype=dtype))


def test_plan_of_many_pairs() -> None:
    """Several rounds of every warp."""
    experts = torch.randint(0, 5, (1500, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with cuda_kernels():
        assert_op_within_budget(tt.moe_plan, moe.moe_plan, dict(experts=experts, num_experts=5))


@pytest.mark.parametrize("n", [3, 4096], ids=["one block", "several"])
@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1, 2**40, -(2**31)])
def test_experts_that_do_not_exist_are_left_out(bad: int, n: int) -> None:
    """The plan is that of the pairs that remain."""
    experts = torch.randint(0, 3, (n, 2), generator=torch.Generator().manual_seed(0))
    experts[1::2, 0] = bad
    with simulated():
        counts, offsets, pairs = cuda_moe.moe_plan(experts, 3)
    order = torch.sort(torch.where((experts >= 0) & (experts < 3), experts, 3).flatten(), stable=True)
    assert torch.equal(counts, order.values.bincount(minlength=4)[:3])
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert torch.equal(pairs[: offsets[-1]], order.indices[: offsets[-1]])


def launches_of(call: Callable[..., object], *arguments: object) -> list[tuple[str, int]]:
    """Names and blocks of what is launched; nothing runs."""
    with patch.object(cuda, "launch") as launch:
        call(*arguments)
    return [(call.args[0].name, call.args[1]) for call in launch.call_args_list]


def test_how_many_tokens_are_many() -> None:
    def gate(n: int, e: int = 128) -> list[tuple[str, int]]:
        return launches_of(cuda_moe.moe_gate, torch.empty(n, 8), torch.empty(e, 8))

    assert gate(511) == [("moe_gate_kernel", 128 * 32)] and gate(512) == [("moe_gate_tiled_kernel", 16 * 4)]
    assert gate(4095, 16)[0][0] == "moe_gate_kernel" and gate(65536) == [("moe_gate_tiled_kernel", 2048 * 4)]

    def plan(n: int, e: int = 128) -> list[tuple[str, int]]:
        return launches_of(cuda_moe.moe_plan, torch.empty(n, 4, dtype=torch.int32), e)

    def by(blocks: int) -> list[tuple[str, int]]:
        return [("moe_plan_count_kernel", blocks), ("moe_plan_kernel", blocks)]

    assert plan(2047) == [("moe_plan_kernel", 1)] and plan(2048) == by(2)
    assert plan(98304) == by(96) and plan(10**6) == by(128)
    assert plan(98304, 4096) == by(96) and plan(98304, 4097) == [("moe_plan_kernel", 1)]  # no room for the counts


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="moe_route on cuda: expected at most 1024 experts, got 1025"):
        cuda_moe.moe_route(torch.zeros(1, 1025), None, None, 1, False, 1, 1, True, 1.0, False)
    with pytest.raises(NotImplementedError, match="moe_plan on cuda: expected at most 6144 experts, got 6145"):
        cuda_moe.moe_plan(torch.zeros(1, 1, dtype=torch.int32), 6145)
