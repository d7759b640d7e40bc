"""The specification of TwoTower: plain PyTorch, right in float64, differentiable, knowing nothing of the kernels."""
