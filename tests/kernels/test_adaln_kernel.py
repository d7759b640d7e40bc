"""adaLN's kernels: against the specification on every instruction set, dtype and layout; registration; errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.kernels.kernel_checks import EVERY_ISA, ISAS, assert_op_within_budget, instruction_set, relative_errors
from twotower_kernels.reference import adaln
from twotower_kernels.testing.cases import adaln as cases
from twotower_kernels.testing.drawing import DTYPES

OPS = ("rms_norm", "adaln_norm", "gated_residual", "gated_residual_adaln_norm")
CASES = [(op, case) for op in OPS for case in adaln.CASES[op]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_case_on_every_instruction_set(op: str, case: str, isa: str) -> None:
    for dtype in DTYPES:
        with instruction_set(isa):
            assert_op_within_budget(getattr(tt, op), getattr(adaln, op), adaln.make_inputs(op, case, dtype=dtype))


@settings(max_examples=60)
@given(
    op=st.sampled_from(OPS),
    sizes=cases.sizes(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(EVERY_ISA),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(op, sizes, dtype, isa, layout, seed):  # type: ignore[no-untyped-def]
    inputs = adaln.make_inputs(op, sizes, dtype=dtype, seed=seed)
    with instruction_set(isa):
        assert_op_within_budget(getattr(tt, op), getattr(adaln, op), inputs, layout=layout)


@pytest.mark.parametrize("h", [32, 2688])
@pytest.mark.parametrize("order", ["plain", *adaln.ORDERS])
def test_as_accurate_as_plain_float32(order: str, h: int) -> None:
    """On average over many inputs, where no budget for luck is needed."""

    def make(seed: int) -> dict[str, Any]:
        return adaln.make_inputs("gated_residual_adaln_norm", dict(b=3, s=9, h=h, order=order), seed=seed)

    ours, theirs = tt.gated_residual_adaln_norm, adaln.gated_residual_adaln_norm
    assert max(relative_errors(ours, theirs, make, 100 if h < 100 else 5)) < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_may_be_wider(dtype: torch.dtype) -> None:
    inputs = adaln.make_inputs("gated_residual", "block", dtype=dtype)
    inputs["residual"] = inputs["residual"].float() * 1.01
    torch.testing.assert_close(tt.gated_residual(**inputs), adaln.gated_residual(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", adaln.ORDERS)
def test_fusing_changes_no_bit(order: str, dtype: torch.dtype) -> None:
    inputs = adaln.make_inputs("gated_residual_adaln_norm", f"block_{order}", dtype=dtype)
    h, normed = tt.gated_residual_adaln_norm(**inputs)
    norm = {k: inputs[k] for k in ("weight", "shift", "scale", "eps", "order")}
    assert torch.equal(h, tt.gated_residual(inputs["residual"], inputs["y"], inputs["gate"]))
    assert torch.equal(normed, tt.adaln_norm(h, **norm))


def test_nan_stays_in_its_row() -> None:
    inputs = adaln.make_inputs("adaln_norm", "block_modulate_norm")
    clean = tt.adaln_norm(**inputs)
    inputs["x"][1, 3, 5] = torch.nan
    got = tt.adaln_norm(**inputs)
    assert got[1, 3].isnan().all()
    got[1, 3] = clean[1, 3]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_without_a_weight_or_rounded_first(dtype: torch.dtype, isa: str) -> None:
    """No weight is a weight of 1, to the bit. What is rounded first is what a weight of 1 gives, times the weight."""
    inputs = adaln.make_inputs("rms_norm", dict(b=3, s=2, h=131), dtype=dtype)
    x, weight = inputs["x"], inputs["weight"]
    with instruction_set(isa):
        plain = tt.rms_norm(x, eps=1e-5)
        assert torch.equal(plain, tt.rms_norm(x, torch.ones_like(weight), eps=1e-5))
        assert torch.equal(plain, tt.rms_norm(x, eps=1e-5, round_first=True))
        assert torch.equal(tt.rms_norm(x, weight, eps=1e-5, round_first=True), plain * weight)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_registration(op: str, layout: str) -> None:
    inputs = adaln.make_inputs(op, "block" if op in ("rms_norm", "gated_residual") else "block_norm_modulate")
    inputs.pop("gated", None)
    order = inputs.pop("order", None)
    arguments = [v.transpose(0, 1).contiguous().transpose(0, 1) if layout == "permuted" and isinstance(v, torch.Tensor)
                 and v.ndim == 3 else v for v in inputs.values()]  # fmt: skip
    if op == "rms_norm":
        arguments.append(True)
        torch.library.opcheck(torch.ops.twotower.rms_norm.default, (arguments[0], None, *arguments[2:]))
    elif order is not None:
        arguments.append(order == "norm_modulate")
    torch.library.opcheck(getattr(torch.ops.twotower, op).default, tuple(arguments))


X, W, V = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.adaln_norm(X[0], W, eps=1e-5), ValueError, r"x: expected \[B, S, H\], got \[3, 4\]"),
        (lambda: tt.adaln_norm(X, W[:3], eps=1e-5), ValueError, r"weight: expected shape \[4\], got \[3\]"),
        (lambda: tt.adaln_norm(X, W, V, eps=1e-5), ValueError, "shift and scale: expected both"),
        (lambda: tt.adaln_norm(X, W, V[:1], V, eps=1e-5), ValueError, r"shift: expected shape \[2, 4\], got \[1, 4\]"),
        (lambda: tt.adaln_norm(X, W, eps=1e-5, order="norm"), ValueError, "order: expected one of .* got 'norm'"),
        (lambda: tt.adaln_norm(X.int(), W, eps=1e-5), TypeError, "x: expected float64.* got torch.int32"),
        (lambda: tt.gated_residual(X, X[:, :2]), ValueError, r"y: expected the residual's shape \[2, 3, 4\]"),
        (lambda: tt.gated_residual(X.bfloat16(), X), TypeError, "y: expected torch.bfloat16 as residual"),
        (lambda: tt.gated_residual(X, X, V[0]), ValueError, r"gate: expected shape \[2, 4\], got \[4\]"),
        (lambda: tt.adaln_norm(X.to("meta"), W, eps=1e-5), ValueError, "weight: expected device meta"),
        (lambda: tt.rms_norm(X, W[:2], eps=1e-5), ValueError, r"weight: expected \[H\]"),
        (lambda: tt.rms_norm(X[0, 0, 0], eps=1e-5), ValueError, r"x: expected \[..., H\], got a tensor without dim"),
        (lambda: tt.rms_norm(X.int(), eps=1e-5), TypeError, "x: expected float64.* got torch.int32"),
    ],
)
def test_bad_input_is_named(call, error, message):  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
