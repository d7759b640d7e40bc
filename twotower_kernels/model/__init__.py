"""The TwoTower model: its layers, what its towers leave behind, loading, and generation, composed of the ops."""
