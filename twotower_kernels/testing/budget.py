"""The error budget: how far a result may be from the truth, measured against plain PyTorch at the same precision.

A fixed tolerance says nothing about how hard a case is. Here the candidate and the naive program in the same dtype are
both compared with a float64 truth, in the 2-norm and at the worst entry, and the candidate may err at most

    factor * (error of the naive program) + band * eps * (size of the truth)

The second term is the rounding band: even an exact result must be rounded to its dtype. On few numbers a naive program
may be lucky: where its error on these inputs is not enough, it is the largest of that and of its errors on some inputs
close by (`losses`), which are as hard and another matter of luck. And what a single sum loses says little of what
another order of summation loses in it, as its partial sums are others: the size of errors over m numbers is known to
1/√m of itself, and the factor is 1 + 4/√m times as large. On many numbers all of this is nothing.

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

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHRINK = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
FACTOR = 2.0  # how much more than the naive program a result may err
ORDERS = 4.0  # how much more one order of summation may lose than another
DRAWS = 4  # of rounding errors: one may be lucky where results are few


class Mismatch(AssertionError):
    """A result that is not what it should be.

    place: the indices of its worst entry; got, naive, exact: the numbers there; None where there is no one place, or
    no number.
    """

    def __init__(
        self,
        text: str,
        *,
        place: Sequence[int] | None = None,
        got: float | None = None,
        naive: float | None = None,
        exact: float | None = None,
    ) -> None:
        super().__init__(text)
        self.place, self.got, self.naive, self.exact = place, got, naive, exact


def assert_within_budget(
    got: Tensor,
    naive: Tensor,
    exact: Tensor,
    *,
    factor: float = FACTOR,
    band: float = 2.0,
    what: str = "result",
    lost: Callable[[], Sequence[Tensor]] | None = None,
) -> None:
    """Raises Mismatch, an AssertionError, unless `got` is as close to `exact` as the budget above allows.

    got, naive: same shape and floating dtype; exact: same shape, float64. NaN, +inf and -inf must stand exactly where
    they stand in `exact` rounded to that dtype; the errors are taken over the finite entries. A naive program that is
    itself not finite where the truth is cannot be a yardstick and fails too.
    lost: gives more errors of the naive program, of the same shape, from `losses`. float64 needs it.
    """
    assert exact.dtype == torch.float64, f"{what}: the truth must be float64, got {exact.dtype}"
    for name, tensor in (("got", got), ("naive", naive)):
        assert tensor.shape == exact.shape, f"{what}: {name} is {list(tensor.shape)}, the truth {list(exact.shape)}"
        assert tensor.dtype == naive.dtype, f"{what}: {name} is {tensor.dtype}, naive is {naive.dtype}"
        assert_same_specials(tensor, exact.to(naive.dtype), f"{what} ({name})", naive)
    wide = got.dtype == torch.float64
    assert lost or not wide, f"{what}: float64 cannot be its own truth, expected losses"
    finite = exact.to(naive.dtype).isfinite()
    truth = exact[finite]
    if truth.numel() == 0:
        return
    error = got[finite].to(torch.float64) - truth
    yardstick = naive[finite].to(torch.float64) - truth
    few = 1 + 4 / truth.numel() ** 0.5
    eps = torch.finfo(naive.dtype).eps
    for name, size in (("2-norm", torch.linalg.vector_norm), ("worst entry", lambda x: x.abs().max())):
        err, scale = float(size(error)), float(size(truth))
        times, naive_err = factor, float(size(yardstick))
        if lost and (wide or err > times * naive_err + band * eps * scale):
            times = ORDERS * (factor + 1) if wide else few * factor
            naive_err = max([naive_err, *(float(size(x[finite])) for x in lost())])
        allowed = times * naive_err + band * eps * scale
        if err > allowed:
            worst = int(error.abs().argmax())
            place = torch.nonzero(finite)[worst].tolist()
            numbers = got[finite][worst].item(), naive[finite][worst].item(), truth[worst].item()
            raise Mismatch(
                f"{what}: {name} of the error is {err:.3e}, allowed {allowed:.3e}\n"
                f"= {times:g} x {naive_err:.3e} (naive) + {band:g} x {eps:.1e} x {scale:.3e} (size of the truth);\n"
                f"worst at {place}: got {numbers[0]:.9g}, naive {numbers[1]:.9g}, exact {numbers[2]:.9g};"
                f" {int((error != 0).sum())} of {error.numel()} entries differ",
                place=place,
                **dict(zip(("got", "naive", "exact"), numbers, strict=True)),
            )


def assert_same_specials(got: Tensor, expected: Tensor, what: str, naive: Tensor | None = None) -> None:
    """Raises Mismatch unless NaN, +inf and -inf stand at the same places in both. naive: for its words alone."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = torch.nonzero(test(got) != test(expected))
        if len(differ):
            place = tuple(differ[0].tolist())
            raise Mismatch(
                f"{what}: {name} at {len(differ)} wrong places, first {list(place)}:"
                f" got {got[place].item()}, expected {expected[place].item()}",
                place=list(place),
                got=got[place].item(),
                naive=None if naive is None else naive[place].item(),
                exact=expected[place].item(),
            )


def assert_results_within_budget(
    results: Sequence[Tensor], program: Callable[..., Any], inputs: dict[str, Any], **budget: Any
) -> None:
    """Every result of a candidate against the naive `program`, which returns a tensor or a tuple of them: what floats
    within the budget, all else equal."""
    Yardstick(program, inputs).judge(results, **budget)


class Yardstick:
    """What the naive `program` makes of some inputs, in their dtype and in float64, to judge results by."""

    def __init__(self, program: Callable[..., Any], inputs: dict[str, Any]) -> None:
        self.program, self.inputs = program, inputs
        self.exact: Any = as_tuple(program(**widened(inputs)))
        self.naive: Any = as_tuple(program(**inputs))

    @cached_property
    def losses(self) -> list[list[Tensor]]:
        wide = any(plain.dtype == torch.float64 for plain in self.naive)
        return losses(self.program, self.inputs, narrower=wide)

    def judge(
        self,
        results: Sequence[Tensor],
        *,
        row: int | None = None,
        bands: Mapping[int, float] = MappingProxyType({}),
        any_order: bool = False,
        **budget: Any,
    ) -> None:
        """Raises Mismatch unless results are the program's: what floats within the budget, all else equal.

        row: that of their first dimension is judged alone. bands: of some results, by number. any_order: what is summed
        in float32 may be summed in any order, and lose ORDERS times as much; the rounding to half precision hides it.
        """
        if len(results) != len(self.exact):
            raise Mismatch(f"{len(results)} results, expected {len(self.exact)}")

        def of_row(x: Tensor) -> Tensor:
            return x if row is None else x[row : row + 1]

        for n, (got, plain, truth) in enumerate(zip(results, self.naive, self.exact, strict=True)):
            what = f"result {n}"
            assert_same_kind(got, plain, what)
            if got.is_floating_point():
                lost = lambda n=n: [of_row(x) for x in self.losses[n]]  # noqa: E731
                tensors = of_row(got), of_row(plain), of_row(truth).double()
                own = {"band": bands[n]} if n in bands else {}
                own |= {"factor": ORDERS * FACTOR} if any_order and got.dtype == torch.float32 else {}
                assert_within_budget(*tensors, what=what, lost=lost, **budget | own)
            else:
                assert_equal(of_row(got), of_row(plain), what)


def assert_same_kind(got: Tensor, expected: Tensor, what: str) -> None:
    """Raises Mismatch unless dtype and shape are the same."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        kinds = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (got, expected)]
        raise Mismatch(f"{what}: got {kinds[0]}, expected {kinds[1]}")


def assert_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raises Mismatch unless both hold the same numbers, NaN for NaN."""
    differ = torch.nonzero((got != expected) & ~((got != got) & (expected != expected)))
    if len(differ):
        place = tuple(differ[0].tolist())
        here, there = got[place].item(), expected[place].item()
        raise Mismatch(
            f"{what}: {len(differ)} of {got.numel()} entries differ, first {list(place)}: got {here}, expected {there}",
            place=list(place),
            got=here,
            naive=there,
            exact=there,
        )


def assert_gate_faithful(logits: Tensor, x: Tensor, gate_weight: Tensor) -> None:
    """Raises Mismatch unless router logits `x·gate_weightᵀ` are within 4 roundings of the size of what is summed. The
    truth is summed in extended precision: the specification, in float64, cannot be a yardstick for itself."""
    assert_same_kind(logits, torch.empty(len(x), len(gate_weight), dtype=torch.float64), "result 0")
    wide, weight = (tensor.double().numpy().astype(np.longdouble) for tensor in (x, gate_weight))
    exact = wide @ weight.T
    error = np.nan_to_num(np.abs(logits.numpy() - exact), nan=np.inf)
    allowed = 4 * np.finfo(np.float64).eps * (np.abs(wide) @ np.abs(weight).T)
    if not (error <= allowed).all():
        place = np.unravel_index(
            np.argmax(np.where(error <= allowed, -1, np.nan_to_num(error, nan=np.inf))), error.shape
        )
        raise Mismatch(
            f"result 0: off by {error[place]:.3e} of float64, allowed {allowed[place]:.3e}",
            place=[int(n) for n in place],
            got=logits.numpy()[place].item(),
            exact=float(exact[place]),
        )


def losses(program: Callable[..., Any], inputs: dict[str, Any], *, narrower: bool) -> list[list[Tensor]]:
    """What `program` loses on these inputs: for each result some draws of its rounding errors, float64.

    narrower: it computes in float64, and every draw is its error in float32, times 2^-29. Draws in which a rounding
    changed an integer, hence a choice, are left out; errors that are not finite, where float32 overflows, count for
    nothing.
    """
    found: list[list[Tensor]] = []
    for seed in range(DRAWS):
        near = nearby(inputs, seed, narrower)
        naive, exact = as_tuple(program(**near)), as_tuple(program(**widened(near)))
        pairs = list(zip(naive, exact, strict=True))
        found = found or [[] for _ in pairs]
        if all(a.is_floating_point() or torch.equal(a, b) for a, b in pairs):
            for errors, (plain, truth) in zip(found, pairs, strict=True):
                error = (plain.double() - truth.double()).nan_to_num(0.0, 0.0, 0.0)
                errors.append(error * SHRINK if narrower else error)
    return found


def nearby(value: Any, seed: int, narrower: bool) -> Any:
    """Every floating number off by at most a thousandth of itself, or some units in its last place where that is more;
    float64 in float32, if narrower."""

    def near(x: Tensor) -> Tensor:
        dtype = torch.float32 if narrower and x.dtype == torch.float64 else x.dtype
        most = max(1e-3, 4 * torch.finfo(dtype).eps)
        off = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
        return (x.double() * (1 + most * off).to(x.device)).to(dtype)

    return converted(value, lambda x: near(x) if x.is_floating_point() else x)


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
    return result if isinstance(result, tuple) else (result,)
