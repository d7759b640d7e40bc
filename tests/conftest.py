"""Settings that hold for every test."""

import importlib.util
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: see triton_checks.py

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from tests import found
from tests.arm64.emulated import Emulated

pytest_plugins = ["twotower_kernels.testing.pytest_plugin"]  # whose marker docs/testing_your_kernel.md shows

# The suite draws the same examples everywhere, by hand and in the merge gate; `make fuzz` draws others each time. Every
# setting is given, for Hypothesis's own defaults depend on whether CI is set. How fast a machine draws decides nothing.
COMMON = dict(deadline=None, print_blob=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", **COMMON, derandomize=True)
settings.register_profile("fuzz", **COMMON, derandomize=False, report_multiple_bugs=False)
settings.load_profile("suite")

# Hypothesis mixes the constants of all modules that are loaded at the time into what it draws, so that the order of
# tests, and a number in any file, would change the examples of every property.
providers.is_local_module_file = lambda path: False

# The tensors are small: threads cost more than they bring, and the test processes share the cores.
torch.set_num_threads(1)

# `make sanitize` runs the tests on another build of the same kernels, `make arm64` on one for another processor.
library, emulator = os.environ.get("KERNEL_LIBRARY"), os.environ.get("KERNEL_EMULATOR")
if library and emulator:
    sys.modules["twotower_kernels._C"] = elsewhere = Emulated(emulator, library)
    elsewhere.know_remask()
elif library:
    spec = importlib.util.spec_from_file_location("twotower_kernels._C", library)
    assert spec is not None and spec.loader is not None
    sys.modules["twotower_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["twotower_kernels._C"])


def pytest_runtest_call(item: pytest.Function) -> None:
    found.replay(item)


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if not settings.default.derandomize and call.excinfo is not None:
        found.keep(node.nodeid, call.excinfo.value)
