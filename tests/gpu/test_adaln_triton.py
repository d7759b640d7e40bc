"""adaLN's Triton kernel in the interpreter: the CPU kernels' demands, without float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower_kernels as tt
from tests.gpu.triton_checks import DTYPES, triton_kernels
from tests.kernels.kernel_checks import assert_op_within_budget
from tests.kernels.test_adaln_kernel import CASES, OPS
from twotower_kernels.reference import adaln


@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_case(op: str, case: str) -> None:
    with triton_kernels():
        for dtype in DTYPES:
            assert_op_within_budget(getattr(tt, op), getattr(adaln, op), adaln.make_inputs(op, case, dtype=dtype))


@settings(max_examples=30)
@given(
    op=st.sampled_from(OPS),
    b=st.integers(0, 3),
    s=st.integers(0, 3),
    h=st.integers(1, 70),
    order=st.sampled_from(["plain", *adaln.ORDERS]),
    weighted=st.booleans(),
    round_first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(op, b, s, h, order, weighted, round_first, dtype, layout, seed):  # type: ignore[no-untyped-def]
    sizes = dict(b=b, s=s, h=h, order=order, gated=order != "plain", weighted=weighted, round_first=round_first)
    inputs = adaln.make_inputs(op, sizes, dtype=dtype, seed=seed)
    with triton_kernels():
        assert_op_within_budget(getattr(tt, op), getattr(adaln, op), inputs, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", adaln.ORDERS)
def test_fusing_changes_no_bit(order: str, dtype: torch.dtype) -> None:
    inputs = adaln.make_inputs("gated_residual_adaln_norm", f"block_{order}", dtype=dtype)
    norm = {k: inputs[k] for k in ("weight", "shift", "scale", "eps", "order")}
    with triton_kernels():
        h, normed = tt.gated_residual_adaln_norm(**inputs)
        assert torch.equal(h, tt.gated_residual(inputs["residual"], inputs["y"], inputs["gate"]))
        assert torch.equal(normed, tt.adaln_norm(h, **norm))


def test_float64_is_refused() -> None:
    x = torch.zeros(1, 1, 4, dtype=torch.float64)
    with triton_kernels(), pytest.raises(NotImplementedError, match="adaln_norm on cpu: x is float64"):
        tt.adaln_norm(x, x[0, 0], eps=1e-5)
    with triton_kernels(), pytest.raises(NotImplementedError, match=r"^rms_norm on cpu: x is float64"):
        tt.rms_norm(x, eps=1e-5)
