"""The error budget: how far a result may be from the truth, measured against plain PyTorch at the same precision.

A fixed tolerance says nothing about how hard a case is. Here the candidate and the naive program in the same dtype are
both compared with a float64 truth, in the 2-norm and at the worst entry, and the candidate may err at most

    factor * (error of the naive program) + band * eps * (size of the truth)

The second term is the rounding band: even an exact result must be rounded to its dtype, and a naive program is
sometimes lucky on a small tensor.

Of a float64 result there is no such truth: the naive program is the truth, and seems to err by nothing. But rounding
errors are in proportion to eps (Higham, Accuracy and Stability of Numerical Algorithms, 3.1: every operation is exact
but for a factor 1 + δ, |δ| ≤ u, and products of δ are neglected). So what the naive program loses in float64 is what it
loses in float32 on the same numbers, against its own float64, times eps64 / eps32 = 2^-29: `losses` measures it. Two
things are then to be added. The truth errs as well, so the factor is one more. And the float32 program sums in its own
order, the candidate and the truth in theirs: a chain of n additions errs like sqrt(n) where blocks err like
sqrt(n / blocks), which at 4096 terms makes BLAS's own products differ fourfold. The budget is

    ORDERS * (factor + 1) * (loss of the naive program) + band * eps * (size of the truth)

That is no place to judge an order of summation; the same kernels are judged in float32. It is 7 digits from what any
step in float32 would do to a float64 result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SHRINK = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
ORDERS = 4.0  # how much more one order of summation may lose than another
DRAWS = 4  # of rounding errors: one may be lucky where results are few


def assert_within_budget(
    got: Tensor,
    naive: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    band: float = 2.0,
    what: str = "result",
    lost: Sequence[Tensor] | None = None,
) -> None:
    """Raise AssertionError unless `got` is as close to `exact` as the budget above allows.

    got, naive: same shape and floating dtype; exact: same shape, float64. NaN, +inf and -inf must stand exactly where
    they stand in `exact` rounded to that dtype; the errors are taken over the finite entries. A naive program that is
    itself not finite where the truth is cannot be a yardstick and fails too.
    lost: errors of the naive program, of the same shape, from `losses`. float64 needs them, and they are for it alone.
    """
    assert exact.dtype == torch.float64, f"{what}: the truth must be float64, got {exact.dtype}"
    for name, tensor in (("got", got), ("naive", naive)):
        assert tensor.shape == exact.shape, f"{what}: {name} is {list(tensor.shape)}, the truth {list(exact.shape)}"
        assert tensor.dtype == naive.dtype, f"{what}: {name} is {tensor.dtype}, naive is {naive.dtype}"
        assert_same_specials(tensor, exact.to(naive.dtype), f"{what} ({name})")
    wide = got.dtype == torch.float64
    assert wide == (lost is not None), f"{what}: {got.dtype}, expected {'losses' if wide else 'no losses'}"
    finite = exact.to(naive.dtype).isfinite()
    truth = exact[finite]
    if truth.numel() == 0:
        return
    error = got[finite].to(torch.float64) - truth
    yardsticks = [x[finite] for x in lost] if lost is not None else [naive[finite].to(torch.float64) - truth]
    factor = ORDERS * (factor + 1) if wide else factor
    eps = torch.finfo(naive.dtype).eps
    for name, size in (("2-norm", torch.linalg.vector_norm), ("worst entry", lambda x: x.abs().max())):
        err, scale = float(size(error)), float(size(truth))
        naive_err = max((float(size(x)) for x in yardsticks), default=0.0)
        allowed = factor * naive_err + band * eps * scale
        if err > allowed:
            worst = int(error.abs().argmax())
            place = torch.nonzero(finite)[worst].tolist()
            raise AssertionError(
                f"{what}: {name} of the error is {err:.3e}, allowed {allowed:.3e}\n"
                f"= {factor:g} x {naive_err:.3e} (naive) + {band:g} x {eps:.1e} x {scale:.3e} (size of the truth);\n"
                f"worst at {place}: got {got[finite][worst].item():.9g}, naive {naive[finite][worst].item():.9g},"
                f" exact {truth[worst].item():.9g}; {int((error != 0).sum())} of {error.numel()} entries differ"
            )


def assert_same_specials(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless NaN, +inf and -inf stand at the same places in both."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = torch.nonzero(test(got) != test(expected))
        if len(differ):
            place = tuple(differ[0].tolist())
            raise AssertionError(
                f"{what}: {name} at {len(differ)} wrong places, first {list(place)}:"
                f" got {got[place].item()}, expected {expected[place].item()}"
            )


def assert_results_within_budget(
    results: Sequence[Tensor], program: Callable[..., Any], inputs: dict[str, Any], **budget: Any
) -> None:
    """Every result of a candidate against the naive `program`, which returns a tensor or a tuple of them: what floats
    within the budget, all else equal."""
    exact, naive = as_tuple(program(**widened(inputs))), as_tuple(program(**inputs))
    assert len(results) == len(exact), f"{len(results)} results, expected {len(exact)}"
    wide = any(plain.dtype == torch.float64 for plain in naive)
    lost: Sequence[Any] = losses(program, inputs) if wide else [None] * len(exact)
    for n, (got, plain, truth, errors) in enumerate(zip(results, naive, exact, lost, strict=True)):
        what = f"result {n}"
        assert got.dtype == plain.dtype and got.shape == plain.shape, f"{what}: {got.dtype} {list(got.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got, plain), what
            continue
        errors = errors if got.dtype == torch.float64 else None
        assert_within_budget(got, plain, truth.double(), what=what, lost=errors, **budget)


def losses(program: Callable[..., Any], inputs: dict[str, Any]) -> list[list[Tensor]]:
    """What `program` loses in float64 on these inputs: for each result some draws of its rounding errors, float64.

    Every draw is the error in float32 on inputs that are close by, so that the case is as hard, and what is lost is
    another matter of luck. Draws in which a rounding changed an integer, hence a choice, are left out; errors that are
    not finite, where float32 overflows, count for nothing.
    """
    found: list[list[Tensor]] = []
    for seed in range(DRAWS):
        near = nearby(inputs, seed)
        naive, exact = as_tuple(program(**near)), as_tuple(program(**widened(near)))
        pairs = list(zip(naive, exact, strict=True))
        found = found or [[] for _ in pairs]
        if all(a.is_floating_point() or torch.equal(a, b) for a, b in pairs):
            for errors, (plain, truth) in zip(found, pairs, strict=True):
                errors.append((plain.double() - truth.double()).nan_to_num(0.0, 0.0, 0.0) * SHRINK)
    return found


def nearby(value: Any, seed: int) -> Any:
    """float64 in float32; but for seed 0 every number is off by at most a thousandth of itself."""

    def near(x: Tensor) -> Tensor:
        off = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
        return (x * (1 + off * (2e-3 if seed else 0.0)).to(x.device)).float()

    return converted(value, lambda x: near(x) if x.dtype == torch.float64 else x)


def widened(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is; in dicts, lists and tuples too."""
    return converted(value, lambda x: x.double() if x.is_floating_point() else x)


def converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, dict):
        return {k: converted(v, convert) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(converted(v, convert) for v in value)
    return value


def as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)
