"""The error budget accepts what plain PyTorch would do and rejects what a wrong kernel would."""

import pytest
import torch

from tests.compare import assert_within_budget

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a better product, the naive one in `dtype`, the exact one) of two random matrices."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(33, 33, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    naive = torch.zeros(33, 33, dtype=dtype)
    for i in range(33):  # one rounding per addition
        naive = naive + a[:, i, None] * b[None, i, :]
    return exact.to(dtype), naive, exact


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounded_truth_and_naive_itself_pass(dtype):
    better, naive, exact = product(dtype)
    assert_within_budget(better, naive, exact)
    assert_within_budget(naive, naive, exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_small_systematic_error_fails(dtype):
    _, naive, exact = product(dtype)
    error = torch.linalg.vector_norm(naive.double() - exact) / torch.linalg.vector_norm(exact)
    with pytest.raises(AssertionError, match="2-norm of the error"):
        assert_within_budget((exact * (1 + 3 * error + 3 * torch.finfo(dtype).eps)).to(dtype), naive, exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_wrong_entry_fails(dtype):
    better, naive, exact = product(dtype)
    better[7, 5] += 8 * (naive.double() - exact).abs().max().to(dtype) + 8 * torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(AssertionError, match=r"worst at \[7, 5\]"):
        assert_within_budget(better, naive, exact)


def test_a_result_of_lower_precision_fails():
    _, naive, exact = product(torch.float32)
    with pytest.raises(AssertionError, match="of the error"):
        assert_within_budget(exact.to(torch.bfloat16).float(), naive, exact)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_specials_must_stand_where_they_belong(special):
    exact = torch.tensor([1.0, special, 2.0], dtype=torch.float64)
    naive = exact.float()
    assert_within_budget(naive, naive, exact)
    with pytest.raises(AssertionError, match=r"wrong places, first \[1\]"):
        assert_within_budget(torch.tensor([1.0, 0.0, 2.0]), naive, exact)
    with pytest.raises(AssertionError, match=r"wrong places, first \[0\]"):
        assert_within_budget(torch.tensor([special, special, 2.0]), naive, exact)
    with pytest.raises(AssertionError, match="naive"):
        assert_within_budget(naive, torch.tensor([special, special, 2.0]), exact)


def test_the_budget_follows_the_difficulty():
    """The same error passes where the naive program loses as many digits, and fails where it does not."""
    exact = torch.tensor([1e-3], dtype=torch.float64)
    got = torch.tensor([1e-3 + 2e-5], dtype=torch.float32)
    assert_within_budget(got, torch.tensor([1e-3 + 1.5e-5], dtype=torch.float32), exact)
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_budget(got, torch.tensor([1e-3 + 1e-9], dtype=torch.float32), exact)


def test_shape_dtype_and_truth_are_checked():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_budget(x, x, x)
    with pytest.raises(AssertionError, match="got is"):
        assert_within_budget(x[:2], x, x.double())
    with pytest.raises(AssertionError, match="got is"):
        assert_within_budget(x.bfloat16(), x, x.double())


def test_an_empty_tensor_passes():
    assert_within_budget(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64))
