"""Constants of the kernels that only measurement can decide, and how to try each of their values.

They may not all be there, and what is fastest becomes the constant; this is the one place that asks what there is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

# Programmatic dependent launch, read at every launch. How the experts' weights are streamed: a name in a table.
LAUNCHERS = ("triton.launch", "cuda.build")
STREAMED = "triton.moe_tuning"


@dataclass(frozen=True)
class Way:
    """Values for some constants: (module, name of the constant, value). same_bits: no result may change by them."""

    name: str
    values: tuple[tuple[ModuleType, str, Any], ...]
    same_bits: bool = True

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, kernels are launched so."""
        with ExitStack() as stack:
            for module, constant, value in self.values:
                stack.enter_context(mock.patch.object(module, constant, value))
            yield


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"twotower_kernels.{name}")
    except ImportError:  # no Triton, no such file
        return None


def ways() -> list[Way]:
    """Those that there are to compare; the first is what is shipped."""
    found = [Way("as shipped", ())]
    launchers = [module for name in LAUNCHERS if (module := _module(name)) is not None and hasattr(module, "PDL")]
    for value in (False, True) if launchers else ():
        found.append(Way(f"PDL {'on' if value else 'off'}", tuple((module, "PDL", value) for module in launchers)))
    moe = _module(STREAMED)
    for stream in getattr(moe, "STREAMS", ()):
        found.append(Way(f"STREAM {stream}", ((moe, "STREAM", stream),), same_bits=False))
    return found
