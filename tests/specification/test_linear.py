"""reference/linear.py against its definition number by number, against F.linear, and its errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from twotower_kernels.reference.linear import CASES, linear, make_inputs
from twotower_kernels.testing.budget import assert_results_within_budget, assert_within_budget

SMALL = [case for case in CASES["linear"] if not case.startswith("released")]
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", SMALL)
def test_every_number_is_the_sum(case: str) -> None:
    inputs = make_inputs("linear", case, dtype=torch.float64)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    got = linear(**inputs)
    assert got.shape == (*x.shape[:-1], len(weight))
    count = x.shape[:-1].numel()
    rows, results = x.reshape(count, x.shape[-1]).tolist(), got.reshape(count, len(weight)).tolist()
    for row, result in zip(rows, results, strict=True):
        for r, factors in enumerate(weight.tolist()):
            terms = [a * b for a, b in zip(row, factors, strict=True)]
            exact = math.fsum([*terms, 0.0 if bias is None else bias[r].item()])
            assert math.isclose(result[r], exact, rel_tol=1e-13, abs_tol=1e-13)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", SMALL)
def test_low_precision_is_as_good_as_pytorchs(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("linear", case, dtype=dtype)
    assert_results_within_budget((linear(**inputs),), F.linear, inputs)


@pytest.mark.parametrize("dtype", LOW[1:])
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    """Two products that cancel in the dtype of x do not in float32."""
    x, weight = torch.tensor([[1.0, 1.0]], dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)
    small = torch.tensor([2.0**-12], dtype=dtype)
    assert linear(x, weight + torch.tensor([0.0, 0.0], dtype=dtype), small).item() == 2.0**-12
    exact = torch.tensor([[2.0**-12]], dtype=torch.float64)
    assert_within_budget(linear(x, weight, small), F.linear(x, weight, small), exact)


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in make_inputs("linear", "odd", dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(linear, inputs)


def test_errors() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    for bad, text in ((torch.ones(4, 7), "weight: expected"), (torch.ones(8), "weight: expected")):
        with pytest.raises(ValueError, match=text):
            linear(x, bad)
    with pytest.raises(ValueError, match=r"bias: expected \[4\], got \[3\]"):
        linear(x, weight, torch.ones(3))
    with pytest.raises(ValueError, match="weight: expected"):
        linear(torch.tensor(1.0), weight)
    for arguments, name in (((x, weight.half()), "weight"), ((x, weight, torch.ones(4).double()), "bias")):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            linear(*arguments)
