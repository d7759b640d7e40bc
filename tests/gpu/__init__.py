"""Kernels for GPUs, tested without one."""
