"""Kernels of another processor under test here: an emulator runs them, in a process of its own (see emulated.py)."""
