"""The file that remembers what measurements have found: JSON, versioned, one result for each key.

Two tables are kept this way: cuSPARSELt's algorithms (``_lt_search.py``), and which of the ways to multiply
is the fastest for how many tokens (``crossover.py``).
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ._atomic import atomic_write

KeyT = TypeVar("KeyT", bound=tuple[str, ...])
ResultT = TypeVar("ResultT")


def cache_path(variable: str, name: str) -> Path:
    """The file that an environment variable names, or ``nmsparse_ext/NAME`` in the user's cache folder."""
    chosen = os.environ.get(variable, "").strip()
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    return Path(cache) / "nmsparse_ext" / name


class Kind(NamedTuple):
    """What a file is about.

    Attributes:
        section: Under which name the results stand.
        what: What they are, for messages.
        version: Of the file's layout; a file of another version counts as empty and is written anew.
    """

    section: str
    what: str
    version: int


class TunedFile(Generic[KeyT, ResultT]):
    """Results by key: a JSON file, read once. Any thread may look up and add.

    The file is ``{"version": 1, SECTION: {...}}`` with one level of names for each part of the keys. A file
    that cannot be read is left alone with a warning.

    Args:
        path: The file; it need not exist.
        kind: What it is about.
        key: Makes a key of its parts.
        encode: A result as plain JSON types.
        decode: The reverse; raises what Python raises where that is no result.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: Kind,
        key: type[KeyT],
        encode: Callable[[ResultT], dict[str, Any]],
        decode: Callable[[dict[str, Any]], ResultT],
    ) -> None:
        self.path = Path(path)
        self._kind, self._encode, self._decode = kind, encode, decode
        self._key: Callable[..., KeyT] = key
        self._depth = len(key._fields)  # type: ignore[attr-defined]  # keys are named tuples
        self._lock = threading.Lock()
        self._found: dict[KeyT, ResultT] | None = None
        self._writable = True
        self.added = 0  # how often; whoever holds on to what was found sees by it that there is more

    def get(self, key: KeyT) -> ResultT | None:
        """What was found, or None."""
        found = self._found  # once read it is there to stay; no lock in the way of every product
        if found is None:
            with self._lock:
                found = self._load()
        return found.get(key)

    def items(self) -> list[tuple[KeyT, ResultT]]:
        """All that was found."""
        with self._lock:
            return list(self._load().items())

    def add(self, key: KeyT, found: ResultT) -> None:
        """Remembers a result, in the file too, together with what others have written there meanwhile."""
        with self._lock:
            self._load()[key] = found
            self.added += 1
            if not self._writable:
                return
            written = self._read()
            assert self._found is not None
            self._found.update({other: result for other, result in written.items() if other != key})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.path) as file:
                    file.write((json.dumps(self._nested(), indent=1) + "\n").encode())
            except OSError as error:
                self._writable = False
                warnings.warn(f"{self._kind.what} cannot be kept: {error}", RuntimeWarning, stacklevel=2)

    def __len__(self) -> int:
        if self._found is not None:
            return len(self._found)
        with self._lock:
            return len(self._load())

    def _nested(self) -> dict[str, Any]:
        assert self._found is not None
        section: dict[str, Any] = {}
        for one, result in sorted(self._found.items(), key=lambda item: item[0]):
            level = section
            for part in one[:-1]:
                level = level.setdefault(part, {})
            level[one[-1]] = self._encode(result)
        return {"version": self._kind.version, self._kind.section: section}

    def _load(self) -> dict[KeyT, ResultT]:
        if self._found is None:
            self._found = self._read()
        return self._found

    def _read(self) -> dict[KeyT, ResultT]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] != self._kind.version:
                return {}
            return self._flat((), stored[self._kind.section])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._writable = False
            warnings.warn(
                f"{self.path} is no table of {self._kind.what} and is left alone "
                f"({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=2,
            )
            return {}

    def _flat(self, parts: tuple[str, ...], level: dict[str, Any]) -> dict[KeyT, ResultT]:
        if len(parts) == self._depth:
            return {self._key(*parts): self._decode(level)}
        flat: dict[KeyT, ResultT] = {}
        for part, below in level.items():
            flat.update(self._flat((*parts, part), below))
        return flat
