"""Running a module of ours once somebody has imported a module of another library, and not before."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(theirs: str, ours: str) -> None:
    """Imports ``ours`` as soon as ``theirs`` is imported: now if it has been, else when somebody does.

    Nothing of the other library is imported for it. If ``ours`` cannot work with the version that is
    installed it raises ``ImportError``, which is not the concern of whoever imports ``theirs``: it is kept
    quiet here, and seen by whoever imports ``ours`` by name. Any other error is a warning here: it must not
    keep the other library from being imported.

    Args:
        theirs: Full name of a module.
        ours: Full name of a module.
    """
    if sys.modules.get(theirs) is not None:  # None keeps it from being imported
        _import(ours)
    else:
        sys.meta_path.insert(0, _Finder(theirs, ours))


def _import(ours: str) -> None:
    try:
        import_module(ours)
    except ImportError:
        pass
    except Exception as error:
        warnings.warn(f"{ours} does not work here: {type(error).__name__}: {error}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Lets the finders after it find the module, and has its loader call back."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        # Whoever only asks where the module is (`importlib.util.find_spec`) takes nothing away.
        if fullname != self.theirs or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)  # which some old ones lack, as importlib knows
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Another loader, and an import after the first time that it has run the module."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_code(), get_source(), is_package(), ...

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _import(self.finder.ours)
