"""Triton kernels, one file per family of operations. The dispatcher imports a file at its first call on a GPU."""
