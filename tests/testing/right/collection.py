"""The list of right kernels, which grows as their modules are imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COLLECTION: dict[str, tuple[str, Callable[..., Any]]] = {}


def right(op: str, kernel: Callable[..., Any], name: str = "") -> None:
    """Enters a kernel of this op into the collection."""
    name = f"{op}-{name or kernel.__name__}"
    assert name not in COLLECTION, name
    COLLECTION[name] = op, kernel
