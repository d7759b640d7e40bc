"""The list of wrong kernels, which grows as their modules are imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Wrong(NamedTuple):
    """A kernel that is wrong, the op it claims to be, and the properties of which one must be found broken."""

    op: str
    kernel: Callable[..., Any]
    breaks: tuple[str, ...]


COLLECTION: dict[str, Wrong] = {}


def wrong(op: str, *breaks: str) -> Callable[[Any], Any]:
    """Enters a function, or the one instance of a class, into the collection under its name."""

    def enter(kernel: Any) -> Any:
        name = f"{op}-{kernel.__name__}"
        assert name not in COLLECTION, name
        COLLECTION[name] = Wrong(op, kernel() if isinstance(kernel, type) else kernel, breaks)
        return kernel

    return enter
