"""What the tests of the remasking kernel share: a step of the package beside the specification's."""

from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.reference.remask import remask
from twotower_kernels.testing.cases.remask import JudgeStep
from twotower_kernels.testing.layouts import awkward


def assert_step_agrees(inputs: dict[str, Any], *, layout: int = 0) -> tt.RemaskResult:
    """The package's step against the specification's (`JudgeStep`), the inputs unchanged."""
    judge = JudgeStep(remask, inputs)
    laid_out = {k: awkward(v, layout) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    got = tt.remask(**laid_out)
    judge(got)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(laid_out[name].nan_to_num(), value.nan_to_num()), f"{name} was changed"
    return got
