"""Every wrong kernel is found, by the promise that it breaks."""

import pytest

from tests.testing.wrong import adaln, attention, linear, mamba2, moe, remask  # noqa: F401 (they fill the collection)
from tests.testing.wrong.collection import COLLECTION
from twotower_kernels.testing import OPS, check
from twotower_kernels.testing.report import PROMISES

# Of every op one, and of every promise; with few examples, as the time of `make test` is short.
SUITE = {
    "adaln_norm-ScaleWithoutOne": 4,
    "append_kv-WrongPosition": 4,
    "block_attention-PaddingTimesZero": 8,
    "block_attention-scales_by_the_batch": 8,
    "block_attention-takes_every_tensor_for_contiguous": 8,
    "block_causal_attention-CausalByToken": 8,
    "context_attention-AlignedTopLeft": 8,
    "gated_residual-adds_in_place": 4,
    "gated_residual_adaln_norm-NormOfTheOldResidual": 4,
    "gated_rms_norm-MeanOverAllGroups": 8,
    "linear-linear_of_matrices": 8,
    "mamba2_scan-ConvStateShifted": 4,
    "merge_attention-EmptySideIsNaN": 8,
    "moe_experts-AddsExpertsInAnyOrder": 8,
    "moe_gate-ProductInFloat32": 4,
    "moe_plan-PairsDescend": 8,
    "moe_route-BiasInTheWeights": 8,
    "remask-MaskCanBeProposed": 8,
    "rms_norm-NormThroughBfloat16": 4,
}


def assert_found(name: str, examples: int) -> None:
    op, kernel, promises = COLLECTION[name]
    report = check(op, kernel, examples=examples)
    broken = {failure.promise for failure in report.failures}
    assert broken & set(promises), f"{name}: expected one of {promises} broken\n{report}"
    assert not report


def test_every_op_and_every_promise_has_a_wrong_kernel() -> None:
    for names in (COLLECTION, SUITE):
        assert {COLLECTION[name].op for name in names} == set(OPS)
        assert {promise for name in names for promise in COLLECTION[name].breaks} == set(PROMISES)


@pytest.mark.parametrize(("name", "examples"), SUITE.items())
def test_wrong_kernels_are_found(name: str, examples: int) -> None:
    assert_found(name, examples)


@pytest.mark.thorough
@pytest.mark.parametrize("name", COLLECTION)
def test_every_wrong_kernel_is_found(name: str) -> None:
    assert_found(name, 200)  # what a caller gets who asks for nothing else
