"""Running a module of ours once another library has been imported, and that library before our modules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
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


def import_before(theirs: str, package: str, *, without: Collection[str]) -> None:
    """Has ``theirs`` imported before any module of ``package``, so that `import_after` finds none half done.

    A module that imports ``theirs`` itself is half done at that point, and what is to be imported after
    ``theirs`` may need it.

    Args:
        theirs: Full name of a module.
        package: Full name of our package.
        without: Names within the package that do not need ``theirs``; what lies below them does not either.
    """
    sys.meta_path.insert(0, _First(theirs, package, frozenset(without)))


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
        spec = _found_behind(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


def _found_behind(self: MetaPathFinder, fullname: str, path: Any, target: Any) -> ModuleSpec | None:
    """What the finders after this one find."""
    for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
        find = getattr(finder, "find_spec", None)  # which some old ones lack, as importlib knows
        spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Wrapped(Loader):
    """Another loader, of which nothing is left in a module that has been run."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_code(), get_source(), is_package(), ...

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)


class _Loader(_Wrapped):
    """Another loader, and an import after the first time that it has run the module."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        super().__init__(loader)
        self.finder = finder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _import(self.finder.ours)


class _First(MetaPathFinder):
    """Lets the finders after it find our modules, and has their loaders import another library first."""

    def __init__(self, theirs: str, package: str, without: frozenset[str]) -> None:
        self.theirs, self.package, self.without = theirs, package, without

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != self.package or not name or name.partition(".")[0] in self.without:
            return None
        if self.theirs in sys.modules or self not in sys.meta_path:
            return None
        spec = _found_behind(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader, self.theirs)
        return spec


class _LateLoader(_Wrapped):
    """Another loader, whose module runs after another library, unless that has brought the module already."""

    def __init__(self, loader: Loader, theirs: str) -> None:
        super().__init__(loader)
        self.theirs = theirs
        self.brought: tuple[ModuleType, ModuleSpec | None] | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        import_module(self.theirs)
        module = sys.modules.get(spec.name)
        if module is None:
            return super().create_module(spec)
        self.brought = module, module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.brought is None:
            super().exec_module(module)
        else:
            module.__spec__ = self.brought[1]
