"""What the specification of remasking has to fulfil, demanded of the kernel: the same tests, run on the package."""

from collections.abc import Iterator

import pytest

import twotower_kernels as tt
from tests.replay_policies import implementation, replay
from tests.specification import test_policies, test_remask

# The module's tests, collected here a second time. Left out: those of the specification's own schedule functions.
_OF_THE_SPECIFICATION = (
    "test_products_that_are_whole_are_not_lost_to_rounding",
    "test_schedules_from_the_start_spend_everything_and_are_inferred",
)
globals().update(
    {
        name: test
        for name, test in vars(test_remask).items()
        if name.startswith("test_") and name not in _OF_THE_SPECIFICATION
    }
)
test_the_op_does_what_the_words_say = test_policies.test_the_op_does_what_the_words_say


@pytest.fixture(scope="module", autouse=True)
def run_on_the_package() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_remask, "remask", tt.remask)
        patch.setattr(test_policies, "remask", tt.remask)
        yield


@pytest.mark.parametrize("name", test_policies.CASES)
def test_recorded_steps_come_out(name: str) -> None:
    assert replay(test_policies.CASES[name], implementation("package")) == []


def test_the_package_is_what_runs() -> None:
    assert test_remask.remask is tt.remask and test_policies.remask is tt.remask
