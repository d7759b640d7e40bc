"""The error budget accepts what plain PyTorch would do and rejects what a wrong kernel would."""

import math
from collections.abc import Callable

import pytest
import torch

from twotower_kernels.testing.budget import assert_results_within_budget, assert_within_budget, losses

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


# --- float64, which has no truth ------------------------------------------------------------------------------------


def factors(terms: int, rows: int = 3, columns: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (rows, terms), "b": (terms, columns)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def chain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for k in range(len(b)):
        total = total + a[:, k, None] * b[k]
    return total


def backwards(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return chain(a.flip(1), b.flip(0))


def in_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    terms = list((a.T[:, :, None] * b[:, None]).unbind())
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2], torch.zeros_like(terms[0])) for i in range(0, len(terms), 2)]
    return terms[0]


@pytest.mark.parametrize("order", [chain, backwards, in_pairs])
@pytest.mark.parametrize(("terms", "rows", "columns"), [(1, 3, 5), (515, 1, 1), (4096, 3, 5), (4096, 1, 1)])
def test_another_order_of_summation_is_right_in_float64(
    order: Callable[..., torch.Tensor], terms: int, rows: int, columns: int
) -> None:
    for seed in range(5):
        inputs = factors(terms, rows, columns, seed)
        assert_results_within_budget([order(**inputs)], naive, inputs)


def accumulated_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() @ b.float()).double()


def partly_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[:, 1:] @ b[1:] + (a[:, :1] * b[:1]).float()


def without_the_smallest_term(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    k = int((a[0] * b[:, 0]).abs().argmin())
    a = a.clone()
    a[:, k] = 0
    return a @ b


def scaled_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b * torch.tensor(1.1).double() / 1.1


@pytest.mark.parametrize(
    "wrong", [accumulated_in_float32, partly_in_float32, without_the_smallest_term, scaled_in_float32]
)
@pytest.mark.parametrize("terms", [7, 515, 4096])
def test_what_is_wrong_fails_in_float64(wrong: Callable[..., torch.Tensor], terms: int) -> None:
    for seed in range(5):
        inputs = factors(terms, seed=seed)
        with pytest.raises(AssertionError, match="of the error"):
            assert_results_within_budget([wrong(**inputs)], naive, inputs)


def test_the_loss_is_what_float64_loses() -> None:
    """Against sums without a rounding: the factors have so few digits that float64 holds their products."""
    inputs = {name: x.float().double() for name, x in factors(515, 9, 9).items()}
    products = inputs["a"][:, None] * inputs["b"].T
    exact = torch.tensor([[math.fsum(terms) for terms in row] for row in products.tolist()], dtype=torch.float64)
    lost = torch.linalg.vector_norm(naive(**inputs) - exact)
    for draw in losses(naive, inputs, narrower=True)[0]:
        assert lost / 4 < torch.linalg.vector_norm(draw) < 4 * lost


def test_a_choice_that_rounding_changes_is_no_loss() -> None:
    def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[x.argmax()], x.argmax()

    near = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 1e-11], dtype=torch.float64)
    for errors in losses(largest, {"x": near}, narrower=True):
        assert all(float(error) < 1e-15 for error in errors)
    with pytest.raises(AssertionError, match="result 1"):
        assert_results_within_budget([near[2], torch.tensor(1)], largest, {"x": near})


def test_float64_cannot_be_its_own_truth() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="expected losses"):
        assert_within_budget(x, x, x)
    assert_within_budget(x, x, x, lost=lambda: [])


def test_luck_of_the_naive_program_is_no_yardstick() -> None:
    """Single sums, in two orders: by chance one of them is all but exact, and the other as wrong as anybody's."""
    lucky = 0
    for seed in range(100):
        inputs = {name: x.float() for name, x in factors(515, 1, 1, seed).items()}
        exact, plain = naive(**{name: x.double() for name, x in inputs.items()}), in_pairs(**inputs)
        got = in_pairs(inputs["a"].flip(1), inputs["b"].flip(0))
        assert_results_within_budget([got], in_pairs, inputs)
        try:
            assert_within_budget(got, plain, exact)
        except AssertionError:
            lucky += 1
            with pytest.raises(AssertionError, match="of the error"):
                assert_results_within_budget([got + 1e-3], in_pairs, inputs)
    assert lucky


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_draws_forgive_nothing_in_many_numbers(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in factors(33, 33, 33).items()}
    exact = naive(**{name: x.double() for name, x in inputs.items()})
    error = torch.linalg.vector_norm(chain(**inputs).double() - exact) / torch.linalg.vector_norm(exact)
    wrong = (exact * (1 + 3 * error + 3 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match="2-norm of the error"):
        assert_results_within_budget([wrong], chain, inputs)
