"""Scheme files: our JSON, written and read; the DominoSearch text is recognised here and read next door."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import nn

from . import domino_text
from ._arguments import check_path
from ._atomic import atomic_write
from .errors import FormatError
from .scheme import Scheme

FORMAT = "nmsparse_ext.scheme"
VERSION = 1

_FIELDS = {"format": str, "version": int, "complete": bool, "patterns": dict, "dense": dict}
_MAX_BYTES = 64 << 20  # a scheme is a line or two per layer: what is larger is some other file


def write(scheme: Scheme, path: str | os.PathLike[str]) -> None:
    """Writes ``scheme`` as JSON; see `Scheme.save`."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "complete": scheme.complete,
        "patterns": {name: str(pattern) for name, pattern in scheme.items()},
        "dense": dict(scheme.dense),
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read(path: str | os.PathLike[str], model: nn.Module | None) -> Scheme:
    """Reads a scheme of either kind; see `Scheme.load`. ``model`` is needed for DominoSearch text only."""
    source = check_path("path", path)
    with open(source, "rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    try:
        if len(raw) > _MAX_BYTES:
            raise FormatError(f"larger than {_MAX_BYTES >> 20} MiB")
        try:
            text = raw.decode("utf-8-sig")
            return _from_json(json.loads(text, object_pairs_hook=_unique))
        except json.JSONDecodeError:
            table = domino_text.parse(text)
    except RecursionError:
        raise FormatError(f"{source} is not a scheme: nested too deeply") from None
    except ValueError as error:  # ours, and those of decoding and of numbers beyond all bounds
        raise FormatError(f"{source} is not a scheme: {error}") from None
    if model is None:
        raise ValueError(f"{source} is DominoSearch text, which does not name its layers: model= is needed")
    try:
        return domino_text.match(table, model)
    except ValueError as error:
        raise ValueError(f"{source} does not match the model:\n  {error}") from None


def _from_json(content: Any) -> Scheme:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f'it is JSON, but no object with "format": "{FORMAT}"')
    version = content.get("version")
    if version != VERSION:
        raise FormatError(f"it has version {version!r}, and this release reads version {VERSION}")
    for field, kind in _FIELDS.items():
        if type(content.get(field)) is not kind:
            raise FormatError(f"{field!r} must be of type {kind.__name__}, got {content.get(field)!r}")
    if unknown := sorted(content.keys() - _FIELDS.keys()):
        raise FormatError(f"it has the unknown fields {', '.join(map(repr, unknown))}")
    try:
        return Scheme(content["patterns"], dense=content["dense"], complete=content["complete"])
    except (TypeError, ValueError) as error:
        raise FormatError(str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FormatError(f"it has {key!r} twice")
        result[key] = value
    return result
