"""Reads the scheme text that the code of the DominoSearch paper writes.

Grammar: the first line is a Python dict literal, ``{'SparseConv0_3-64-(7, 7)': [16, 16], ..., 'Linear0_2048-1000':
[4, 16]}``: type and running number, input and output channels, kernel; then ``[N, M]`` with N kept of every M. There
are no layer names, so layers are matched by order and shape.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import FormatError
from .pattern import Pattern
from .registry import canonical_name, weights
from .scheme import Scheme

_KEY = re.compile(
    r"(?P<kind>SparseConv|Linear)(?P<number>\d{1,6})_(?P<cin>\d{1,9})-(?P<cout>\d{1,9})"
    r"(?:-\((?P<kh>\d{1,6}), ?(?P<kw>\d{1,6})\))?"
)

# Module names for the side branch of a residual block. That code's models register it after the block's main path,
# others before it; where both hold layers of the same shape only the name tells them apart.
_SIDE_BRANCHES = frozenset({"downsample", "shortcut", "identity", "skip", "residual", "projection"})

# How far a layer of a repeated shape may stand from its place in the scheme: one residual block.
_WINDOW = 8

_Shape = tuple[Any, ...]  # ("Linear", in, out) or ("SparseConv", in, out, kh, kw)


@dataclass(frozen=True, slots=True)
class _Entry:
    label: str  # scheme key or parameter name
    shape: _Shape
    position: int
    pattern: Pattern | None = None


def looks_like(content: Any) -> bool:
    """Whether parsed content has the keys of a DominoSearch scheme."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and _KEY.fullmatch(key) for key in content)
    )


def read(content: str | Mapping[str, Any], model: nn.Module | None, *, source: str) -> Scheme:
    """Returns the scheme for ``model`` that the text (or its parsed dict) describes.

    Raises:
        FormatError: If it is no such text.
        ValueError: If ``model`` is ``None``, or its layers are not those of the scheme; all that do not match are named.
    """
    table = _parse(content, source) if isinstance(content, str) else content
    if not looks_like(table):
        raise FormatError(f"{source}: not a scheme: neither this library's JSON nor a DominoSearch dict of layers")
    wanted = _scheme_entries(table, source)
    if model is None:
        raise ValueError(f"{source} is a DominoSearch scheme, which does not name its layers: give model= to match them")
    present = _model_entries(model)
    matched = _match(wanted, present, source)
    patterns = {entry.label: matched[entry.label] for entry in sorted(present, key=lambda entry: entry.label)}
    order = {weight.name: weight for weight in weights(model)}
    dense = {name: str(weight.dense_because) for name, weight in order.items() if name not in patterns}
    scheme = Scheme({name: patterns[name] for name in order if name in patterns}, dense=dense, complete=True)
    scheme.resolve(model)
    return scheme


def _parse(text: str, source: str) -> Any:
    line = text.lstrip("\ufeff").split("\n", 1)[0].strip()
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise FormatError(
            f"{source}: not a scheme: neither JSON nor a DominoSearch dict literal on the first line"
        ) from None


def _scheme_entries(table: Mapping[str, Any], source: str) -> list[_Entry]:
    entries = []
    for position, (key, value) in enumerate(table.items()):
        match = _KEY.fullmatch(key)
        if match is None or (match["kind"] == "SparseConv") != (match["kh"] is not None):
            raise FormatError(f"{source}: {key!r} is not a DominoSearch layer key")
        if not (isinstance(value, (list, tuple)) and len(value) == 2):
            raise FormatError(f"{source}: {key!r} must have [N, M], got {value!r}")
        try:
            pattern = Pattern(*value)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{source}: {key!r}: {error}") from None
        kernel = () if match["kh"] is None else (int(match["kh"]), int(match["kw"]))
        shape = (match["kind"], int(match["cin"]), int(match["cout"]), *kernel)
        entries.append(_Entry(key, shape, position, pattern))
    return entries


def _model_entries(model: nn.Module) -> list[_Entry]:
    """The model's convolutions, then its linear layers, each in the order that the scheme's author counts them."""
    names = {(id(module), attr): weight.name for weight in weights(model) for module, attr in weight.places}
    convs: dict[str, _Shape] = {}
    linears: dict[str, _Shape] = {}

    def visit(module: nn.Module, path: str) -> None:
        name = names.get((id(module), "weight"))
        if name is not None and isinstance(module, nn.Conv2d):
            convs[name] = ("SparseConv", module.in_channels, module.out_channels, *module.kernel_size)
        elif name is not None and isinstance(module, nn.Linear):
            linears[name] = ("Linear", module.in_features, module.out_features)
        children = [(child_name, child) for child_name, child in module.named_children()]
        # A stable sort: side branches last, everything else as registered.
        for child_name, child in sorted(children, key=lambda item: item[0] in _SIDE_BRANCHES):
            visit(child, f"{path}.{child_name}")

    visit(model, canonical_name(""))
    found = [*convs.items(), *linears.items()]
    return [_Entry(name, shape, position) for position, (name, shape) in enumerate(found)]


def _match(wanted: list[_Entry], present: list[_Entry], source: str) -> dict[str, Pattern]:
    """Pairs the k-th layer of a shape in the scheme with the k-th of that shape in the model."""
    queues: dict[_Shape, list[_Entry]] = defaultdict(list)
    for entry in present:
        queues[entry.shape].append(entry)
    by_shape: dict[_Shape, list[_Entry]] = defaultdict(list)
    for entry in wanted:
        by_shape[entry.shape].append(entry)

    problems = []
    matched: dict[str, Pattern] = {}
    for shape, keys in by_shape.items():
        layers = queues.pop(shape, [])
        if len(keys) != len(layers):
            have = ", ".join(layer.label for layer in layers) or "none"
            problems.append(f"of shape {shape[1:]} the scheme has {', '.join(k.label for k in keys)}; the model {have}")
            continue
        ambiguous = len({key.pattern for key in keys}) > 1
        for key, layer in zip(keys, layers):
            if ambiguous and abs(key.position - layer.position) > _WINDOW:
                problems.append(
                    f"{key.label} would be {layer.label}, which stands {abs(key.position - layer.position)} layers away"
                )
            assert key.pattern is not None
            matched[layer.label] = key.pattern
    problems += [f"the scheme has no layer for {layer.label}" for layers in queues.values() for layer in layers]
    if problems:
        raise ValueError(f"{source} does not match the model:\n  " + "\n  ".join(problems))
    return matched
