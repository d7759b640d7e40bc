"""Mamba-2's kernels: against the specification on every instruction set, dtype and layout; states; errors."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set, relative_errors
from twotower_kernels.reference import mamba2
from twotower_kernels.testing.budget import assert_within_budget, widened
from twotower_kernels.testing.cases import mamba2 as cases
from twotower_kernels.testing.cases.op import Judge
from twotower_kernels.testing.drawing import DTYPES

SMALL = [case for case in mamba2.CASES["mamba2_scan"] if not case.startswith("released")]
scan: Any = tt.mamba2_scan  # what it returns depends on its options


def check(op: str, inputs: dict[str, Any], *, layout: int = 0) -> None:
    judge = cases.JudgeScan if op == "mamba2_scan" else Judge
    assert_op_within_budget(getattr(tt, op), getattr(mamba2, op), inputs, layout=layout, judge=judge)


def sized(length: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> dict[str, Any]:
    """Inputs of two seeded rows with odd sizes."""
    case = dict(b=2, l=length, heads=6, head_dim=5, state=19, groups=2, seeded=True) | sizes
    return mamba2.make_inputs("mamba2_scan", case, dtype=dtype, seed=seed)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of another order of summation, measured against the largest entry."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    eps, size = torch.finfo(got.dtype).eps, float(expected.abs().max()) if expected.numel() else 0.0
    assert not got.numel() or float((got - expected).abs().max()) <= 32 * eps * size


# --- against the specification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SMALL)
def test_every_case_on_every_instruction_set(case: str, isa: str) -> None:
    for dtype in DTYPES:
        inputs = mamba2.make_inputs("mamba2_scan", case, dtype=dtype)
        with instruction_set(isa):
            for states in ({}, dict(return_states=True), dict(states_every=3), dict(states_every=16)):
                check("mamba2_scan", inputs | states)


@pytest.mark.parametrize("isa", ISAS)
def test_released_shape(isa: str) -> None:
    with instruction_set(isa):
        inputs = mamba2.make_inputs("mamba2_scan", "released", dtype=torch.bfloat16)
        check("mamba2_scan", inputs | dict(return_states=True))


@settings(max_examples=60)
@given(
    case=cases.sizes(),
    width=st.integers(1, 6),
    bias=st.booleans(),
    seeds=st.sampled_from(cases.SEEDS),
    ragged=st.booleans(),
    states=st.sampled_from([{}, *({"states_every": n} for n in (1, 4, 17, 99)), {"return_states": True}]),
    size=st.sampled_from([1e-3, 1.0, 1e5]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(  # type: ignore[no-untyped-def]
    case, width, bias, seeds, ragged, states, size, dtype, isa, layout, seed
):
    inputs = cases.seeded(case, width, bias, seeds, ragged, size, dtype, seed)
    with instruction_set(isa):
        check("mamba2_scan", inputs | states, layout=layout)


@settings(max_examples=40)
@given(
    inputs=st.sampled_from(DTYPES).flatmap(cases.norms),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
)
def test_gated_norm_of_any_shape(inputs, isa, layout):  # type: ignore[no-untyped-def]
    with instruction_set(isa):
        check("gated_rms_norm", inputs, layout=layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", list(mamba2.CASES["gated_rms_norm"]))
def test_every_gated_norm(case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            check("gated_rms_norm", mamba2.make_inputs("gated_rms_norm", case, dtype=dtype))


@pytest.mark.parametrize("shift", [-1e4, -40.0, 40.0, 1e4])
@pytest.mark.parametrize("log_a", [-50.0, -5.0, 5.0, 50.0])
def test_extreme_steps_and_decays(log_a: float, shift: float) -> None:
    """Steps that vanish or forget everything at once, decays that underflow, states far larger than the input."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = sized(19, dtype=dtype)
        inputs["dt"][:, ::3] += shift
        inputs["a_log"][::2] = log_a
        inputs["ssm_state"] *= 1e6
        check("mamba2_scan", inputs | dict(return_states=True))


def test_silu_of_any_size() -> None:
    """The vectorised exponential over its whole range; beyond it, SiLU is 0 or its argument."""
    z = torch.cat([torch.linspace(-110, 110, 20001), torch.tensor([-3e38, -1e9, -0.0, 0.0, 1e9])])
    ones = torch.ones_like(z)
    for isa in ISAS:
        with instruction_set(isa):
            got = tt.gated_rms_norm(ones, z, ones, n_groups=z.numel(), eps=1.0)  # u / sqrt(u² + 1), one to one in u
        u = z.double() / (1 + torch.exp(-z.double()))
        exact = u / (u.square() + 1).sqrt()
        error = (got.double() - exact).abs() / exact.abs().clamp_min(1e-37)
        assert float(error[z > -87].max()) < 4 * torch.finfo(torch.float32).eps
        assert float(got[z < -100].abs().max()) < 1e-37


def test_parameters_may_be_wider_than_activations() -> None:
    """As in the model: bfloat16 activations with float32 parameters and steps, states in either."""
    inputs = sized(20, dtype=torch.bfloat16)
    for name in ("conv_weight", "conv_bias", "dt", "a_log", "d", "dt_bias", "conv_state"):
        inputs[name] = inputs[name].float() * 1.01
    inputs["ssm_state"] = inputs["ssm_state"].bfloat16()
    check("mamba2_scan", inputs | dict(return_states=True))


def test_slices_of_a_projection() -> None:
    """In the model z, xbc and dt are slices of one tensor, and the weights are [C, 1, W]."""
    inputs = sized(33)
    channels, heads = inputs["xbc"].shape[2], inputs["dt"].shape[2]
    whole = torch.full((2, 33, 3 + channels + heads), math.nan)
    _, xbc, dt = whole.split([3, channels, heads], -1)
    xbc.copy_(inputs["xbc"])
    dt.copy_(inputs["dt"])
    got = scan(**inputs | dict(xbc=xbc, dt=dt, conv_weight=inputs["conv_weight"][:, None]), return_states=True)
    for a, b in zip(got, scan(**inputs, return_states=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 1.0)])
def test_the_scan_is_as_accurate_as_plain_float32(limit: tuple[float, float], seeded: bool) -> None:
    """On average over many inputs, where no budget for luck is needed."""
    case = dict(b=3, l=9, heads=4, head_dim=12, state=16, groups=2, limit=limit, seeded=seeded)

    def make(seed: int) -> dict[str, Any]:
        return mamba2.make_inputs("mamba2_scan", case, seed=seed) | dict(return_states=True)

    assert max(relative_errors(scan, mamba2.mamba2_scan, make, 100)) < 1.1


def test_the_gated_norm_is_as_accurate_as_plain_float32() -> None:
    for width in (48, 4096):

        def make(seed: int, width: int = width) -> dict[str, Any]:
            return mamba2.make_inputs("gated_rms_norm", dict(b=3, l=9, width=width, groups=2), seed=seed)

        assert max(relative_errors(tt.gated_rms_norm, mamba2.gated_rms_norm, make, 100 if width < 100 else 5)) < 1.1


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cut", [0, 1, 2, 16, 23, 40])
def test_two_pieces_are_one(cut: int, dtype: torch.dtype) -> None:
    inputs = sized(40, dtype=dtype, seed=cut)
    y, conv, ssm = scan(**inputs, return_states=True)
    pieces = []
    for part in (slice(0, cut), slice(cut, 40)):
        piece = inputs | dict(xbc=inputs["xbc"][:, part], dt=inputs["dt"][:, part])
        before, inputs["conv_state"], inputs["ssm_state"] = scan(**piece, return_states=True)
        pieces.append(before)
    close(torch.cat(pieces, 1), y)
    assert torch.equal(inputs["conv_state"], conv)
    close(inputs["ssm_state"], ssm)


@pytest.mark.parametrize("length", [0, 1, 37, 300])
@pytest.mark.parametrize("every", [1, 7, 16, 32, 400])
def test_states_of_blocks_are_those_of_prefixes(every: int, length: int) -> None:
    """Also beyond the 256 tokens that share scratch memory."""
    inputs = sized(length)
    y, conv, ssm = scan(**inputs, states_every=every)
    close(y, scan(**inputs))
    ends = [min(length, end) for end in range(every, length + every, every)]
    assert conv.shape[1] == ssm.shape[1] == len(ends)
    for n in {0, len(ends) // 2, len(ends) - 1} if ends else ():
        prefix = inputs | dict(xbc=inputs["xbc"][:, : ends[n]], dt=inputs["dt"][:, : ends[n]])
        _, conv_there, ssm_there = scan(**prefix, return_states=True)
        assert torch.equal(conv[:, n], conv_there)
        close(ssm[:, n], ssm_there)


@pytest.mark.parametrize("every", [0, 1, 5, 16])
@pytest.mark.parametrize("length", [21, 270])
def test_ragged_rows_are_each_alone(length: int, every: int) -> None:
    """Bit for bit, with NaN in what lies beyond a row's length; y is 0 there, and later blocks repeat the state."""
    lens = [0, 1, length, 17, length - 3]
    case = dict(b=5, l=length, heads=2, head_dim=4, state=6, groups=1, seeded=True, lens=lens)
    inputs = cases.hidden(mamba2.make_inputs("mamba2_scan", case), math.nan)
    y, *states = scan(**inputs, return_states=True, states_every=every)
    for row, own in enumerate(lens):
        alone = {k: inputs[k][row : row + 1] for k in ("xbc", "dt", "conv_state", "ssm_state")}
        alone |= dict(xbc=alone["xbc"][:, :own], dt=alone["dt"][:, :own], seq_lens=None)
        y_alone, *states_alone = scan(**inputs | alone, return_states=True, states_every=every)
        assert torch.equal(y[row, :own], y_alone[0]) and not y[row, own:].any()
        for got, expected in zip(states, states_alone, strict=True):
            count = expected.shape[1] if every else 0
            if every:
                assert torch.equal(got[row, :count], expected[0])
            final = scan(**inputs | alone, return_states=True)[1 if got is states[0] else 2][0]
            for later in got[row, count:] if every else [got[row]]:
                close(later, final)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_state_index_gathers_states(index_dtype: torch.dtype) -> None:
    """And never reads a state that no row names."""
    inputs = sized(20, b=5)
    index = torch.tensor([3, 0, 3, 3, 0], dtype=index_dtype)
    states = {k: inputs[k].clone() for k in ("conv_state", "ssm_state")}
    for state in states.values():
        state[[1, 2, 4]] = math.nan
    got = scan(**inputs | states | dict(state_index=index), return_states=True)
    gathered = {k: v[index.long()] for k, v in states.items()}
    for a, b in zip(got, scan(**inputs | gathered, return_states=True), strict=True):
        assert torch.equal(a, b)


def test_states_are_new_and_optional() -> None:
    """Asking for states changes no bit of a long row's y, and a short one's by rounding alone, which then goes token by
    token; an empty block hands its seeds through, as tensors of their own."""
    long = sized(65)
    assert torch.equal(scan(**long), scan(**long, return_states=True)[0])
    inputs = sized(18)
    close(scan(**inputs, return_states=True)[0], scan(**inputs))
    empty = inputs | dict(xbc=inputs["xbc"][:, :0], dt=inputs["dt"][:, :0])
    y, conv, ssm = scan(**empty, return_states=True)
    assert y.shape == (2, 0, 30)
    for got, seed in ((conv, inputs["conv_state"]), (ssm, inputs["ssm_state"])):
        assert torch.equal(got, seed) and got.data_ptr() != seed.data_ptr()


def test_nan_spoils_no_earlier_token_and_no_other_row() -> None:
    inputs = sized(40)
    clean = scan(**inputs)
    inputs["xbc"][1, 21] = math.nan
    got = scan(**inputs)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1, :21], clean[1, :21])
    assert got[1, 21:].isnan().all()


def test_states_do_not_pass_through_the_activations_dtype() -> None:
    """Where x and B are zero, states of thousands only decay, and that is exact to float32 in a bfloat16 model."""
    inputs = sized(40, dtype=torch.bfloat16)
    fed = slice(0, 6 * 5 + 2 * 19)  # the channels of x and B
    for silent in (inputs["xbc"][..., fed], inputs["conv_state"][:, fed], inputs["conv_bias"][fed]):
        silent.zero_()
    inputs["ssm_state"] *= 5e3
    inputs["dt_bias"] -= 4  # slow decay, so that the states last
    state = scan(**inputs, return_states=True)[2]
    exact = mamba2.mamba2_scan(**widened(inputs), return_states=True)[2]  # type: ignore[arg-type]
    assert_within_budget(state, exact.float(), exact, band=16)
    assert state.abs().max() > 1e3


def test_threads_change_no_bit() -> None:
    inputs = sized(70, b=3, heads=8, groups=4)
    alone = scan(**inputs, states_every=16)
    torch.set_num_threads(3)
    try:
        together = scan(**inputs, states_every=16)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# --- registration and errors ----------------------------------------------------------------------------------------


def permuted(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) and v.ndim > 1 else v
            for k, v in inputs.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("seeded", "layout", "states"),
    [
        (False, "contiguous", (False, 0)),
        (True, "permuted", (False, 0)),
        (True, "contiguous", (True, 0)),
        (True, "permuted", (False, 4)),
    ],
)
def test_registration_of_the_scan(seeded: bool, layout: str, states: tuple[bool, int]) -> None:
    case = mamba2.CASES["mamba2_scan"]["shared_state"] | dict(lens=[16, 0, 3, 9, 16])
    inputs = mamba2.make_inputs("mamba2_scan", case if seeded else "unseeded")
    inputs = permuted(inputs) if layout == "permuted" else inputs
    low, high = inputs.pop("time_step_limit")
    torch.library.opcheck(torch.ops.twotower.mamba2_scan.default, (*inputs.values(), low, high, *states))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_registration_of_the_norm(layout: str) -> None:
    inputs = mamba2.make_inputs("gated_rms_norm", "odd")
    inputs = permuted(inputs) if layout == "permuted" else inputs
    torch.library.opcheck(torch.ops.twotower.gated_rms_norm.default, tuple(inputs.values()))


def test_both_trace_into_one_graph() -> None:
    inputs = sized(18, lens=[18, 3])

    def mixer(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        y, conv, ssm = scan(**inputs, return_states=True)
        return tt.gated_rms_norm(y, y, torch.ones(30), n_groups=2, eps=1e-5), conv, ssm

    traced = torch.compile(mixer, fullgraph=True, backend="eager")(inputs)
    assert all(torch.equal(a, b) for a, b in zip(traced, mixer(inputs), strict=True))


BAD_SCAN: dict[str, tuple[dict[str, Any], str]] = {
    "two dimensions": (dict(xbc=torch.zeros(3, 4)), r"xbc: expected \[B, L, C\], got \[3, 4\]"),
    "steps of another length": (dict(dt=torch.zeros(4, 20, 2)), r"dt: expected \[B, L, heads\] for xbc \[4, 21, 16\]"),
    "channels that do not split": (dict(head_dim=8), "xbc: expected heads·head_dim .* got 16 with heads 2, head_dim 8"),
    "groups that do not divide": (dict(n_groups=4), "n_groups: expected a divisor of 2 heads, got 4"),
    "no groups": (dict(n_groups=0), "n_groups: expected 1 or more, got 0"),
    "empty heads": (dict(head_dim=0), "head_dim: expected 1 or more, got 0"),
    "short weight": (dict(conv_weight=torch.zeros(15, 4)), r"conv_weight: expected \[16, W\], got \[15, 4\]"),
    "no taps": (dict(conv_weight=torch.zeros(16, 0)), r"conv_weight: expected \[16, W\], got \[16, 0\]"),
    "short bias": (dict(conv_bias=torch.zeros(15)), r"conv_bias: expected shape \[16\], got \[15\]"),
    "decay per channel": (dict(a_log=torch.zeros(2, 4)), r"a_log: expected shape \[2\], got \[2, 4\]"),
    "skip per channel": (dict(d=torch.zeros(8)), r"d: expected shape \[2\]"),
    "short step bias": (dict(dt_bias=torch.zeros(1)), r"dt_bias: expected shape \[2\]"),
    "wide conv state": (dict(conv_state=torch.zeros(4, 16, 4)), r"conv_state: expected shape \[4, 16, 3\]"),
    "fewer conv states": (dict(conv_state=torch.zeros(3, 16, 3)), r"conv_state: expected .* got \[3, 16, 3\]"),
    "fewer ssm states": (dict(ssm_state=torch.zeros(3, 2, 4, 4)), r"ssm_state: expected shape \[4, 2, 4, 4\]"),
    "any number of them": (
        dict(ssm_state=torch.zeros(3, 2, 4), state_index=torch.zeros(4, dtype=torch.int32)),
        r"ssm_state: expected shape \[any, 2, 4, 4\]",
    ),
    "short index": (dict(state_index=torch.zeros(3, dtype=torch.long)), r"state_index: expected shape \[4\]"),
    "index beyond": (dict(state_index=torch.tensor([0, 1, 2, 4])), r"state_index: expected values in \[0, 3\], got 4"),
    "negative index": (dict(state_index=torch.tensor([0, 1, 2, -1])), "state_index: .* got -1"),
    "other lengths": (dict(seq_lens=torch.tensor([1])), r"seq_lens: expected shape \[4\], got \[1\]"),
    "length beyond": (dict(seq_lens=torch.tensor([0, 1, 22, 3])), r"seq_lens: expected values in \[0, 21\], got 22"),
    "negative length": (dict(seq_lens=torch.tensor([0, 1, -1, 3])), "seq_lens: .* got -1"),
    "negative blocks": (dict(states_every=-1), "states_every: expected 0 or more, got -1"),
    "another device": (dict(d=torch.zeros(2, device="meta")), "d: expected device cpu, got meta"),
}


@pytest.mark.parametrize("what", BAD_SCAN)
def test_a_bad_scan_is_explained(what: str) -> None:
    change, message = BAD_SCAN[what]
    with pytest.raises(ValueError, match=message):
        scan(**mamba2.make_inputs("mamba2_scan", "ragged") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(xbc=torch.zeros(4, 21, 16, dtype=torch.int32)), "xbc: expected float64.* got torch.int32"),
        (dict(seq_lens=torch.ones(4)), "seq_lens: expected int32 or int64, got torch.float32"),
        (dict(state_index=torch.ones(4, dtype=torch.bool)), "state_index: expected int32 or int64, got torch.bool"),
    ],
)
def test_a_wrong_dtype_is_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        scan(**mamba2.make_inputs("mamba2_scan", "ragged") | change)


Y, W = torch.zeros(3, 5, 21), torch.ones(21)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.gated_rms_norm(Y, Y[:1], W, n_groups=3, eps=1e-5), ValueError, "z: expected the shape of y"),
        (lambda: tt.gated_rms_norm(Y, Y, W[:20], n_groups=3, eps=1e-5), ValueError, r"weight: expected \[D\] .*20"),
        (lambda: tt.gated_rms_norm(Y, Y, W, n_groups=4, eps=1e-5), ValueError, "n_groups: expected a divisor of 21"),
        (lambda: tt.gated_rms_norm(Y, Y, W, n_groups=0, eps=1e-5), ValueError, "n_groups: .* got 0"),
        (lambda: tt.gated_rms_norm(Y.int(), Y, W, n_groups=3, eps=1e-5), TypeError, "y: expected float64"),
        (lambda: tt.gated_rms_norm(Y, Y.to("meta"), W, n_groups=3, eps=1e-5), ValueError, "z: expected device cpu"),
    ],
)
def test_a_bad_norm_is_explained(call, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
