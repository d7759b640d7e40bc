"""The experts' Triton kernels in the interpreter: the CPU kernels' demands."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.gpu.triton_checks import DTYPES, triton_kernels
from tests.kernels.kernel_checks import assert_op_within_budget
from tests.kernels.test_moe_experts_kernel import PLAN, SHARED, SMALL
from twotower_kernels.reference import moe
from twotower_kernels.triton import launch, moe_tuning
from twotower_kernels.triton import moe as kernels


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with triton_kernels():
        yield


def close_to_reference(sizes: dict | str, dtype: torch.dtype, seed: int = 0, layout: int = 0) -> None:
    inputs = moe.make_inputs("moe_experts", sizes, dtype=dtype, seed=seed)
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs, layout=layout)


# --- the experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_every_case(case: str) -> None:
    for dtype in DTYPES:
        close_to_reference(case, dtype)


@settings(max_examples=25)
@given(
    sizes=st.fixed_dictionaries(
        dict(
            n=st.integers(0, 9) | st.sampled_from([40, 70]),
            e=st.integers(1, 5),
            h=st.integers(1, 70) | st.sampled_from([64, 80, 131]),
            i=st.integers(1, 40) | st.sampled_from([64, 80, 131]),
            shared=st.integers(0, 20) | st.sampled_from([64, 80]),
            activation=st.sampled_from(moe.ACTIVATIONS),
            biased=st.booleans(),
            of=st.integers(5, 7),
        )
    ),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(sizes, data, dtype, layout, seed):  # type: ignore[no-untyped-def]
    sizes["top_k"] = data.draw(st.integers(1, min(sizes["e"], 3)))
    close_to_reference(sizes, dtype, seed, layout)


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("activation", ["relu2", "silu_gated"])
def test_every_tile(activation: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of less than a tile of pairs, and one of several with a partial one."""
    sizes = dict(n=150, e=3, top_k=1, h=80, i=160, shared=64, activation=activation)
    inputs = moe.make_inputs("moe_experts", sizes, dtype=torch.bfloat16)
    inputs["experts"][:] = torch.tensor([0] * 3 + [2] * 147).reshape(150, 1)[torch.randperm(150)]
    tuning = kernels.tuning
    assert tuning(torch.bfloat16, 128 * tokens, 128, False, True, 90).block_n == tokens
    monkeypatch.setattr(kernels, "tuning", lambda dtype, pairs, e, *rest: tuning(dtype, 128 * tokens, 128, *rest))
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_change_no_bit_of_exact_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers: whatever the order of adding, every sum is exact."""
    inputs = moe.make_inputs("moe_experts", dict(n=21, e=3, top_k=2, h=96, i=70, shared=33), dtype=dtype)
    whole = {name: inputs[name].sign() for name in ("x", "w_up", "w_down", "shared_up", "shared_down")}
    expected = tt.moe_experts(**inputs | whole)
    tile = kernels.tuning(dtype, 42, 3, False, True, 90)
    for other in (
        replace(tile, block_n=32),
        replace(tile, block_k=32),
        replace(tile, block_m=128),
        replace(tile, block_m=32),
    ):
        monkeypatch.setattr(kernels, "tuning", lambda *_, other=other: other)
        assert torch.equal(tt.moe_experts(**inputs | whole), expected)


@settings(max_examples=200)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=9), tokens=st.sampled_from([16, 32, 64, 128]))
def test_the_grid_has_room_for_every_tile(counts: list[int], tokens: int) -> None:
    needed = sum(-(-count // tokens) for count in counts)
    assert needed <= kernels._most_tiles(sum(counts), len(counts), tokens) <= sum(counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_is_bit_for_bit_the_same(dtype: torch.dtype) -> None:
    sizes = dict(n=9, e=3, top_k=2, h=150, i=37, shared=19, activation="silu_gated")
    inputs = moe.make_inputs("moe_experts", sizes, dtype=dtype)
    together = tt.moe_experts(**inputs)
    assert torch.equal(tt.moe_experts(**inputs), together)
    for n in range(0, 9, 2):
        one = {name: inputs[name][n : n + 1] for name in ("x", "weights", "experts")}
        assert torch.equal(tt.moe_experts(**inputs | one), together[n : n + 1])


def test_experts_that_no_token_chose_are_not_read() -> None:
    inputs = moe.make_inputs("moe_experts", "idle_experts")
    clean = tt.moe_experts(**inputs)
    idle = sorted(set(range(32)) - set(inputs["experts"].flatten().tolist()))
    inputs["w_up"][idle], inputs["w_down"][idle] = torch.nan, torch.nan
    assert torch.equal(tt.moe_experts(**inputs), clean)


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_nan_stays_in_its_row(activation: str) -> None:
    inputs = moe.make_inputs("moe_experts", dict(n=9, e=2, top_k=2, h=20, i=12, shared=5, activation=activation))
    clean = tt.moe_experts(**inputs)
    inputs["x"][3, 5] = torch.nan
    got = tt.moe_experts(**inputs)
    assert got[3].isnan().all()
    got[3] = clean[3]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_extreme_activations(activation: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-300.0, -100.0, -20.0, -1.0, -0.0, 0.0, 1.0, 20.0, 100.0, 150.0])[:, None].to(dtype)
    w_up = torch.ones(1, 1 if activation in moe.PLAIN else 2, 1, dtype=dtype)
    inputs = dict(x=x, w_up=w_up, w_down=w_up[:, :1], weights=torch.ones(10, 1), experts=torch.zeros(10, 1).int())
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs | dict(activation=activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_kept_and_rounded_to_nearest(dtype: torch.dtype) -> None:
    """As weights of the second product, with 1 in between: the output is the weights, special numbers included."""
    bits = torch.randint(-(2**15), 2**15, (300,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    numbers = torch.cat([bits.view(dtype), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)])
    w_up, w_down = torch.zeros(1, 1, 305, dtype=dtype), numbers.reshape(1, 305, 1)
    w_up[..., 0] = 1
    for weight in (1.0, 0.3, -0.7):
        weights = torch.full((1, 1), weight)
        got = tt.moe_experts(w_up[0].clone(), w_up, w_down, weights, torch.zeros(1, 1, dtype=torch.int32))[0]
        expected = (numbers.float() * weights[0, 0]).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_may_name_an_expert_twice_or_no_expert(dtype: torch.dtype) -> None:
    inputs = moe.make_inputs("moe_experts", "shared", dtype=dtype)
    inputs["experts"][:, 1] = inputs["experts"][:, 0]
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs)
    inputs |= dict(weights=inputs["weights"][:, :0], experts=inputs["experts"][:, :0])
    assert_op_within_budget(tt.moe_experts, moe.moe_experts, inputs)


def test_a_plan_and_wider_numbers_change_nothing() -> None:
    inputs = moe.make_inputs("moe_experts", "shared", dtype=torch.bfloat16)
    inputs["weights"] = inputs["weights"].bfloat16()
    plain = tt.moe_experts(**inputs)
    assert torch.equal(tt.moe_experts(**inputs, plan=tt.moe_plan(inputs["experts"], 8)), plain)
    assert torch.equal(tt.moe_experts(**inputs | dict(experts=inputs["experts"].long())), plain)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(tt.moe_experts(**inputs | dict(weights=inputs["weights"].to(dtype))), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_elsewhere_add_nothing(dtype: torch.dtype) -> None:
    """To the bit what a weight of 0 gives, also where nothing has been written for them; what their pairs are in the
    plan does not matter."""
    inputs = moe.make_inputs("moe_experts", "shared", dtype=dtype)
    zero = inputs["weights"].clone()
    zero[3, 1], zero[8] = 0, 0
    expected = tt.moe_experts(**inputs | dict(weights=zero))
    inputs["experts"][3, 1], inputs["experts"][8] = 8, torch.tensor([-1, 9, 2**31 - 1])
    empty = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor, *sizes: Any, **options: Any) -> torch.Tensor:
        new = empty(x, *sizes, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    with patch.object(torch.Tensor, "new_empty", poisoned):
        got = tt.moe_experts(**inputs)
        plan = tt.moe_plan(inputs["experts"], 8)
        plan.pairs[plan.offsets[-1] :] = -1
        assert torch.equal(tt.moe_experts(**inputs, plan=plan), got)
    assert torch.equal(got, expected)


def test_another_plan_reads_nothing_else() -> None:
    """A CPU refuses it."""
    plain = tt.moe_experts(**SHARED)
    for plan in (tt.MoePlan(PLAN[0], PLAN[1] * 2 - 9, PLAN[2]), tt.MoePlan(*PLAN[:2], (PLAN[2] - 25) * 10**6)):
        assert tt.moe_experts(**SHARED, plan=plan).shape == plain.shape


def test_float64_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="moe_experts on cpu: x is float64"):
        tt.moe_experts(**moe.make_inputs("moe_experts", "one", dtype=torch.float64))


def test_released_tiles() -> None:
    def released(tokens: int, arch: int = 90) -> kernels.Tuning:
        return kernels.tuning(torch.bfloat16, 6 * tokens, 128, False, True, arch)

    assert released(16) == kernels.Tuning(block_m=64, block_n=16, block_k=128, num_warps=4, num_stages=3)
    assert released(16, 120) == kernels.Tuning(block_m=64, block_n=16, block_k=64, num_warps=4, num_stages=4)
    assert [released(tokens).block_n for tokens in (1, 340, 342, 1024, 2048, 8192)] == [16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize("stream", moe_tuning.STREAMS)
@pytest.mark.parametrize("tokens", [16, 32])
def test_every_way_to_stream_weights(stream: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages and a part of one, along both inner dimensions, the shared expert's being longer."""
    monkeypatch.setattr(moe_tuning, "STREAM", stream)
    sizes = dict(n=tokens, e=2, top_k=2, h=416, i=400, shared=480)
    tile = kernels.tuning(torch.bfloat16, tokens * 2, 2, False, True, 90)
    assert (tile.block_k, tile.num_stages, tile.block_n) == (*moe_tuning.STREAMS[stream], tokens)
    close_to_reference(sizes, torch.bfloat16)


def test_three_programs_of_narrow_tiles_fit_a_processor() -> None:
    """227 KB of shared memory, of which every program takes 1 KB beside its own."""
    tile = kernels.tuning(torch.bfloat16, 96, 128, False, True, 90)
    stage = 2 * tile.block_k * (tile.block_m + tile.block_n)
    assert 227 * 1024 // (tile.num_stages * stage + 1024) == 3


def test_kernels_overlap_on_hopper_and_later_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, too, they do not: it has no kernel before."""
    monkeypatch.setattr(launch, "PDL", True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.overlaps(gpu, torch.bfloat16, 90) and kernels.overlaps(gpu, torch.float16, 120)
    assert not kernels.overlaps(gpu, torch.bfloat16, 80) and not kernels.overlaps(cpu, torch.bfloat16, 90)
    assert not kernels.overlaps(gpu, torch.float32, 90)
    close_to_reference(dict(n=16, e=2, top_k=2, h=64, i=64, shared=64), torch.bfloat16)
    monkeypatch.setattr(launch, "PDL", False)
    assert not kernels.overlaps(gpu, torch.bfloat16, 90)
    for arch, kinds in ((80, {False}), (90, {False, True}), (120, {False, True})):
        builds = list(kernels.builds(arch))
        for kernel in (kernels.up_kernel, kernels.down_kernel, kernels.combine_kernel):
            assert {build.constants["PDL"] for build in builds if build.kernel is kernel} == kinds
