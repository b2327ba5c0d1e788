"""Running a module of ours once somebody has imported a module of another library, and not before."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_after(theirs: str, ours: str) -> None:
    """Imports ``ours`` as soon as ``theirs`` is imported: now if it has been, else when somebody does.

    Nothing of the other library is imported for it. If ``ours`` cannot work with the version that is
    installed it raises ``ImportError``, which is not the concern of whoever imports ``theirs``: it is kept
    quiet here, and seen by whoever imports ``ours`` by name.

    Args:
        theirs: Full name of a module.
        ours: Full name of a module.
    """
    if theirs in sys.modules:
        _import(ours)
    else:
        sys.meta_path.insert(0, _Finder(theirs, ours))


def _import(ours: str) -> None:
    with contextlib.suppress(ImportError):
        import_module(ours)


class _Finder(MetaPathFinder):
    """Lets the other finders find the module, and has its loader call back."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.theirs or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.ours)
        return spec


class _Loader(Loader):
    """Another loader, and an import afterwards."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import(self.ours)
