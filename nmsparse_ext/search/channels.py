"""Which channels of a model can be reordered without changing what it computes, and where that shows.

A *space* is a set of channels that several tensors share: what one layer puts out, norms and activations pass
on, and other layers take in. Its channels can come in any order, if every tensor that has them is reordered
alike: rows of the layers that produce them, entries of norms, columns of the layers that consume them.

Spaces are found by tracing (``torch.fx``): of the whole model, or of the largest parts of it that can be
traced. Only operations that are known to treat all channels alike carry a space on; anything else, and the
inputs and outputs of what was traced, pins it, with the reason.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..deploy.example import ExampleInput, example_call, run_example

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Norms over the last dim.
_ROW_NORMS = (nn.LayerNorm, nn.RMSNorm)
_POOLS = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 3),
}
_POOL_FUNCTIONS: dict[Any, int] = {
    F.max_pool1d: 1,
    F.avg_pool1d: 1,
    F.adaptive_avg_pool1d: 1,
    F.max_pool2d: 2,
    F.avg_pool2d: 2,
    F.adaptive_avg_pool2d: 2,
    F.max_pool3d: 3,
    F.avg_pool3d: 3,
    F.adaptive_avg_pool3d: 3,
}
_ELEMENTWISE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
_NAMES = (
    "relu",
    "relu_",
    "sigmoid",
    "tanh",
    "clone",
    "contiguous",
    "float",
    "to",
    "type_as",
    "square",
    "abs",
    "pow",
)
_FUNCTIONS = ("gelu", "silu", "leaky_relu", "elu", "mish", "softplus", "hardswish", "relu6", "dropout")
_ELEMENTWISE = {
    *(getattr(torch, name) for name in _NAMES if hasattr(torch, name)),
    *(getattr(F, name) for name in (*_NAMES, *_FUNCTIONS) if hasattr(F, name)),
    operator.pow,
    operator.neg,
}
_BINARY = {
    *(getattr(operator, name) for name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv")),
    *(getattr(torch, name) for name in ("add", "sub", "mul", "div")),
}
_BINARY_METHODS = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")


class Part(NamedTuple):
    """A dim of a parameter or buffer."""

    module: nn.Module
    attr: str
    dim: int


@dataclass(eq=False)
class Space:
    """Channels that several tensors share.

    Attributes:
        size: How many.
        parts: What has them besides the consumers: weights and biases of producers, norms.
        consumers: The weights that sum over them.
        pinned: Why their order must not change; ``None`` if it may.
    """

    size: int
    parts: list[Part] = field(default_factory=list)
    consumers: list[Part] = field(default_factory=list)
    pinned: str | None = None
    merged_into: Space | None = None

    def root(self) -> Space:
        """The space that this one is a part of by now."""
        return self if self.merged_into is None else self.merged_into.root()

    def merge(self, other: Space) -> Space:
        """One space of both."""
        a, b = self.root(), other.root()
        if a is not b:
            a.parts += b.parts
            a.consumers += b.consumers
            a.pinned = a.pinned or b.pinned
            b.merged_into = a
        return a


class _Value(NamedTuple):
    """What is known of a traced tensor: its channels, and the dim (``>= 0``) that they lie along."""

    space: Space
    dim: int


def find_spaces(model: nn.Module, example_input: ExampleInput) -> list[Space]:
    """Finds the channel spaces of a model that have consumers, pinned or not.

    Args:
        model: The model; it runs once, in eval mode and without gradients.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(module, (args, kwargs))

    found: list[Space] = []
    with example_call(model, example_input, None):  # in eval mode, as what runs here must leave no trace
        graphs = dict(_graphs(model))
        run_example(model, example_input, dict.fromkeys(graphs, before_forward))
        shared = _shared_parameters(model)
        for module, graph in graphs.items():
            if module in inputs:
                found += _Spaces(module, graph, shared).find(*inputs[module])
    return [space for space in found if space.consumers]


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that stand in several places."""
    places: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for attr, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), set()).add((id(module), attr))
    return {key for key, found in places.items() if len(found) > 1}


class _Tracer(fx.Tracer):
    """Looks into everything but the modules that are known here."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_conv1d(m) or super().is_leaf_module(m, module_qualified_name)


def _graphs(module: nn.Module) -> Iterator[tuple[nn.Module, fx.GraphModule]]:
    """The module traced, or the largest parts of it that can be."""
    if not any(True for _ in module.children()) or isinstance(module, nn.MultiheadAttention):
        return
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
    except Exception:  # what a forward may raise on a proxy has no end: it is looked at in parts
        for child in module.children():
            yield from _graphs(child)
        return
    yield module, graph


class _Spaces:
    """The spaces of one traced module."""

    def __init__(self, module: nn.Module, graph: fx.GraphModule, shared: set[int]) -> None:
        self._module = module
        self._graph = graph
        self._shared = shared
        self._values: dict[fx.Node, _Value] = {}
        self._lost: dict[fx.Node, str] = {}  # why nothing is known of a tensor's channels
        self._spaces: list[Space] = []

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Space]:
        """All spaces, given what the module is called with."""
        bound = inspect.signature(self._module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        given = list(bound.arguments.values())
        names = [node.target for node in self._graph.graph.nodes if node.op == "placeholder"]
        if len(names) != len(given):  # *args and the like
            return []
        try:
            with torch.no_grad():
                ShapeProp(self._graph).propagate(*given)
        except Exception:  # the traced graph does not run as the module does: nothing is known of it
            return []
        self._calls: dict[int, int] = {}
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":  # used in some other way than by calling its module
                parent, _, attr = str(node.target).rpartition(".")
                self._shared.add(id(getattr(self._graph.get_submodule(parent), attr)))
            if node.op == "call_module":
                key = id(self._submodule(node))
                self._calls[key] = self._calls.get(key, 0) + 1
        for node in self._graph.graph.nodes:
            value = self._visit(node)
            if value is not None:
                self._values[node] = value
            elif node not in self._lost:
                inherited = (self._lost[source] for source in node.all_input_nodes if source in self._lost)
                self._lost[node] = next(inherited, "is an input of the traced part")
        return [space for space in self._spaces if space.merged_into is None]

    def _submodule(self, node: fx.Node) -> nn.Module:
        # The graph module holds the very modules of the model.
        return self._graph.get_submodule(str(node.target))

    def _visit(self, node: fx.Node) -> _Value | None:
        if node.op == "call_module":
            return self._call_module(node, self._submodule(node))
        if node.op in ("call_function", "call_method"):
            return self._call(node)
        if node.op == "output":
            self._pin(node, "is an output of the traced part")
        return None

    # ------------------------------------------------------------------------------------------- modules

    def _call_module(self, node: fx.Node, module: Any) -> _Value | None:
        source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        value = self._values.get(source) if isinstance(source, fx.Node) else None
        kind: Any = type(module)
        reason = self._why_not(module)
        if reason is not None:
            if isinstance(getattr(module, "weight", None), Tensor):
                self._spaces.append(Space(0, consumers=[Part(module, "weight", 0)], pinned=reason))
            return self._pin(node, reason)
        if kind is nn.Linear or _is_conv1d(module):
            return self._product(node, module, value, out_dim=0 if kind is nn.Linear else 1, at=-1)
        if kind in _CONVS:
            if module.groups == 1:
                return self._product(node, module, value, out_dim=0, at=1)
            if (
                value is not None
                and value.dim == 1
                and module.groups == module.in_channels == module.out_channels
            ):
                return self._with_parts(value, module, ("weight", "bias"))
            return self._pin(node, "goes through a grouped convolution")
        if value is None:
            return None
        rank = len(_shape(node))
        if kind in _ELEMENTWISE_MODULES:
            return value
        if kind in _BATCH_NORMS and value.dim == 1:
            return self._with_parts(value, module, ("weight", "bias", "running_mean", "running_var"))
        if kind in _ROW_NORMS and len(module.normalized_shape) == 1 and value.dim == rank - 1:
            return self._with_parts(value, module, ("weight", "bias"))
        if kind in _POOLS and value.dim < rank - _POOLS[kind]:
            return value
        if kind is nn.Flatten:
            return self._flattened(node, value, module.start_dim, module.end_dim)
        return self._pin(node, f"goes through a {kind.__name__}")

    def _why_not(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        if self._calls[id(module)] > 1 and any(True for _ in module.parameters()):
            return f"a {name} is called more than once"
        if any(id(parameter) in self._shared for parameter in module.parameters()):
            return f"a {name} shares its weight"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {name} has hooks"
        return None

    def _product(
        self, node: fx.Node, module: Any, value: _Value | None, *, out_dim: int, at: int
    ) -> _Value | None:
        """A layer that sums over the channels in dim ``at`` of its input and puts out new ones there."""
        rank = len(_shape(node))
        dim = at % rank
        if value is not None and value.dim != dim:
            self._pin(node, f"has its channels in another dim than a {type(module).__name__} takes them")
        taken = None if value is None else value.space.root()
        if taken is None:
            source = next(iter(node.all_input_nodes), node)
            taken = Space(module.weight.shape[1 - out_dim], pinned=self._lost.get(source, "is not known"))
            self._spaces.append(taken)
        taken.consumers.append(Part(module, "weight", 1 - out_dim))
        space = Space(module.weight.shape[out_dim])
        self._spaces.append(space)
        space.parts.append(Part(module, "weight", out_dim))
        if module.bias is not None:
            space.parts.append(Part(module, "bias", 0))
        return _Value(space, dim)

    def _with_parts(self, value: _Value, module: nn.Module, attrs: Iterable[str]) -> _Value:
        held = [attr for attr in attrs if getattr(module, attr, None) is not None]
        value.space.root().parts.extend(Part(module, attr, 0) for attr in held)
        return value

    # ----------------------------------------------------------------------------------------- functions

    def _call(self, node: fx.Node) -> _Value | None:
        tracked = [source for source in node.all_input_nodes if source in self._values]
        if not tracked or "tensor_meta" not in node.meta:
            return None  # sizes and the like
        value = self._values[tracked[0]]
        target: Any = node.target
        is_method = node.op == "call_method"
        if (target in _BINARY_METHODS) if is_method else (target in _BINARY):
            return self._combined(node)
        if len(tracked) == 1 and node.args and node.args[0] is tracked[0]:
            if (target in _NAMES) if is_method else (target in _ELEMENTWISE):
                return value
            if not is_method and target in _POOL_FUNCTIONS:
                if value.dim < len(_shape(node)) - _POOL_FUNCTIONS[target]:
                    return value
            elif target == "flatten" or target is torch.flatten:
                bounds: dict[str, Any] = dict(
                    zip(("start_dim", "end_dim"), node.args[1:], strict=False)
                ) | dict(node.kwargs)
                return self._flattened(node, value, bounds.get("start_dim", 0), bounds.get("end_dim", -1))
            elif target == "mean" or target is torch.mean:
                return self._mean(node, value)
        return self._pin(node, f"goes through {getattr(target, '__name__', target)}")

    def _combined(self, node: fx.Node) -> _Value | None:
        """Sums and products, entry by entry: channels must meet the same channels, or one number for all."""
        shape = _shape(node)
        result: _Value | None = None
        for operand in node.args:
            if not isinstance(operand, fx.Node) or "tensor_meta" not in operand.meta:
                continue  # a number
            lacking = len(shape) - len(_shape(operand))
            value = self._values.get(operand)
            if value is None:
                continue
            dim = value.dim + lacking
            if result is not None and (result.dim != dim or _shape(operand)[value.dim] != shape[dim]):
                return self._pin(node, "meets other channels")
            space = value.space if result is None else result.space.merge(value.space)
            result = _Value(space, dim)
        assert result is not None  # a tracked operand brought us here
        for operand in node.args:
            if isinstance(operand, fx.Node) and operand not in self._values and "tensor_meta" in operand.meta:
                own = _shape(operand)
                at = result.dim - (len(shape) - len(own))
                if at >= 0 and own[at] != 1:
                    return self._pin(node, f"meets {operand.name}, whose order is fixed")
        if shape[result.dim] != result.space.root().size:
            return self._pin(node, "meets other channels")
        return result

    def _flattened(self, node: fx.Node, value: _Value, start: int, end: int) -> _Value | None:
        shape = _shape(next(source for source in node.all_input_nodes if source in self._values))
        first, last = start % len(shape), end % len(shape)
        if value.dim < first:
            return value
        if value.dim > last:
            return _Value(value.space, value.dim - (last - first))
        if math.prod(shape[first : last + 1]) != shape[value.dim]:
            return self._pin(node, "is flattened together with other dims")
        return _Value(value.space, first)

    def _mean(self, node: fx.Node, value: _Value) -> _Value | None:
        shape = _shape(node.all_input_nodes[0])
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if given is None:
            return self._pin(node, "goes through a mean over everything")
        dims = {int(d) % len(shape) for d in (given if isinstance(given, (tuple, list)) else [given])}  # type: ignore[arg-type]
        if value.dim in dims:
            return self._pin(node, "goes through a mean over channels")
        gone = 0 if len(_shape(node)) == len(shape) else sum(d < value.dim for d in dims)
        return _Value(value.space, value.dim - gone)

    def _pin(self, node: fx.Node, reason: str) -> _Value | None:
        """Nothing is known of what comes out; what goes in has to stay as it is."""
        self._lost[node] = reason
        for source in node.all_input_nodes:
            if source in self._values:
                root = self._values[source].space.root()
                root.pinned = root.pinned or reason
        return None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with a weight [in, out]."""
    return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


@torch.no_grad()
def reorder(space: Space, order: Tensor) -> None:
    """Puts the channels of a space into another order, in everything that has them."""
    for module, attr, dim in (*space.parts, *space.consumers):
        tensor = getattr(module, attr)
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
