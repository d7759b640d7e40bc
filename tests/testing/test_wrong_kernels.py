"""Every wrong kernel is found, by the promise that it breaks."""

from functools import partial

import pytest
import torch

from tests.testing.wrong import adaln, attention, linear, mamba2, moe, remask  # noqa: F401 (they fill the collection)
from tests.testing.wrong.collection import COLLECTION
from twotower_kernels.testing import OPS, check

EXAMPLES = 200  # what a caller gets who asks for nothing else


def assert_found(name: str, **options: object) -> None:
    op, kernel, promises = COLLECTION[name]
    report = check(op, kernel, **options)  # type: ignore[arg-type]
    broken = {failure.promise for failure in report.failures}
    assert broken & set(promises), f"{name}: expected one of {promises} broken\n{report}"
    assert not report


def test_every_op_has_a_wrong_kernel() -> None:
    assert {wrong.op for wrong in COLLECTION.values()} == set(OPS)


@pytest.mark.thorough
@pytest.mark.parametrize("name", COLLECTION)
def test_every_wrong_kernel_is_found(name: str) -> None:
    assert_found(name, examples=EXAMPLES)
