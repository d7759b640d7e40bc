"""Settings that hold for every test."""

import importlib.util
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: see triton_checks.py

import torch
from hypothesis import settings

# A property that fails prints a blob that reproduces it; the merge gate draws the same examples every time.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tensors are small: threads cost more than they bring, and the test processes share the cores.
torch.set_num_threads(1)

# `make sanitize` runs the tests on another build of the same kernels.
if library := os.environ.get("KERNEL_LIBRARY"):
    spec = importlib.util.spec_from_file_location("twotower_kernels._C", library)
    assert spec is not None and spec.loader is not None
    sys.modules["twotower_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["twotower_kernels._C"])
