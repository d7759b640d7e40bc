"""Right kernels in other shapes of code than ours, which `twotower_kernels.testing.check` must never accuse."""
