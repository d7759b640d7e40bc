"""Right kernels of other shapes of code are never accused."""

import pytest

from tests.testing.right import adaln, attention, linear, mamba2, moe, remask  # noqa: F401 (they fill the collection)
from tests.testing.right.collection import COLLECTION
from twotower_kernels.testing import OPS, check

SUITE = (
    *("block_attention-sdpa", "block_attention-Tiles", "merge_attention-by_logaddexp", "moe_route-RouteBySorting"),
    *("moe_experts-ExpertAfterExpert", "mamba2_scan-Chunked5", "linear-of_pytorch", "remask-greedy"),
)


def assert_not_accused(name: str, examples: int, seed: int) -> None:
    op, kernel = COLLECTION[name]
    report = check(op, kernel, examples=examples, seed=seed)
    assert report, f"seed {seed}\n{report}"


def test_every_op_has_a_right_kernel() -> None:
    assert {op for op, _ in COLLECTION.values()} == set(OPS)


@pytest.mark.parametrize("name", SUITE)
def test_right_kernels_are_not_accused(name: str) -> None:
    assert_not_accused(name, 8, 1)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", COLLECTION)
def test_right_kernels_are_never_accused(name: str, seed: int) -> None:
    assert_not_accused(name, 150, seed)
