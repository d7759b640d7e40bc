"""Mamba-2's Triton kernels in the interpreter: the CPU kernels' demands, without float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.triton_checks import DTYPES, triton_kernels
from tests.kernels import test_mamba2_kernel as demands
from tests.kernels.kernel_checks import relative_errors
from tests.kernels.test_mamba2_kernel import SMALL, check, scan, sized
from twotower_kernels.reference import mamba2
from twotower_kernels.testing.budget import assert_within_budget, widened
from twotower_kernels.testing.cases.mamba2 import seeded
from twotower_kernels.triton import mamba2 as kernels


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with triton_kernels():
        yield


# --- against the specification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_every_case(case: str) -> None:
    wanted: list[dict[str, Any]] = [{}, dict(return_states=True), dict(states_every=16)]
    for dtype, states in zip(DTYPES, wanted, strict=True):  # other pairs of the two are drawn below
        check("mamba2_scan", mamba2.make_inputs("mamba2_scan", case, dtype=dtype) | states)


@settings(max_examples=5)
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
    inputs = seeded(case, width, bias, seeds, ragged, size, dtype, seed)
    check("mamba2_scan", inputs | states, layout=layout)


@settings(max_examples=12)
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


@pytest.mark.parametrize(("log_a", "shift"), [(-50.0, 1e4), (5.0, 1e4), (50.0, -1e4)])
def test_extreme_steps_and_decays(log_a: float, shift: float) -> None:
    demands.test_extreme_steps_and_decays(log_a, shift)


def test_the_scan_is_as_accurate_as_plain_float32() -> None:
    """On average over many inputs; exponentials and logarithms may be off by 2 ulp, NumPy's here as those of a GPU."""
    case = dict(b=1, l=9, heads=2, head_dim=12, state=16, groups=1, seeded=True)

    def make(seed: int) -> dict[str, Any]:
        return mamba2.make_inputs("mamba2_scan", case, seed=seed) | dict(return_states=True)

    assert max(relative_errors(scan, mamba2.mamba2_scan, make, 10)) < 1.5


def test_parameters_may_be_wider_than_activations() -> None:
    demands.test_parameters_may_be_wider_than_activations()


def test_slices_of_a_projection() -> None:
    demands.test_slices_of_a_projection()


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [23])
def test_two_pieces_are_one(cut: int) -> None:
    demands.test_two_pieces_are_one(cut, torch.float32)


@pytest.mark.parametrize(("every", "length"), [(1, 1), (7, 9), (16, 0), (70, 75)])
def test_states_of_blocks_are_those_of_prefixes(every: int, length: int) -> None:
    demands.test_states_of_blocks_are_those_of_prefixes(every, length)


@pytest.mark.parametrize("every", [0, 16])
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


def test_products_with_a_state_are_float32_in_a_bfloat16_model() -> None:
    """Inputs that convolution and SiLU leave as they are: what rounds is the state's arithmetic alone."""
    inputs = sized(20, b=1, heads=2, groups=1, head_dim=33, state=37, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    inputs["xbc"] = torch.randint(20, 128, inputs["xbc"].shape, generator=draw).bfloat16()
    inputs["conv_weight"] = torch.tensor([0.0, 0, 0, 1]).expand_as(inputs["conv_weight"]).bfloat16()
    inputs |= dict(conv_bias=None, dt=inputs["dt"].float())
    state = scan(**inputs, return_states=True)[2]
    exact: Any = mamba2.mamba2_scan(**widened(inputs), return_states=True)
    assert_within_budget(state, exact[2].float(), exact[2], band=8)


def test_long_sequences_go_by_in_runs_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose states are handed on without a bit lost."""
    inputs = sized(40, b=1, heads=2, groups=1)
    whole = scan(**inputs, states_every=10)
    monkeypatch.setattr(kernels, "SCRATCH", 3 * 2 * 5 * 19)
    for got, expected in zip(scan(**inputs, states_every=10), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of head_dim: how many heads there are, that is the batch, must not show."""
    inputs = sized(20, b=1, heads=1, groups=1, head_dim=40, dtype=dtype)
    expected = scan(**inputs)
    tuning = kernels.scan_tuning
    monkeypatch.setattr(kernels, "scan_tuning", lambda *sizes: replace(tuning(*sizes), block_p=64))
    assert torch.equal(scan(**inputs), expected)


def test_released_tiles() -> None:
    def released(heads: int, tokens: int = 16, arch: int = 90) -> kernels.Tuning:
        return kernels.scan_tuning(torch.bfloat16, tokens, heads, 64, 128, arch, 132)

    assert released(64) == kernels.Tuning(block_p=32, block_n=128, num_warps=8, num_stages=1)
    assert [released(heads).block_p for heads in (64, 128, 256)] == [32, 32, 64]
    assert released(4096, 64) == kernels.Tuning(block_p=64, block_n=32, num_warps=8, num_stages=1)
    assert released(4096, 64, 120) == kernels.Tuning(block_p=32, block_n=32, num_warps=8, num_stages=1)
    assert [kernels.chunk_tokens(n) for n in (0, 1, 16, 17, 64, 65, 4096)] == [16, 16, 16, 32, 64, 64, 64]


def test_indices_and_lengths_out_of_range_stay_within_bounds() -> None:
    """What a CPU refuses is taken for the nearest that there is."""
    inputs = sized(5, b=3, heads=1, groups=1)
    good = dict(state_index=torch.tensor([0, 1, 2]), seq_lens=torch.tensor([0, 3, 5]))
    bad = dict(state_index=torch.tensor([-7, 1, 99]), seq_lens=torch.tensor([-1, 3, 1000]))
    for got, expected in zip(
        scan(**inputs | bad, return_states=True), scan(**inputs | good, return_states=True), strict=True
    ):
        assert torch.equal(got, expected)


def test_float64_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="mamba2_scan on cpu: xbc is float64"):
        scan(**sized(3, dtype=torch.float64))
