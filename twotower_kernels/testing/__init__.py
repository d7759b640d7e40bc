"""For whoever writes kernels: what an op is, in float64, and whether a kernel of yours is it.

`check(op, kernel)` draws inputs and returns a `Report`; `strategies` draws them for tests of your own. Both need
Hypothesis, which the rest does not. See docs/testing_your_kernel.md.
"""

from __future__ import annotations

import importlib
from typing import Any

from twotower_kernels.testing.budget import (
    Mismatch,
    Yardstick,
    assert_results_within_budget,
    assert_same_specials,
    assert_within_budget,
)
from twotower_kernels.testing.layouts import awkward
from twotower_kernels.testing.properties import assert_deterministic, assert_row_invariant, assert_untouched

_NEED_HYPOTHESIS = {"check": "checking", "OPS": "cases", "strategies": "strategies"}

__all__ = [
    "OPS",
    "Mismatch",
    "Yardstick",
    "assert_deterministic",
    "assert_results_within_budget",
    "assert_row_invariant",
    "assert_same_specials",
    "assert_untouched",
    "assert_within_budget",
    "awkward",
    "check",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_HYPOTHESIS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_NEED_HYPOTHESIS[name]}")
    return module if name == "strategies" else getattr(module, name)
