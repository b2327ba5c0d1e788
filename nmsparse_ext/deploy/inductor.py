"""What ``torch.compile`` is told about packed layers: what follows one is done by its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .. import _ops  # noqa: F401  (registers torch.ops.nmsparse)

aten, prims = torch.ops.aten, torch.ops.prims

_CONV = torch.ops.nmsparse.panel_conv.default
_LINEAR = torch.ops.nmsparse.panel_linear
_PACKED = (_LINEAR.default, _LINEAR.without_gradients, _CONV)  # before torch 2.13 graphs have the second, too
_RESIDUAL = 4  # which argument of panel_conv it is
_MOVES = (aten.permute.default, aten.clone.default)
_X = "x"
_HALF, _ROOT_HALF = 0.5, 0.7071067811865476

#: Activation -> the expressions of ``x`` that it has become by the time of the pass: (op, arguments...).
_EXPRESSIONS: dict[str, tuple[Any, ...]] = {
    "relu": ((aten.relu.default, _X),),
    "gelu": (
        (
            aten.mul.Tensor,
            (aten.mul.Tensor, _X, _HALF),
            (aten.add.Tensor, (aten.erf.default, (aten.mul.Tensor, _X, _ROOT_HALF)), 1),
        ),
    ),
    "silu": (
        (aten.div.Tensor, _X, (aten.add.Tensor, (aten.exp.default, (aten.neg.default, _X)), 1)),
        (aten.mul.Tensor, _X, (aten.sigmoid.default, _X)),
    ),
}


def inductor_options() -> dict[str, Any]:
    """Options for compiling a model with packed weights for inference.

    ``torch.compile(model, options=inductor_options())``, called without gradients, lets packed layers apply
    the activation (relu, gelu, silu) that follows them, and packed convolutions of channels_last images add
    what is added to their result (the shortcut of a residual block). Sums are rounded after that, not before,
    so 16-bit results may differ in their last bits.

    Dense layers beside them gain from freezing, which lets oneDNN pack their weights once. The option
    ``"freezing"`` alone does not achieve it: that weights are constants is decided before options count. Set
    ``torch._inductor.config.freezing = True`` before the first call, or the environment variable
    ``TORCHINDUCTOR_FREEZING=1``.
    """
    return {"freezing": True, "post_grad_custom_pre_pass": FuseEpilogues()}


class FuseEpilogues(CustomGraphPass):
    """Replaces ``activation(packed layer + residual)`` by the packed layer that does all of that.

    For inductor's ``post_grad_custom_pre_pass``. What it does not recognise stays as it is.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Changes ``graph`` in place."""
        for layer in list(graph.nodes):
            if layer.target is _CONV and layer.args[_RESIDUAL] is None and layer.args[-1] == "none":
                _add_residual(layer)
        graph.eliminate_dead_code()
        for layer in list(graph.nodes):
            if layer.target in _PACKED and layer.args and layer.args[-1] == "none":
                _fuse(layer)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """What compiled code in caches depends on: this file."""
        return get_hash_for_files((__file__,))


def _add_residual(layer: fx.Node) -> None:
    """``permute(layer) + other`` becomes ``permute(layer with a residual)``, where the sum was."""
    moved = _only_user(layer)
    if moved is None or moved.target is not aten.permute.default:
        return
    end = _only_user(moved)
    if end is None or end.target is not aten.add.Tensor or end.kwargs or len(end.args) != 2:
        return
    other = end.args[1] if end.args[0] is moved else end.args[0]
    if not isinstance(other, fx.Node) or other is moved or not _alike(other, moved):
        return
    order: list[int] = moved.args[1]  # type: ignore[assignment]
    back = [order.index(d) for d in range(len(order))]
    graph = layer.graph
    with graph.inserting_before(end):
        residual = graph.call_function(aten.permute.default, (other, back))
        residual.meta["val"] = other.meta["val"].permute(back)
        arguments = (*layer.args[:_RESIDUAL], residual, *layer.args[_RESIDUAL + 1 :])
        summed = graph.call_function(_CONV, arguments)
        result = graph.call_function(aten.permute.default, (summed, order))
    summed.meta.update(layer.meta)
    result.meta.update(moved.meta)
    end.replace_all_uses_with(result)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors of a graph have the same sizes, layout, dtype and device: broadcasting is none."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    return (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)


def _fuse(layer: fx.Node) -> None:
    before = layer  # what the activation is applied to: the layer's result, perhaps with dims moved
    while len(before.users) == 1 and (user := next(iter(before.users))).target in _MOVES:
        before = user
    x = before
    if len(x.users) == 1 and (user := next(iter(x.users))).target is prims.convert_element_type.default:
        x = user
    for end in _downstream(x):
        for activation, expressions in _EXPRESSIONS.items():
            for expression in expressions:
                if _matches(expression, end, x) and _only_for(x, end):
                    _replace(layer, before, x, end, activation)
                    return


def _replace(layer: fx.Node, before: fx.Node, x: fx.Node, end: fx.Node, activation: str) -> None:
    if x is not before:  # computed in another dtype, and has to come back from there
        users = list(end.users)
        back = (prims.convert_element_type.default, end, before.meta["val"].dtype)
        if len(users) != 1 or (users[0].target, *users[0].args) != back:
            return
        end = users[0]
    layer.args = (*layer.args[:-1], activation)
    end.replace_all_uses_with(before)


def _downstream(x: fx.Node) -> Iterator[fx.Node]:
    """Nodes that an expression of ``x`` may end in: it has few operations."""
    seen, level = set(), [x]
    for _ in range(4):
        level = [user for node in level for user in node.users if user not in seen]
        seen.update(level)
    return (node for node in x.graph.nodes if node in seen)


def _matches(expression: Any, node: Any, x: fx.Node) -> bool:
    if expression is _X:
        return node is x
    if not isinstance(expression, tuple):
        return bool(node == expression)
    if not isinstance(node, fx.Node) or node.target is not expression[0] or node.kwargs:
        return False
    return len(node.args) == len(expression) - 1 and all(
        _matches(part, argument, x) for part, argument in zip(expression[1:], node.args, strict=True)
    )


def _only_for(x: fx.Node, end: fx.Node) -> bool:
    """Whether ``x`` and all between it and ``end`` are used for nothing but ``end``."""
    inner, todo = {x}, [x]
    while todo:
        for user in todo.pop().users:
            if user is end or user in inner:
                continue
            if user.op == "output" or len(inner) > 8:
                return False
            inner.add(user)
            todo.append(user)
    return True
