"""One module under two names: `reference.moe` is `twotower_kernels.reference.moe`, never a second copy of it.

From a checkout's root Python finds the folders `reference` and `bench` by themselves, too. A second copy of a module
would have classes of its own, which are not those that the package knows. So each of the two folders, imported under
its short name, calls `shorten`, and from then on imports of the short name are answered with the package's own modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import Any


def shorten(name: str) -> None:
    """Makes `name`, and modules below it, another name of `twotower_kernels.name`. For the folder's own `__init__`."""
    sys.modules[name] = importlib.import_module(f"{__package__}.{name}")
    sys.meta_path.insert(0, _ShortNames(name))


class _ShortNames(MetaPathFinder):
    """Finds `name.module` at `twotower_kernels.name.module`."""

    def __init__(self, name: str) -> None:
        self.prefix = f"{name}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        real = find_spec(f"{__package__}.{fullname}") if fullname.startswith(self.prefix) else None
        return real and spec_from_loader(fullname, _Loader(real), origin=real.origin)


class _Loader(InspectLoader):
    """Loads the module that a spec describes. `python -m` asks for its code instead, and runs that as `__main__`."""

    def __init__(self, real: ModuleSpec) -> None:
        self.real = real

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.real.name)  # what the import statement then returns

    def get_code(self, fullname: str) -> CodeType | None:
        loader: Any = self.real.loader
        return loader.get_code(self.real.name)

    def get_source(self, fullname: str) -> str | None:
        loader: Any = self.real.loader
        return loader.get_source(self.real.name)

    def is_package(self, fullname: str) -> bool:
        return self.real.submodule_search_locations is not None
