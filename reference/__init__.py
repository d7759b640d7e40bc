"""The specification of TwoTower: plain PyTorch, right in float64, differentiable, knowing nothing of the kernels."""

if __name__ == "reference":  # found beside the package, in a checkout: the same modules
    from twotower_kernels.short_names import shorten

    shorten(__name__)
