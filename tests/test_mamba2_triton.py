"""Mamba-2's Triton kernels in the interpreter: the CPU kernels' demands, without float64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from reference import mamba2
from tests import test_mamba2_kernel as demands
from tests.compare import assert_within_budget
from tests.kernel_checks import relative_errors
from tests.test_mamba2_kernel import SMALL, check, scan, sized
from tests.triton_checks import DTYPES, triton_kernels
from twotower_kernels.triton import mamba2 as kernels


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with triton_kernels():
        yield


# --- against the specification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_every_case(case: str) -> None:
    for dtype in DTYPES:
        inputs = mamba2.make_inputs("mamba2_scan", case, dtype=dtype)
        for states in ({}, dict(return_states=True), dict(states_every=16)):
            check("mamba2_scan", inputs | states)


@settings(max_examples=25)
@given(
    b=st.integers(0, 2),
    length=st.integers(0, 40) | st.sampled_from([64, 65, 90]),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    head_dim=st.integers(1, 9) | st.sampled_from([33, 64]),
    state=st.integers(1, 35) | st.sampled_from([130]),
    width=st.integers(1, 6),
    bias=st.booleans(),
    seeds=st.sampled_from(["none", "conv", "ssm", "both", "shared"]),
    ragged=st.booleans(),
    states=st.sampled_from([{}, {}, *({"states_every": n} for n in (11, 17, 99)), {"return_states": True}]),
    size=st.sampled_from([1e-3, 1.0, 1e5]),
    dtype=st.sampled_from(DTYPES),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(  # type: ignore[no-untyped-def]
    b, length, heads, head_dim, state, width, bias, seeds, ragged, states, size, dtype, layout, seed
):
    heads, groups = heads
    case = dict(b=b, l=length, heads=heads, head_dim=head_dim, state=state, groups=groups, seeded=True)
    inputs = demands.drawn(case, width, bias, seeds, ragged, size, dtype, seed)
    check("mamba2_scan", inputs | states, layout=layout)


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_gated_norm_of_any_shape(shape, groups, size, scale, dtype, layout, seed):  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(seed)
    y, z = ((torch.randn(*shape, groups * size, generator=draw) * s).to(dtype) for s in (scale, 3.0))
    weight = torch.randn(groups * size, generator=draw)
    check("gated_rms_norm", dict(y=y, z=z, weight=weight, n_groups=groups, eps=1e-5), layout=layout)


@pytest.mark.parametrize("case", list(mamba2.CASES["gated_rms_norm"]))
def test_every_gated_norm(case: str) -> None:
    for dtype in DTYPES:
        check("gated_rms_norm", mamba2.make_inputs("gated_rms_norm", case, dtype=dtype))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("log_a", [-50.0, 5.0, 50.0])
def test_extreme_steps_and_decays(log_a: float, shift: float) -> None:
    demands.test_extreme_steps_and_decays(log_a, shift)


def test_the_scan_is_as_accurate_as_plain_float32() -> None:
    """On average over many inputs, where no budget for luck is needed."""
    case = dict(b=1, l=9, heads=2, head_dim=12, state=16, groups=1, seeded=True)

    def make(seed: int) -> dict[str, Any]:
        return mamba2.make_inputs("mamba2_scan", case, seed=seed) | dict(return_states=True)

    assert max(relative_errors(scan, mamba2.mamba2_scan, make, 20)) < 1.1


def test_parameters_may_be_wider_than_activations() -> None:
    demands.test_parameters_may_be_wider_than_activations()


def test_slices_of_a_projection() -> None:
    demands.test_slices_of_a_projection()


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 16, 23])
def test_two_pieces_are_one(cut: int) -> None:
    demands.test_two_pieces_are_one(cut, torch.float32)


@pytest.mark.parametrize(("every", "length"), [(1, 1), (7, 37), (16, 0), (70, 80), (400, 80)])
def test_states_of_blocks_are_those_of_prefixes(every: int, length: int) -> None:
    demands.test_states_of_blocks_are_those_of_prefixes(every, length)


@pytest.mark.parametrize("every", [0, 5, 16])
def test_ragged_rows_are_each_alone(every: int) -> None:
    demands.test_ragged_rows_are_each_alone(21, every)


def test_state_index_gathers_states() -> None:
    demands.test_state_index_gathers_states(torch.int32)


def test_states_are_new_and_optional() -> None:
    demands.test_states_are_new_and_optional()


def test_nan_spoils_no_earlier_token_and_no_other_row() -> None:
    demands.test_nan_spoils_no_earlier_token_and_no_other_row()


def test_states_do_not_pass_through_the_activations_dtype() -> None:
    demands.test_states_do_not_pass_through_the_activations_dtype()


def test_float64_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="mamba2_scan on cpu: xbc is float64"):
        scan(**sized(3, dtype=torch.float64))
