"""Hypothesis, which draws the inputs and finds the smallest that fails; the package does not depend on it."""

from __future__ import annotations

try:
    import hypothesis
except ImportError:
    raise ImportError(
        "drawing inputs needs Hypothesis: pip install 'twotower-kernels[testing]', or pip install hypothesis"
    ) from None

strategies = hypothesis.strategies

__all__ = ["hypothesis", "strategies"]
