"""The JSON that describes packed weights inside a safetensors file, written here, and read with suspicion.

A file holds for each packed weight ``<name>.values`` and ``<name>.indices``, and every other tensor under its
own name. The safetensors metadata (text to text) has one entry ``nmsparse`` with this JSON::

    {"version": 1,
     "weights": {"fc1.weight": {"pattern": "2:4", "group_dim": 1, "shape": [64, 128],
                                "remainder": "error", "dtype": "float32", "encoding": "index"}},
     "aliases": {"head.weight": "embed.weight"}}

``aliases`` lists further names of tied tensors, packed or not, which are stored once.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._checks import MAX_DIMS, WEIGHT_DTYPES
from ..errors import FormatError
from ..pattern import Pattern
from ..tensor import NMTensor, Remainder

METADATA_KEY = "nmsparse"
VERSION = 1
VALUES = ".values"
INDICES = ".indices"

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
# Of one dim: far above any weight, far below where products of five overflow in our index maths.
_MAX_SIZE = 1 << 40
# Rows of a weight whose rows are empty: the file's size sets no bound to them, and kernels walk over rows.
_MAX_EMPTY = 1 << 24


@dataclass(frozen=True)
class PackedEntry:
    """One packed weight as the metadata describes it."""

    pattern: Pattern
    group_dim: int
    shape: tuple[int, ...]
    remainder: Remainder
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: NMTensor) -> PackedEntry:
        """Describes ``weight``."""
        values = weight.values
        return cls(weight.pattern, weight.group_dim, tuple(weight.shape), weight.remainder, values.dtype)

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON types."""
        return {
            "pattern": str(self.pattern),
            "group_dim": self.group_dim,
            "shape": list(self.shape),
            "remainder": self.remainder,
            "dtype": str(self.dtype).removeprefix("torch."),
            "encoding": self.pattern.encoding,
        }


@dataclass(frozen=True)
class Contents:
    """What a file says about itself."""

    weights: dict[str, PackedEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def add(self, other: Contents) -> None:
        """Takes up what another file of the same model says; transformers writes all of it into each shard.

        Raises:
            FormatError: If they contradict each other.
        """
        mine, theirs = ({**contents.weights, **contents.aliases} for contents in (self, other))
        contradicted = sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
        if contradicted:
            raise FormatError(f"{brief(contradicted)} are described by several files, not alike")
        self.weights.update(other.weights)
        self.aliases.update(other.aliases)

    def of(self, stored: Iterable[str]) -> Contents:
        """What concerns the tensors of that name, which hold each packed weight as a whole or not at all."""
        stored = set(stored)
        weights = {name: entry for name, entry in self.weights.items() if name + VALUES in stored}
        aliases = {alias: name for alias, name in self.aliases.items() if name in weights or name in stored}
        return Contents(weights, aliases)

    def to_metadata(self) -> dict[str, str]:
        """The safetensors metadata; ``format`` is what other readers of PyTorch files look for."""
        content = {
            "version": VERSION,
            "weights": {name: entry.to_json() for name, entry in self.weights.items()},
            "aliases": self.aliases,
        }
        return {"format": "pt", METADATA_KEY: json.dumps(content, ensure_ascii=False, separators=(",", ":"))}


def parse_metadata(metadata: Mapping[str, str] | None) -> Contents:
    """Reads what `Contents.to_metadata` writes; a file without our entry holds dense tensors only.

    Raises:
        FormatError: If the entry is not exactly what the format says; the message names the weight and the
            reason.
    """
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        return Contents()
    content = strict_json(f"metadata entry {METADATA_KEY!r}", text)
    # Before anything else: other versions may have other entries.
    version = content.get("version", VERSION) if isinstance(content, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise FormatError(
            f"format version {version!r} is not known to this release, which reads version {VERSION}"
        )
    content = _object("metadata", content, {"version", "weights", "aliases"})
    if not isinstance(content["weights"], dict):
        raise FormatError(f"'weights' must be an object, got {brief(content['weights'])}")
    weights = {name: _entry(name, entry) for name, entry in content["weights"].items()}
    return Contents(weights, _aliases(content["aliases"]))


def _entry(name: str, content: Any) -> PackedEntry:
    where = f"weight {name!r}"
    content = _object(where, content, {"pattern", "group_dim", "shape", "remainder", "dtype", "encoding"})
    if not isinstance(content["pattern"], str):
        raise FormatError(f"{where}: pattern must be text, got {brief(content['pattern'])}")
    try:
        pattern = Pattern.parse(content["pattern"])
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    shape = content["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMS:
        raise FormatError(f"{where}: shape must be a list of 1 to {MAX_DIMS} sizes, got {brief(shape)}")
    if any(type(size) is not int or not 0 <= size <= _MAX_SIZE for size in shape):
        raise FormatError(f"{where}: sizes must be integers from 0 to {_MAX_SIZE}, got {brief(shape)}")
    if 0 in shape and math.prod(size for size in shape if size) > _MAX_EMPTY:
        raise FormatError(f"{where}: shape of a weight without elements is too large, got {brief(shape)}")
    group_dim = content["group_dim"]
    if type(group_dim) is not int or not 0 <= group_dim < len(shape):
        raise FormatError(f"{where}: group_dim must be in [0, {len(shape)}), got {brief(group_dim)}")
    remainder = content["remainder"]
    if remainder not in ("error", "pad"):
        raise FormatError(f"{where}: remainder must be 'error' or 'pad', got {brief(remainder)}")
    if remainder == "error" and shape[group_dim] % pattern.m:
        raise FormatError(
            f"{where}: size {shape[group_dim]} of group dim {group_dim} is no multiple of m = {pattern.m}, "
            "and remainder is 'error'"
        )
    dtype = content["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, got {brief(dtype)}")
    if content["encoding"] != pattern.encoding:
        raise FormatError(
            f"{where}: encoding of {pattern} is {pattern.encoding!r}, got {brief(content['encoding'])}"
        )
    return PackedEntry(pattern, group_dim, tuple(shape), remainder, _DTYPES[dtype])


def _aliases(content: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        raise FormatError(f"'aliases' must be an object, got {brief(content)}")
    for alias, name in content.items():
        if not isinstance(name, str):
            raise FormatError(f"alias {alias!r} must name a tensor, got {brief(name)}")
        if name in content:
            raise FormatError(f"alias {alias!r} points to {name!r}, which is an alias itself")
    return content


def _object(where: str, content: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise FormatError(f"{where} must be a JSON object, got {brief(content)}")
    if content.keys() != keys:
        missing, unknown = sorted(keys - content.keys()), sorted(content.keys() - keys)
        raise FormatError(f"{where}: missing entries {missing}, unknown entries {brief(unknown)}")
    return content


def strict_json(what: str, text: str | bytes) -> Any:
    """Parses JSON, and refuses what parsers disagree on: NaN, Infinity, and the same key twice.

    Raises:
        FormatError: If ``text`` is no such JSON; ``what`` is its name in the message.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise ValueError(f"entries {brief(twice)} appear more than once")
        return result

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is no JSON: {error}") from None


def brief(value: object) -> str:
    """``repr`` for a message, of what may be long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
