"""Right kernels whose steps are methods, for `tests/testing/wrong` to replace one at a time."""
