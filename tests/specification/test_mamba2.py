"""reference/mamba2.py against its recurrence token by token, against other programs, and against itself."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.specification.mamba2_oracle import recurrence
from twotower_kernels.bench.baselines.foreign import mamba_ssm, nemotron_h
from twotower_kernels.reference.mamba2 import CASES, gated_rms_norm, make_inputs, mamba2_scan
from twotower_kernels.testing.budget import assert_within_budget, widened

SMALL = [case for case in CASES["mamba2_scan"] if not case.startswith("released")]
NORMS = [case for case in CASES["gated_rms_norm"] if not case.startswith("released")]
LOW = [torch.float32, torch.bfloat16, torch.float16]
STATES = ("y", "conv", "ssm")
scan: Any = mamba2_scan  # what it returns depends on its options


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to the last digits of float64, measured against the largest entry."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    size = float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * max(size, 1))


def all_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        close(a, b)


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_equals_the_recurrence(case: str) -> None:
    inputs = make_inputs("mamba2_scan", case, dtype=torch.float64)
    got = scan(**inputs, return_states=True)
    all_close(got, recurrence(inputs))
    assert torch.equal(scan(**inputs), got[0])


@pytest.mark.parametrize("every", [1, 3, 16, 100])
@pytest.mark.parametrize("case", SMALL)
def test_states_after_every_block_equal_the_recurrence(case: str, every: int) -> None:
    inputs = make_inputs("mamba2_scan", case, dtype=torch.float64, seed=1)
    all_close(scan(**inputs, states_every=every), recurrence(inputs, every))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", SMALL)
def test_low_precision_stays_within_the_budget(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("mamba2_scan", case, dtype=dtype, seed=2)
    got = scan(**inputs, return_states=True)
    assert [m.dtype for m in got] == [dtype, dtype, torch.float32]
    for name, *results in zip(STATES, got, recurrence(inputs, dtype=dtype), recurrence(widened(inputs)), strict=True):
        # A float32 state is made of activations that were rounded to their dtype: that is its rounding band.
        band = 2 * torch.finfo(dtype).eps / torch.finfo(results[0].dtype).eps
        assert_within_budget(*results, band=band, what=f"{name} of {case}")


@pytest.mark.parametrize("dtype", LOW)
def test_states_do_not_pass_through_the_activations_dtype(dtype: torch.dtype) -> None:
    """Seeded states reach 1e3 and more. Where x and B are zero they only decay, and that is exact to float32."""
    inputs = make_inputs("mamba2_scan", "long", dtype=dtype, seed=3)
    fed = slice(0, 4 * 8 + 8)  # the channels of x and B
    for silent in (inputs["xbc"][..., fed], inputs["conv_state"][:, fed], inputs["conv_bias"][fed]):
        silent.zero_()
    inputs["ssm_state"] = inputs["ssm_state"] * 5e3
    inputs["dt_bias"] = inputs["dt_bias"] - 4  # slow decay, so that the states last
    got, naive = scan(**inputs, return_states=True), recurrence(inputs, dtype=dtype)
    for name, *results in zip(STATES, got, naive, recurrence(widened(inputs)), strict=True):
        assert_within_budget(*results, what=name)
    assert got[2].abs().max() > 1e3


def test_the_convolution_and_its_silu_both_round() -> None:
    """Without steps and states y is D·u, here u itself: what the activations' dtype leaves of the convolution."""
    inputs = make_inputs("mamba2_scan", "unseeded", dtype=torch.bfloat16)
    inputs["conv_weight"][:, :-1] = 0  # one product and one sum per channel
    inputs |= dict(dt=torch.full_like(inputs["dt"], -math.inf), d=torch.ones(4))
    exact = inputs["xbc"].float() * inputs["conv_weight"][:, -1].float() + inputs["conv_bias"].float()
    once, twice = F.silu(exact).bfloat16(), F.silu(exact.bfloat16())
    assert torch.equal(scan(**inputs), twice[..., : 4 * 8])
    assert not torch.equal(once, twice)


@pytest.mark.parametrize("case", NORMS)
def test_gated_norm_equals_its_definition(case: str) -> None:
    inputs = make_inputs("gated_rms_norm", case, dtype=torch.float64)
    groups, width = inputs["n_groups"], inputs["weight"].numel()
    size = width // groups
    expected = torch.empty_like(inputs["y"])
    for row, y, z in zip(expected.flatten(0, 1), inputs["y"].flatten(0, 1), inputs["z"].flatten(0, 1), strict=True):
        u = [a * b / (1 + math.exp(-b)) for a, b in zip(y.tolist(), z.tolist(), strict=True)]
        for channel in range(width):
            group = u[channel // size * size :][:size]
            square = math.fsum(value**2 for value in group) / size
            row[channel] = u[channel] / math.sqrt(square + inputs["eps"]) * float(inputs["weight"][channel])
    close(gated_rms_norm(**inputs), expected)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", NORMS)
def test_gated_norm_in_low_precision_stays_within_the_budget(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("gated_rms_norm", case, dtype=dtype, seed=1)
    gated = (inputs["y"] * F.silu(inputs["z"])).unflatten(-1, (inputs["n_groups"], -1))
    naive = F.rms_norm(gated, gated.shape[-1:], eps=inputs["eps"]).flatten(-2) * inputs["weight"]
    assert_within_budget(gated_rms_norm(**inputs), naive, gated_rms_norm(**widened(inputs)), what=case)


# --- other programs ---------------------------------------------------------------------------------------------------


def parts(inputs: dict) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, B, C after transformers' convolution, Δ, and A: what the scans of others take. Without seed only."""
    heads, head_dim, groups = inputs["dt"].shape[-1], inputs["head_dim"], inputs["n_groups"]
    u = nemotron_h.conv(inputs["xbc"].transpose(1, 2), inputs["conv_weight"], inputs["conv_bias"], "silu")
    x, b, c = u.transpose(1, 2).split([heads * head_dim, *[(u.shape[1] - heads * head_dim) // 2] * 2], -1)
    delta = F.softplus(inputs["dt"] + inputs["dt_bias"])
    unflat = x.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))
    return *unflat, delta, -inputs["a_log"].exp()


def sized(length: int, seeded: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    case = dict(b=3, l=length, heads=6, head_dim=5, state=7, groups=2, seeded=seeded)
    return make_inputs("mamba2_scan", case, dtype=dtype, seed=seed)


@pytest.mark.parametrize("seeded", [False, True])
def test_decoding_as_mamba_ssm_and_transformers_do(seeded: bool) -> None:
    """transformers' one-token convolution and mamba_ssm's one-token state update, in float64, states included."""
    inputs = sized(21, seeded)
    batch, length, channels = inputs["xbc"].shape
    heads, head_dim, groups, n = 6, 5, 2, 7
    conv, ssm = torch.zeros(batch, channels, 3).double(), torch.zeros(batch, heads, head_dim, n).double()
    if seeded:
        conv, ssm = inputs["conv_state"].clone(), inputs["ssm_state"].clone()
    a = -inputs["a_log"].exp()[:, None, None].expand(heads, head_dim, n)
    d, dt_bias = (inputs[name][:, None].expand(heads, head_dim) for name in ("d", "dt_bias"))
    ys = []
    for t in range(length):
        column = inputs["xbc"][:, t, :, None]
        u = nemotron_h.conv_update(column, conv, inputs["conv_weight"], inputs["conv_bias"], "silu")[..., 0]
        x, b, c = u.split([heads * head_dim, groups * n, groups * n], -1)
        x, b, c = x.reshape(batch, heads, -1), b.reshape(batch, groups, -1), c.reshape(batch, groups, -1)
        dt = inputs["dt"][:, t, :, None].expand(batch, heads, head_dim)
        y = mamba_ssm.selective_state_update(ssm, x, dt, a, b, c, d, dt_bias=dt_bias, dt_softplus=True)
        ys.append(y.flatten(1))
    all_close(scan(**inputs, return_states=True), (torch.stack(ys, 1), conv, ssm))


def test_the_paper_s_listing() -> None:
    """mamba_ssm's copy of Listing 1 of arXiv 2405.21060, seeded with a state, in float64."""
    inputs = sized(24)
    x, b, c, delta, a = parts(inputs)
    b, c = b.repeat_interleave(3, 2), c.repeat_interleave(3, 2)
    seed = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, last = mamba_ssm.ssd_minimal(x * delta[..., None], delta * a, b, c, 8, initial_states=seed[:, None])
    inputs |= dict(ssm_state=seed)
    got_y, _, got_last = scan(**inputs, return_states=True)
    close(got_y, (y + inputs["d"][:, None] * x).flatten(2))
    close(got_last, last)


def test_mamba_ssm_s_chunked_and_selective_scans() -> None:
    """Both compute in float32 at least in part, so that they are yardsticks here, and float64 the truth."""
    inputs = sized(32, dtype=torch.float32)
    x, b, c, delta, a = parts(inputs)
    exact = recurrence(widened(inputs))
    got = scan(**inputs, return_states=True)
    chunked = mamba_ssm.chunk_scan(
        x, inputs["dt"], a, b, c, 16, D=inputs["d"], dt_bias=inputs["dt_bias"], dt_softplus=True
    )
    assert_within_budget(got[0], chunked.flatten(2), exact[0], what="y, chunked")

    def channels_first(m: Tensor) -> Tensor:  # one A, Δ and D per channel, as in Mamba-1
        return m.repeat_interleave(5, -1).transpose(1, 2)

    selective, last = mamba_ssm.selective_scan(
        x.flatten(2).transpose(1, 2),
        channels_first(delta),
        a.repeat_interleave(5)[:, None].expand(-1, 7),
        b.permute(0, 2, 3, 1),
        c.permute(0, 2, 3, 1),
        inputs["d"].repeat_interleave(5),
        return_last_state=True,
    )
    assert_within_budget(got[0], selective.transpose(1, 2), exact[0], what="y, selective")
    assert_within_budget(got[2], last.unflatten(1, (6, 5)), exact[2], what="state, selective")


@pytest.mark.parametrize("case", NORMS)
def test_the_gated_norms_of_others(case: str) -> None:
    inputs = make_inputs("gated_rms_norm", case, dtype=torch.float64)
    inputs["weight"] = inputs["weight"].float().double()  # theirs rounds the weight to float32
    size = inputs["weight"].numel() // inputs["n_groups"]
    y, z, weight = inputs["y"], inputs["z"], inputs["weight"]
    options = dict(z=z, eps=inputs["eps"], group_size=size, norm_before_gate=False, upcast=False)
    close(gated_rms_norm(**inputs), mamba_ssm.rms_norm(y, weight, None, **options))
    module = nemotron_h.GatedNorm(weight.numel(), size, eps=inputs["eps"]).requires_grad_(False)
    module.weight.copy_(weight)
    inputs |= dict(y=y.float(), z=z.float(), weight=weight.float())
    assert_within_budget(
        gated_rms_norm(**inputs), module(y.float(), z.float()), gated_rms_norm(**widened(inputs)), what=case
    )
    if case == "odd":  # norm before gate is another function
        assert not torch.allclose(
            gated_rms_norm(**inputs),
            mamba_ssm.rms_norm(y, weight, None, **options | dict(norm_before_gate=True)).float(),
            atol=1e-2,
        )


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def scans(draw: st.DrawFn) -> dict:
    groups = draw(st.integers(1, 2))
    sizes = dict(b=draw(st.integers(1, 3)), l=draw(st.integers(0, 40)), heads=groups * draw(st.integers(1, 2)))
    sizes |= dict(groups=groups, head_dim=draw(st.integers(1, 3)), state=draw(st.integers(1, 3)))
    inputs = make_inputs("mamba2_scan", sizes | dict(seeded=draw(st.booleans())), dtype=torch.float64)
    return inputs | dict(time_step_limit=draw(st.sampled_from([(0.0, math.inf), (0.05, 0.2)])))


def cut(inputs: dict, start: int, end: int) -> dict:
    """Tokens start..end of every row."""
    return inputs | dict(xbc=inputs["xbc"][:, start:end], dt=inputs["dt"][:, start:end])


def row(inputs: dict, b: int, length: int) -> dict:
    """Row b alone, its first `length` tokens."""
    one = dict(xbc=inputs["xbc"][b : b + 1, :length], dt=inputs["dt"][b : b + 1, :length])
    states = {k: None if inputs[k] is None else inputs[k][b : b + 1] for k in ("conv_state", "ssm_state")}
    return inputs | one | states


@settings(max_examples=40)
@given(inputs=scans(), where=st.floats(0, 1))
def test_two_pieces_are_one_scan(inputs: dict, where: float) -> None:
    length = inputs["xbc"].shape[1]
    middle = round(where * length)
    first, conv, ssm = scan(**cut(inputs, 0, middle), return_states=True)
    seeded = cut(inputs, middle, length) | dict(conv_state=conv, ssm_state=ssm)
    second, *states = scan(**seeded, return_states=True)
    all_close((torch.cat([first, second], 1), *states), scan(**inputs, return_states=True))


@settings(max_examples=40)
@given(inputs=scans(), every=st.integers(1, 50))
def test_states_after_every_block_are_states_of_prefixes(inputs: dict, every: int) -> None:
    length = inputs["xbc"].shape[1]
    y, conv, ssm = scan(**inputs, states_every=every)
    close(y, scan(**inputs))
    assert conv.shape[1] == ssm.shape[1] == math.ceil(length / every)
    for n in range(conv.shape[1]):
        prefix = cut(inputs, 0, min(length, (n + 1) * every))
        all_close((conv[:, n], ssm[:, n]), scan(**prefix, return_states=True)[1:])


@settings(max_examples=40)
@given(inputs=scans(), data=st.data(), every=st.integers(0, 9))
def test_a_ragged_batch_is_each_row_alone(inputs: dict, data: st.DataObject, every: int) -> None:
    """Whatever stands beyond a row's length, NaN for instance, reaches neither y nor the states."""
    batch, length = inputs["xbc"].shape[:2]
    lens = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    for b in range(batch):
        inputs["xbc"][b, lens[b] :] = math.nan
        inputs["dt"][b, lens[b] :] = math.nan
    inputs["seq_lens"] = torch.tensor(lens)
    y, conv, ssm = scan(**inputs, return_states=True, states_every=every)
    for b in range(batch):
        alone = row(inputs, b, lens[b]) | dict(seq_lens=None)
        y_alone, conv_alone, ssm_alone = scan(**alone, return_states=True, states_every=every)
        close(y[b : b + 1, : lens[b]], y_alone)
        assert torch.equal(y[b, lens[b] :], torch.zeros_like(y[b, lens[b] :]))
        if every:  # blocks that begin beyond the row's length repeat its last state
            blocks = conv_alone.shape[1]
            all_close((conv[b : b + 1, :blocks], ssm[b : b + 1, :blocks]), (conv_alone, ssm_alone))
            conv, ssm = conv[:, blocks:], ssm[:, blocks:]
            _, conv_alone, ssm_alone = scan(**alone, return_states=True)
            for n in range(conv.shape[1]):
                all_close((conv[b : b + 1, n], ssm[b : b + 1, n]), (conv_alone, ssm_alone))
        else:
            all_close((conv[b : b + 1], ssm[b : b + 1]), (conv_alone, ssm_alone))
        y, conv, ssm = scan(**inputs, return_states=True, states_every=every)


@settings(max_examples=25)
@given(index=st.lists(st.integers(0, 3), min_size=1, max_size=5), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_state_index_gathers_states(index: list[int], dtype: torch.dtype) -> None:
    inputs = make_inputs("mamba2_scan", "seeded", dtype=torch.float64)
    many = make_inputs("mamba2_scan", dict(CASES["mamba2_scan"]["seeded"], b=4), dtype=torch.float64)
    inputs |= {k: inputs[k][:1].expand(len(index), -1, -1) for k in ("xbc", "dt")}
    states = {k: many[k] for k in ("conv_state", "ssm_state")}
    gathered = {k: v[index] for k, v in states.items()}
    got = scan(**inputs | states | dict(state_index=torch.tensor(index, dtype=dtype)), return_states=True)
    all_close(got, scan(**inputs | gathered, return_states=True))


@settings(max_examples=25)
@given(
    shift=st.sampled_from([-1e4, -40.0, -5.0, 5.0, 40.0, 1e4]),
    log_a=st.sampled_from([-50.0, -5.0, 5.0, 50.0]),
    size=st.sampled_from([1e-6, 1.0, 1e5]),
    seed=st.integers(0, 9),
)
def test_extreme_values(shift: float, log_a: float, size: float, seed: int) -> None:
    """Steps that vanish or forget everything at once, decays that underflow, states far larger than the input."""
    inputs = sized(19, seeded=True, seed=seed, dtype=torch.float32)
    inputs["dt"][:, ::3] += shift
    inputs["a_log"][::2] = log_a
    inputs["ssm_state"] *= size
    got, exact = scan(**inputs, return_states=True), recurrence(widened(inputs))
    for name, *results in zip(STATES, got, recurrence(inputs, dtype=torch.float32), exact, strict=True):
        assert_within_budget(*results, what=name)
    all_close(scan(**widened(inputs), return_states=True), exact)


def test_a_vanishing_step_leaves_the_state_alone() -> None:
    inputs = sized(19, seeded=True)
    inputs["dt"].fill_(-math.inf)
    _, _, ssm = scan(**inputs, return_states=True)
    assert torch.equal(ssm, inputs["ssm_state"])


def test_the_limit_of_the_step_clamps_it() -> None:
    """An interval of one point makes `dt` irrelevant; a point outside the limits counts as the nearest limit."""
    inputs = sized(9, seeded=True)
    fixed = [scan(**inputs | dict(time_step_limit=(0.1, 0.1), dt=inputs["dt"] * f)) for f in (0, 1, 9)]
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed[1], fixed[2])
    step = inputs | dict(dt=torch.full_like(inputs["dt"], -50.0), time_step_limit=(0.1, 0.5))
    close(scan(**step), fixed[0])
    step["dt"] = step["dt"] + 100
    close(scan(**step), scan(**inputs | dict(time_step_limit=(0.5, 0.5))))


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_any_width_of_the_convolution(width: int) -> None:
    inputs = sized(11, seeded=True)
    wider = torch.cat([inputs["conv_weight"], inputs["conv_weight"].flip(0)], 1)
    columns = torch.cat([inputs["conv_state"], inputs["conv_state"].flip(0)], 2)
    inputs |= dict(conv_weight=wider[:, :width], conv_state=columns[..., : width - 1])
    all_close(scan(**inputs, return_states=True), recurrence(inputs))
    all_close(scan(**inputs, states_every=4), recurrence(inputs, 4))


def test_layout_does_not_matter() -> None:
    """Permuted and strided inputs, weights as in checkpoints, and no bias at all."""
    inputs = sized(19, seeded=True)
    expected = scan(**inputs, return_states=True)
    permuted = {k: inputs[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("xbc", "dt", "conv_state")}
    permuted["ssm_state"] = inputs["ssm_state"].repeat(1, 1, 1, 2)[..., :7]
    permuted["conv_weight"] = inputs["conv_weight"][:, None]  # [C, 1, W]
    all_close(scan(**inputs | permuted, return_states=True), expected)
    none = scan(**inputs | dict(conv_bias=None))
    close(none, scan(**inputs | dict(conv_bias=torch.zeros_like(inputs["conv_bias"]))))


@pytest.mark.parametrize("every", [0, 2])
def test_gradients(every: int) -> None:
    """Of everything that is real, through y and states, in a ragged batch with shared states."""
    case = dict(b=2, l=5, heads=2, head_dim=2, state=2, groups=1, seeded=True, lens=[5, 3], index=[0, 0])
    inputs = make_inputs("mamba2_scan", case, dtype=torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    assert len(names) == 9

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return scan(**inputs | dict(zip(names, tensors, strict=True)), return_states=True, states_every=every)

    assert torch.autograd.gradcheck(call, [inputs[k].requires_grad_() for k in names])


def test_gradients_do_not_come_from_the_padding() -> None:
    inputs = make_inputs("mamba2_scan", "ragged", dtype=torch.float64)
    names = ("xbc", "dt", "conv_weight", "conv_bias", "a_log", "d", "dt_bias", "conv_state", "ssm_state")
    gradients = []
    for poison in (0.0, math.nan):
        leaves = {k: inputs[k].clone() for k in names}
        for b, length in enumerate(inputs["seq_lens"].tolist()):
            leaves["xbc"][b, length:] = poison
            leaves["dt"][b, length:] = poison
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        y, conv, ssm = scan(**inputs | leaves, return_states=True)
        gradients.append(torch.autograd.grad((y.sin().sum() + conv.sum() + ssm.sin().sum()), list(leaves.values())))
    for name, clean, poisoned in zip(names, *gradients, strict=True):
        assert torch.equal(clean, poisoned), name
    for b, length in enumerate(inputs["seq_lens"].tolist()):
        assert not gradients[0][0][b, length:].any() and not gradients[0][1][b, length:].any()


@settings(max_examples=25)
@given(groups=st.integers(1, 4), size=st.integers(1, 5), power=st.integers(-8, 8))
def test_gated_norm_forgets_scale_and_keeps_groups_apart(groups: int, size: int, power: int) -> None:
    case = dict(b=2, l=3, width=groups * size, groups=groups)
    inputs = make_inputs("gated_rms_norm", case, dtype=torch.float64)
    out = gated_rms_norm(**inputs)
    scaled = inputs | dict(y=inputs["y"] * 2.0**power, eps=inputs["eps"] * 4.0**power)
    close(gated_rms_norm(**scaled), out)
    inputs["y"][..., :size] = math.nan  # the first group
    poisoned = gated_rms_norm(**inputs)
    assert poisoned[..., :size].isnan().all()
    assert torch.equal(poisoned[..., size:], out[..., size:])


def test_gated_norm_gradients_and_layout() -> None:
    inputs = make_inputs("gated_rms_norm", "odd", dtype=torch.float64)
    permuted = {k: inputs[k].transpose(0, 1).contiguous().transpose(0, 1) for k in ("y", "z")}
    close(gated_rms_norm(**inputs | permuted), gated_rms_norm(**inputs))
    inputs = make_inputs("gated_rms_norm", dict(b=1, l=2, width=6, groups=2), dtype=torch.float64)
    leaves = [inputs[k].requires_grad_() for k in ("y", "z", "weight")]
    assert torch.autograd.gradcheck(lambda y, z, w: gated_rms_norm(y, z, w, n_groups=2, eps=1e-5), leaves)


def test_gated_norm_of_nothing_is_zero() -> None:
    inputs = make_inputs("gated_rms_norm", "odd")
    assert not gated_rms_norm(**inputs | dict(y=torch.zeros_like(inputs["y"]))).any()


# --- errors -----------------------------------------------------------------------------------------------------------

BAD_SCAN: dict[str, tuple[dict, str]] = {
    "two dimensions": (dict(xbc=torch.zeros(3, 4)), "xbc"),
    "step of another length": (dict(dt=torch.zeros(4, 20, 2)), "dt"),
    "channels that do not split": (dict(head_dim=8), "xbc: 16 channels are not"),
    "groups that do not divide": (dict(n_groups=4), "n_groups 4"),
    "no groups": (dict(n_groups=0), "n_groups"),
    "short weight": (dict(conv_weight=torch.zeros(15, 4)), r"conv_weight: expected shape \(16, 4\), got \(15, 4\)"),
    "short bias": (dict(conv_bias=torch.zeros(15)), "conv_bias"),
    "decay per channel": (dict(a_log=torch.zeros(2, 4)), "a_log"),
    "skip per channel": (dict(d=torch.zeros(8)), "d: expected"),
    "short step bias": (dict(dt_bias=torch.zeros(1)), "dt_bias"),
    "conv state of another width": (dict(conv_state=torch.zeros(4, 16, 4)), "conv_state"),
    "ssm state of another size": (dict(ssm_state=torch.zeros(4, 2, 4, 5)), "ssm_state"),
    "fewer conv states than rows": (dict(conv_state=torch.zeros(3, 16, 3)), "conv_state"),
    "fewer ssm states than rows": (dict(ssm_state=torch.zeros(3, 2, 4, 4)), "ssm_state"),
    "index of another length": (dict(state_index=torch.zeros(3, dtype=torch.long)), "state_index"),
    "index beyond the states": (dict(state_index=torch.tensor([0, 1, 2, 4])), "state_index"),
    "negative index": (dict(state_index=torch.tensor([0, 1, 2, -1])), "state_index"),
    "lengths of another length": (dict(seq_lens=torch.tensor([1])), "seq_lens: expected shape"),
    "length beyond the block": (dict(seq_lens=torch.tensor([0, 1, 22, 3])), r"seq_lens: expected values in \[0, 21\]"),
    "negative length": (dict(seq_lens=torch.tensor([0, 1, -1, 3])), "seq_lens"),
    "negative blocks": (dict(states_every=-1), "states_every: expected 0 or more, got -1"),
}


@pytest.mark.parametrize("what", BAD_SCAN)
def test_a_bad_scan_is_explained(what: str) -> None:
    change, message = BAD_SCAN[what]
    with pytest.raises(ValueError, match=message):
        scan(**make_inputs("mamba2_scan", "ragged") | change)


BAD_NORM: dict[str, tuple[dict, str]] = {
    "gate of another shape": (dict(z=torch.zeros(3, 5, 20)), "z: expected the shape of y"),
    "short weight": (dict(weight=torch.zeros(20)), r"weight: expected shape \(21,\), got \(20,\)"),
    "groups that do not divide": (dict(n_groups=4), "n_groups: 4 does not divide 21"),
    "no groups": (dict(n_groups=0), "n_groups"),
}


@pytest.mark.parametrize("what", BAD_NORM)
def test_a_bad_norm_is_explained(what: str) -> None:
    change, message = BAD_NORM[what]
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**make_inputs("gated_rms_norm", "odd") | change)
