"""Settings that hold for every test."""

import os

import torch
from hypothesis import settings

# A property that fails prints a blob that reproduces it; the merge gate draws the same examples every time.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tensors are small: threads cost more than they bring, and the test processes share the cores.
torch.set_num_threads(1)
