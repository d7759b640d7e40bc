"""The CPU kernels and the ops' public functions, against the specification."""
