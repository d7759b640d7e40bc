"""The error budget: how far a result may be from the truth, measured against plain PyTorch at the same precision.

A fixed tolerance says nothing about how hard a case is. Here the candidate and the naive program in the same dtype are
both compared with a float64 truth, in the 2-norm and at the worst entry, and the candidate may err at most

    factor * (error of the naive program) + band * eps * (size of the truth)

The second term is the rounding band: even an exact result must be rounded to its dtype, and a naive program is
sometimes lucky on a small tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    got: Tensor, naive: Tensor, exact: Tensor, *, factor: float = 2.0, band: float = 2.0, what: str = "result"
) -> None:
    """Raise AssertionError unless `got` is as close to `exact` as the budget above allows.

    got, naive: same shape and floating dtype; exact: same shape, float64. NaN, +inf and -inf must stand exactly where
    they stand in `exact` rounded to that dtype; the errors are taken over the finite entries. A naive program that is
    itself not finite where the truth is cannot be a yardstick and fails too.
    """
    assert exact.dtype == torch.float64, f"{what}: the truth must be float64, got {exact.dtype}"
    for name, tensor in (("got", got), ("naive", naive)):
        assert tensor.shape == exact.shape, f"{what}: {name} is {list(tensor.shape)}, the truth {list(exact.shape)}"
        assert tensor.dtype == naive.dtype, f"{what}: {name} is {tensor.dtype}, naive is {naive.dtype}"
        assert_same_specials(tensor, exact.to(naive.dtype), f"{what} ({name})")
    finite = exact.to(naive.dtype).isfinite()
    truth = exact[finite]
    if truth.numel() == 0:
        return
    error = got[finite].to(torch.float64) - truth
    yardstick = naive[finite].to(torch.float64) - truth
    eps = torch.finfo(naive.dtype).eps
    for name, size in (("2-norm", torch.linalg.vector_norm), ("worst entry", lambda x: x.abs().max())):
        err, naive_err, scale = float(size(error)), float(size(yardstick)), float(size(truth))
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
