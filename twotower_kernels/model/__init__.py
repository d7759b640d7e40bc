"""The TwoTower model: its layers, what its towers leave behind, loading, and generation, composed of the ops."""

from twotower_kernels.model.state import ContextState
from twotower_kernels.model.two_tower import TwoTowerModel

__all__ = ["ContextState", "TwoTowerModel"]
