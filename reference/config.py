"""The released configuration, which the specification and the package read with one class."""

from twotower_kernels.options.config import TwoTowerConfig

__all__ = ["TwoTowerConfig"]
