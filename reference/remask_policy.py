"""The rule of a remasking step: options, which the specification and the kernels read from one file."""

from twotower_kernels.options.remask_policy import RemaskPolicy

__all__ = ["RemaskPolicy"]
