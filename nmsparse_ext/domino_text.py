"""Reads and writes the scheme text that the code of the DominoSearch paper writes.

Grammar: the first line is a Python dict literal, such as ``{'SparseConv0_3-64-(7, 7)': [16, 16],
'Linear0_2048-1000': [4, 16]}``. A key is the layer's type, its number among those, input and output channels,
and the kernel of a convolution; a value is ``[N, M]``, N kept of every M. Layers have no names, so they are
matched by order and shape.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .errors import FormatError
from .pattern import Pattern
from .scheme import Scheme
from .weights import weights

_KEY = re.compile(
    r"SparseConv[0-9]{1,9}_([0-9]{1,9})-([0-9]{1,9})-\(([0-9]{1,9}), ?([0-9]{1,9})\)"
    r"|Linear[0-9]{1,9}_([0-9]{1,9})-([0-9]{1,9})"
)

# Names of the side branch of a residual block. The authors' models register it after the main path, others
# before it; where both have a layer of the same shape, only the name tells which is which.
_SIDE_BRANCHES = frozenset({"downsample", "shortcut", "conv_shortcut", "skip", "projection"})

# How many layers one residual block has, with some reserve. A layer that would have to move further than this
# is in another block, and the model is not the one that the scheme was made for.
_WINDOW = 8

_Shape = tuple[int, ...]  # (in, out, kernel height, kernel width), or (in, out) of a Linear


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str  # the scheme's key, or the model's parameter name
    shape: _Shape
    position: int  # among layers of its type
    names: tuple[str, ...] = ()  # all names of a tied weight


def parse(text: str) -> dict[str, Pattern]:
    """Returns ``{layer key: pattern}``.

    Raises:
        FormatError: If ``text`` is not of this grammar.
    """
    lines = text.split("\n", 1)
    try:
        table = ast.literal_eval(lines[0].strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise FormatError("it is neither JSON nor a DominoSearch dict on the first line") from None
    if not isinstance(table, dict) or not table:
        raise FormatError("its first line must be a dict of layers, as DominoSearch writes it")
    patterns = {}
    for key, value in table.items():
        if not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise FormatError(f"{key!r} is no layer as DominoSearch names them")
        if not (isinstance(value, (list, tuple)) and len(value) == 2):
            raise FormatError(f"{key!r} must have [N, M], got {value!r}")
        try:
            patterns[key] = Pattern(*value)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{key!r}: {error}") from None
    return patterns


def match(table: dict[str, Pattern], model: nn.Module) -> Scheme:
    """Returns the scheme for ``model`` that ``table`` describes.

    The k-th layer of a shape in the scheme is the k-th of that shape in the model, where a block's side
    branch counts after its main path. Layers of other types are dense.

    Raises:
        ValueError: If the layers are not the same ones, or so far from their places that a layer of the right
            shape is hardly the right layer. All of them are named.
    """
    present = _by_shape(_model_layers(model))
    patterns: dict[str, Pattern] = {}
    problems: list[str] = []
    for shape, wanted in _by_shape(_table_layers(table)).items():
        found = present.pop(shape, [])
        if len(wanted) != len(found):
            problems.append(f"of shape {shape} the scheme has {_names(wanted)}; the model {_names(found)}")
            continue
        # If all of them have the same pattern, it does not matter which is which.
        matters = len({table[layer.name] for layer in wanted}) > 1
        for want, have in zip(wanted, found, strict=True):
            patterns[have.name] = table[want.name]
            distance = abs(want.position - have.position)
            if matters and distance > _WINDOW:
                problems.append(f"{have.name}, the match of {want.name}, stands {distance} layers away")
    problems += [f"the scheme has no {layer.name}" for layers in present.values() for layer in layers]
    if problems:
        raise ValueError("\n  ".join(problems))
    listed = weights(model)
    other = "of a type that DominoSearch does not prune"
    return Scheme(
        {weight.name: patterns[weight.name] for weight in listed if weight.name in patterns},
        dense={w.name: w.dense_because or other for w in listed if w.name not in patterns},
        complete=True,
    )


def dump(patterns: Mapping[str, Pattern], model: nn.Module, *, dense: Pattern) -> str:
    """Returns the text for a model whose weights have these patterns; the others are listed as ``dense``.

    Raises:
        ValueError: If a pattern is of a weight that the text has no line for.
    """
    layers = _model_layers(model)
    unknown = sorted(patterns.keys() - {name for layer in layers for name in layer.names})
    if unknown:
        raise ValueError(
            f"DominoSearch knows 2-D convolutions and linear layers only, not {', '.join(unknown)}"
        )
    table = {}
    for layer in layers:
        inputs, outputs, *kernel = layer.shape
        kind = f"SparseConv{layer.position}" if kernel else f"Linear{layer.position}"
        key = f"{kind}_{inputs}-{outputs}" + (f"-({kernel[0]}, {kernel[1]})" if kernel else "")
        pattern = next((patterns[name] for name in layer.names if name in patterns), dense)
        table[key] = [pattern.n, pattern.m]
    return repr(table) + "\n"


def _table_layers(table: dict[str, Pattern]) -> list[_Layer]:
    layers = []
    counts = {2: 0, 4: 0}
    for key in table:
        found = _KEY.fullmatch(key)
        assert found is not None  # parse() has seen to it
        shape = tuple(int(number) for number in found.groups() if number is not None)
        layers.append(_Layer(key, shape, counts[len(shape)]))
        counts[len(shape)] += 1
    return layers


def _model_layers(model: nn.Module) -> list[_Layer]:
    """The model's 2-D convolutions and linear layers, in the order in which the authors' models have them."""
    known = {(id(module), attr): weight for weight in weights(model) for module, attr in weight.places}
    layers: dict[str, _Layer] = {}
    counts = {2: 0, 4: 0}

    def visit(module: nn.Module) -> None:
        weight = known.get((id(module), "weight"))
        shape: _Shape = ()
        if isinstance(module, nn.Conv2d):
            shape = (module.in_channels, module.out_channels, *module.kernel_size)
        elif isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
        if shape and weight is not None and weight.name not in layers:
            layers[weight.name] = _Layer(weight.name, shape, counts[len(shape)], weight.names)
            counts[len(shape)] += 1
        # The sort is stable: side branches go last, the others stay as they are.
        for _, child in sorted(module.named_children(), key=lambda item: item[0] in _SIDE_BRANCHES):
            visit(child)

    visit(model)
    return list(layers.values())


def _by_shape(layers: list[_Layer]) -> dict[_Shape, list[_Layer]]:
    result: dict[_Shape, list[_Layer]] = {}
    for layer in layers:
        result.setdefault(layer.shape, []).append(layer)
    return result


def _names(layers: list[_Layer]) -> str:
    return ", ".join(layer.name for layer in layers) or "none"
