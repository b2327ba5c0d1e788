"""Views, copies and writes of an `NMTensor`, below autograd.

What modules, optimizers, ``copy.deepcopy`` and ``load_state_dict`` do to any parameter. Views share the inner
tensors, and their version counters, so that a write through any of them is seen by all (see ``_forms.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from . import ops
from ._checks import WEIGHT_DTYPES
from ._forms import SharedForms
from ._tensor_checks import refuse_violation
from ._tensor_tables import FUNCTIONS, implements, unsupported
from .engines import ENGINES, Engine, best_engine, best_stack_engine, portable, unpack
from .tensor import NMTensor

aten = torch.ops.aten


def _view_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    """``out`` as the result of ``func`` below autograd; ``None`` stands for a call from above."""
    return out if func is None else return_and_correct_aliasing(func, args, kwargs, out)


# -------------------------------------------------------------------------------------- the same weight again


@implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, weight: NMTensor) -> NMTensor:
    values = weight.packed_values
    cut = func is aten.detach.default and values is not None and values.requires_grad
    return _view_of(func, (weight,), {}, weight._map(func) if cut else same(weight))


def same(weight: NMTensor) -> NMTensor:
    """The same weight as another Python object."""
    return weight.reshaped(weight.group_dim, weight.dense_shape(), len(weight.batch))


@implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, weight: NMTensor, size: Sequence[int]) -> NMTensor:
    shape, first = weight.dense_shape(), len(weight.batch)
    known = math.prod(new for new in size if new != -1)
    sizes = tuple(math.prod(shape) // known if new == -1 and known else new for new in size)
    # Leading dims that are broadcast may be regrouped; the weight itself keeps its shape.
    batch = sizes[: len(sizes) - len(shape) + first]
    if sizes[len(batch) :] != shape[first:] or math.prod(batch) != math.prod(weight.batch):
        raise unsupported(func, f"from shape {list(shape)} to {list(size)}: only the same shape")
    view = weight.reshaped(weight.group_dim - first + len(batch), sizes, len(batch))
    return _view_of(func, (weight, size), {}, view)


@implements(aten.expand.default)
def _expand(func: Any, weight: NMTensor, size: Sequence[int], **kwargs: Any) -> NMTensor:
    shape = weight.dense_shape()
    batch, sizes = tuple(size[: -len(shape)]), size[-len(shape) :]
    if len(size) < len(shape) or any(new not in (old, -1) for new, old in zip(sizes, shape, strict=True)):
        raise unsupported(func, f"from shape {list(shape)} to {list(size)}: only by leading dims")
    expanded = weight.reshaped(
        weight.group_dim + len(batch), (*batch, *shape), len(batch) + len(weight.batch)
    )
    return _view_of(func, (weight, size), kwargs, expanded)


@implements(aten.clone.default)
def _clone(func: Any, weight: NMTensor, *, memory_format: torch.memory_format | None = None) -> NMTensor:
    # A memory format says how dense weights lie in memory; the packed form has one layout (group dim last).
    return weight._map(torch.clone)


@implements(aten._to_copy.default)
def _to_copy(
    func: Any,
    weight: NMTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> NMTensor:
    if layout not in (None, torch.strided):
        raise unsupported(func, f"to layout {layout}")
    if pin_memory:
        raise unsupported(func, "to pinned memory")
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise unsupported(func, f"to {dtype}")
    values, indices = portable(weight)
    values = values.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=True)
    indices = indices.to(device=device, non_blocking=non_blocking, copy=True)
    moved = weight._rebuild(values, indices, ENGINES["decompress"])
    # Forms are laid out for one device and dtype: make them anew, by an engine that runs there.
    engine = ENGINES[weight.engine]
    # Nor does one stay that would round what it did not have to round before.
    stays = engine.why_not(moved) is None and (engine.chosen_for(moved) or not engine.chosen_for(weight))
    best = best_stack_engine if engine.matrix_engine else best_engine
    chosen = engine if stays else best(moved)
    return moved.with_engine(chosen.name, keep=weight.keep if chosen.restore is not None else "both")


# ------------------------------------------------------------------------------------------ other views of it


def transpose(weight: NMTensor) -> NMTensor:
    """Swaps the last two dims of a matrix or a stack of matrices that is not grouped along the others.

    The canonical rows stay the same, only the group dim stands elsewhere in the shape.
    """
    *outer, rows, columns = weight.dense_shape()
    first = len(outer)
    return weight.reshaped(first + 1 - (weight.group_dim - first), (*outer, columns, rows), len(weight.batch))


def _transposed_view(func: Any, weight: NMTensor, args: tuple, order: list[int]) -> NMTensor:
    """A view with the dims in another order, as far as that is a transposed matrix."""
    ndim = len(weight.dense_shape())
    as_it_is = list(range(ndim))
    if order == as_it_is:
        view = same(weight)
    elif _is_matrices(weight) and order == [*range(ndim - 2), ndim - 1, ndim - 2]:
        view = transpose(weight)
    else:
        raise unsupported(func, f"of shape {list(weight.dense_shape())}: only the two dims of a matrix")
    return _view_of(func, (weight, *args), {}, view)


def _is_matrices(weight: NMTensor) -> bool:
    """Whether it is a matrix, or a stack of matrices with the groups inside each."""
    dims = len(weight.rows) + 1
    return dims == 2 or (dims == 3 and weight.group_dim > len(weight.batch))


@implements(aten.t.default)
def _t(func: Any, weight: NMTensor) -> NMTensor:
    return _transposed_view(func, weight, (), [1, 0])


@implements(aten.transpose.int)
def _transpose(func: Any, weight: NMTensor, dim0: int, dim1: int) -> NMTensor:
    order = list(range(len(weight.dense_shape())))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _transposed_view(func, weight, (dim0, dim1), order)


@implements(aten.permute.default)
def _permute(func: Any, weight: NMTensor, dims: Sequence[int]) -> NMTensor:
    ndim = len(weight.dense_shape())
    return _transposed_view(func, weight, (dims,), [dim % ndim for dim in dims])


def _narrow(func: Any, weight: NMTensor, dim: int, start: int, length: int) -> NMTensor:
    """Rows ``start`` to ``start + length`` of a dim other than the group dim, sharing memory."""
    shape = list(weight.dense_shape())
    dim %= len(shape)
    if dim == weight.group_dim:
        raise unsupported(func, f"along dim {dim}, which is the group dim")
    if weight.batch:
        raise unsupported(func, "of an expanded weight")
    size, shape[dim] = shape[dim], length
    row_dim = dim - (dim > weight.group_dim)  # group dim last: dims behind it move up
    unit = _rows_per_index(ENGINES[weight.engine], row_dim)
    if unit and start % unit == 0 and (length % unit == 0 or start + length == size):
        first, count = start // unit, -(-length // unit)
        forms = [_narrowed(form, row_dim, first, count) for form in weight.forms()]
        return _piece(weight, weight.group_dim, shape, weight.engine, forms, row_dim, start, length)
    return _piece(weight, weight.group_dim, shape, None, [], row_dim, start, length)


def select(weight: NMTensor, index: int) -> NMTensor:
    """One matrix of a stack, sharing memory."""
    shape = weight.dense_shape()[1:]
    own = ENGINES[weight.engine]
    engine = own.matrix_engine or (own.name if own.forms and own.split_rows else None)
    forms = [] if engine is None else [form.select(0, index) for form in weight.forms()]
    return _piece(weight, weight.group_dim - 1, shape, engine, forms, None, index, 1)


def _rows_per_index(engine: Engine, row_dim: int) -> int:
    return engine.split_rows if isinstance(engine.split_rows, int) else engine.split_rows[row_dim]


def _narrowed(part: Tensor, row_dim: int | None, start: int, length: int) -> Tensor:
    """A view with a version counter in common, which views made below autograd do not have."""
    if torch.compiler.is_compiling():
        return part.select(0, start) if row_dim is None else part.narrow(row_dim, start, length)
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return part.select(0, start) if row_dim is None else part.narrow(row_dim, start, length)


def _piece(
    weight: NMTensor,
    group_dim: int,
    shape: Sequence[int],
    engine: str | None,
    forms: Sequence[Tensor],
    row_dim: int | None,
    start: int,
    length: int,
) -> NMTensor:
    """The weight of some rows (of one index of the first row dim if ``row_dim`` is ``None``).

    Args:
        weight: The whole.
        group_dim: The group dim of the piece.
        shape: Its shape.
        engine: Its engine; ``None`` if no forms can be cut out for it.
        forms: Its forms.
        row_dim: The dim of the canonical rows that is narrowed.
        start: From where.
        length: How many rows.
    """
    shared = None if torch.compiler.is_compiling() else weight.shared
    layout = (weight.pattern, group_dim, tuple(shape), weight.remainder)
    if engine is not None and weight.packed_values is None:
        return NMTensor(None, None, *layout, engine, tuple(forms), shared=shared)
    values, indices = (_narrowed(part, row_dim, start, length) for part in portable(weight))
    if engine is not None:
        return NMTensor(values, indices, *layout, engine, tuple(forms), shared=shared)
    piece = NMTensor(values, indices, *layout, "decompress", ())
    piece.engine = next(e.name for e in ENGINES.values() if not e.forms and e.why_not(piece) is None)
    if weight.packed_values is None:  # made for this piece: a write would not reach the weight
        piece.shared = SharedForms(piece, (), read_only=True)
    return piece


@implements(aten.split.Tensor)
def _split(func: Any, weight: NMTensor, split_size: int, dim: int = 0) -> list[NMTensor]:
    size = weight.dense_shape()[dim]
    starts = range(0, size, split_size) if size else range(1)
    pieces = [_narrow(func, weight, dim, start, min(split_size, size - start)) for start in starts]
    return _view_of(func, (weight, split_size, dim), {}, pieces)


@implements(aten.split_with_sizes.default)
def _split_with_sizes(
    func: Any, weight: NMTensor, split_sizes: Sequence[int], dim: int = 0
) -> list[NMTensor]:
    size = weight.dense_shape()[dim]
    if sum(split_sizes) != size or any(length < 0 for length in split_sizes):
        raise ValueError(f"split sizes must add up to {size}, the size of dim {dim}, got {list(split_sizes)}")
    pieces, start = [], 0
    for length in split_sizes:
        pieces.append(_narrow(func, weight, dim, start, length))
        start += length
    return _view_of(func, (weight, split_sizes, dim), {}, pieces)


@implements(aten.slice.Tensor)
def _slice(
    func: Any, weight: NMTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> NMTensor:
    if step != 1:
        raise unsupported(func, f"with step {step}")
    size = weight.dense_shape()[dim]
    start, end, _ = slice(start, end).indices(size)
    if (start, end) == (0, size):  # also along the group dim: that is everything
        piece = same(weight)
    else:
        piece = _narrow(func, weight, dim, start, max(end - start, 0))
    return _view_of(func, (weight, dim, start, end, step), {}, piece)


@implements(aten.select.int)
def _select(func: Any, weight: NMTensor, dim: int, index: int) -> NMTensor:
    return _view_of(func, (weight, dim, index), {}, select(weight, _stack_index(func, weight, dim, index)))


@implements(aten.unbind.int)
def _unbind(func: Any, weight: NMTensor, dim: int = 0) -> list[NMTensor]:
    _stack_index(func, weight, dim, 0)
    pieces = [select(weight, index) for index in range(weight.dense_shape()[0])]
    return _view_of(func, (weight, dim), {}, pieces)


def _stack_index(func: Any, weight: NMTensor, dim: int, index: int) -> int:
    shape = weight.dense_shape()
    if dim % len(shape) or len(weight.rows) != 2 or weight.batch or weight.group_dim == 0:
        raise unsupported(
            func, f"of shape {list(shape)} along dim {dim}: only the first dim of a stack of matrices"
        )
    if not -shape[0] <= index < max(shape[0], 1):
        raise IndexError(f"index {index} is out of bounds for the {shape[0]} matrices of the stack")
    return index % max(shape[0], 1)


# -------------------------------------------------------------------------------------------- above autograd
# torch.export follows the inner tensors that a weight has when it is asked, not those of a piece made below
# autograd: for its sake pieces are cut above.


def _getitem(weight: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor) and index.dim() == 0 and isinstance(weight, NMTensor):
        index = int(index)  # a gather is not what a packed weight can do
    if torch.compiler.is_exporting() and isinstance(weight, NMTensor):
        if isinstance(index, int):
            return _select(None, weight, 0, index)
        if isinstance(index, slice):
            return _slice(None, weight, 0, index.start, index.stop, 1 if index.step is None else index.step)
    with torch._C.DisableTorchFunctionSubclass():
        return weight[index]


def _pieces(weight: NMTensor, size: int | Sequence[int], dim: int = 0) -> tuple[NMTensor, ...]:
    cut = _split if isinstance(size, int) else _split_with_sizes
    return tuple(cut(None, weight, size, dim))


def _chunks(weight: NMTensor, chunks: int, dim: int = 0) -> tuple[NMTensor, ...]:
    return _pieces(weight, -(-weight.dense_shape()[dim] // chunks), dim)


def _when_exporting(function: Callable, cut: Callable) -> Callable:
    def handler(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return cut(weight, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(weight, *args, **kwargs)

    return handler


FUNCTIONS[torch.Tensor.__getitem__] = _getitem
for _function, _cut in (
    (torch.split, _pieces),
    (torch.Tensor.split, _pieces),
    (torch.chunk, _chunks),
    (torch.Tensor.chunk, _chunks),
    (torch.unbind, lambda weight, dim=0: tuple(_unbind(None, weight, dim))),
    (torch.Tensor.unbind, lambda weight, dim=0: tuple(_unbind(None, weight, dim))),
    (torch.select, lambda weight, dim, index: _select(None, weight, dim, index)),
    (torch.Tensor.select, lambda weight, dim, index: _select(None, weight, dim, index)),
    (torch.t, lambda weight: _t(None, weight)),
    (torch.Tensor.t, lambda weight: _t(None, weight)),
    (torch.Tensor.T.__get__, lambda weight: _t(None, weight)),  # type: ignore[attr-defined]
    (torch.Tensor.mT.__get__, lambda weight: _transpose(None, weight, -2, -1)),  # type: ignore[attr-defined]
    (torch.transpose, lambda weight, dim0, dim1: _transpose(None, weight, dim0, dim1)),
    (torch.Tensor.transpose, lambda weight, dim0, dim1: _transpose(None, weight, dim0, dim1)),
):
    FUNCTIONS[_function] = _when_exporting(_function, _cut)


# ----------------------------------------------------------------------------------------------------- writes


@implements(aten.copy_.default)
def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, NMTensor):
        assert isinstance(source, NMTensor)
        return target.copy_(unpack(source), non_blocking)
    if target.shared is not None and target.shared.read_only:
        raise ValueError(
            "cannot copy into this piece of an NMTensor of keep='engine': it is a copy, because its rows do "
            "not begin and end with those of the engine's form. Copy into the whole weight"
        )
    shape = target.dense_shape()
    source_shape = source.dense_shape() if isinstance(source, NMTensor) else tuple(source.shape)
    if source_shape != shape:
        raise ValueError(f"cannot copy shape {list(source_shape)} into an NMTensor of shape {list(shape)}")
    engine = ENGINES[target.engine]
    same_layout = (target.pattern, target.group_dim)
    if isinstance(source, NMTensor) and (source.pattern, source.group_dim) == same_layout:
        same_form = (source.engine, source.keep, source.dtype) == (target.engine, "engine", target.dtype)
        if target.packed_values is None and same_form and source.rows == target.rows:
            for form, new in zip(target.forms(), source.forms(), strict=True):
                form.copy_(new, non_blocking)
            _changed(target)
            return target
        values, indices = portable(source)
    else:
        dense = unpack(source) if isinstance(source, NMTensor) else source
        # Cast first: what underflows to zero in the target's dtype needs no place.
        with torch._C.DisableTorchFunctionSubclass():
            device, dtype = target.device, target.dtype
        dense = dense.to(device=device, dtype=dtype)
        refuse_violation(dense, target.pattern, target.group_dim, target.remainder)
        values, indices = ops.pack(dense, target.pattern, dim=target.group_dim, remainder=target.remainder)
    if target.packed_values is not None and target.packed_indices is not None:
        for part, new in ((target.packed_values, values), (target.packed_indices, indices)):
            part.copy_(new, non_blocking)
            if not part.is_inference():
                torch.autograd.graph.increment_version(part)  # which nobody does below autograd
        if target.shared is not None:
            target.shared.rebuild()
            return target
        values, indices = target.packed_values, target.packed_indices
    layout = (target.pattern, target.group_dim, shape, target.remainder)
    portable_target = NMTensor(
        values.to(target.forms()[0].dtype) if target.forms() else values, indices, *layout, "decompress", ()
    )
    for form, rebuilt in zip(target.forms(), engine.build(portable_target), strict=True):
        form.copy_(rebuilt)
    _changed(target)
    return target


def _changed(target: NMTensor) -> None:
    if target.shared is not None:
        target.shared.written()


# Used by PyTorch itself to tell whether two parameters may stand for each other; says nothing about contents.
@implements(aten.is_same_size.default)
def _is_same_size(func: Any, a: Tensor, b: Tensor) -> bool:
    return tuple(a.shape) == tuple(b.shape)
