"""What PyTorch does with an `NMTensor`: two tables of handlers.

``FUNCTIONS`` catches public functions (``F.linear``, convolutions) before autograd sees them. A handler there
composes differentiable functions of ordinary tensors, so gradients and autocast follow from PyTorch's own
rules, and ``torch.compile`` inlines it.

``OPS`` catches ATen ops below autograd: what modules, the optimizer, ``copy.deepcopy`` and
``load_state_dict`` do to any parameter, and products by whoever does not call ``F.linear``. Whatever is in
neither table raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from . import ops
from ._checks import WEIGHT_DTYPES
from .engines import ENGINES, unpack
from .tensor import FUNCTIONS, OPS, NMTensor, _refuse_violation

aten = torch.ops.aten

# --------------------------------------------------------------------------------------------- above autograd


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, NMTensor):
        raise NotImplementedError(
            "F.linear takes an NMTensor as weight only; use .to_dense() for input or bias"
        )
    return ENGINES[weight.engine].linear(input, weight, bias)


def _conv(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    name = f"F.{op.__name__}"

    def conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, NMTensor):
            raise NotImplementedError(
                f"{name} takes an NMTensor as weight only; use .to_dense() for input or bias"
            )
        return ENGINES[weight.engine].conv(op, input, weight, bias, *args, **kwargs)

    return conv


FUNCTIONS[F.linear] = _linear
for _op in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    FUNCTIONS[_op] = _conv(_op)


def _requires_grad_(weight: NMTensor, requires_grad: bool = True) -> NMTensor:
    if requires_grad:
        raise NotImplementedError(
            "the weights of an NMTensor are frozen and take no gradients: use "
            "nn.Parameter(W, requires_grad=False). To train, keep the weight dense and use a Sparsifier; for "
            "gradients of packed values, call nms.linear with the result of compress"
        )
    return weight


def _no_contents(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"NMTensor does not support {name}: call it on .to_dense(), .values or .indices"
        )

    return refuse


for _name in ("numpy", "__array__", "tolist", "__dlpack__"):
    FUNCTIONS[getattr(torch.Tensor, _name)] = _no_contents(_name)

FUNCTIONS[torch.Tensor.requires_grad_] = _requires_grad_
FUNCTIONS[torch.Tensor.requires_grad.__set__] = _requires_grad_  # type: ignore[attr-defined]

# --------------------------------------------------------------------------------------------- below autograd


def _implements(*funcs: Any) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        OPS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


def _unsupported(func: Any, why: str) -> NotImplementedError:
    return NotImplementedError(f"NMTensor does not support {func} {why}; work on .to_dense()")


# ---- the same weight again


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, weight: NMTensor) -> NMTensor:
    return return_and_correct_aliasing(func, (weight,), {}, weight._map(func))


@_implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, weight: NMTensor, size: Sequence[int]) -> NMTensor:
    shape, first = weight._dense_shape(), len(weight.batch)
    known = math.prod(new for new in size if new != -1)
    sizes = tuple(math.prod(shape) // known if new == -1 and known else new for new in size)
    # Leading dims that are broadcast may be regrouped; the weight itself keeps its shape.
    batch = sizes[: len(sizes) - len(shape) + first]
    if sizes[len(batch) :] != shape[first:] or math.prod(batch) != math.prod(weight.batch):
        raise _unsupported(func, f"from shape {list(shape)} to {list(size)}: only the same shape")
    view = _reshaped(weight, weight.group_dim - first + len(batch), sizes)._map(aten.alias.default)
    return return_and_correct_aliasing(func, (weight, size), {}, view)


@_implements(aten.expand.default)
def _expand(func: Any, weight: NMTensor, size: Sequence[int], **kwargs: Any) -> NMTensor:
    shape = weight._dense_shape()
    batch, sizes = tuple(size[: -len(shape)]), size[-len(shape) :]
    if len(size) < len(shape) or any(new not in (old, -1) for new, old in zip(sizes, shape, strict=True)):
        raise _unsupported(func, f"from shape {list(shape)} to {list(size)}: only by leading dims")
    expanded = _reshaped(weight, weight.group_dim + len(batch), (*batch, *shape))._map(aten.alias.default)
    return return_and_correct_aliasing(func, (weight, size), kwargs, expanded)


def _reshaped(weight: NMTensor, group_dim: int, shape: tuple[int, ...]) -> NMTensor:
    """The same inner tensors as another weight; what is the same canonical rows has the same forms."""
    return NMTensor(
        weight.packed_values,
        weight.packed_indices,
        weight.pattern,
        group_dim,
        shape,
        weight.remainder,
        weight.engine,
        weight._forms(),
    )


@_implements(aten.clone.default)
def _clone(func: Any, weight: NMTensor, *, memory_format: torch.memory_format | None = None) -> NMTensor:
    # A memory format says how dense weights lie in memory; the packed form has one layout (group dim last).
    return weight._map(torch.clone)


@_implements(aten._to_copy.default)
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
        raise _unsupported(func, f"to layout {layout}")
    if pin_memory:
        raise _unsupported(func, "to pinned memory")
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise _unsupported(func, f"to {dtype}")
    values = weight.packed_values.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=True)
    indices = weight.packed_indices.to(device=device, non_blocking=non_blocking, copy=True)
    moved = weight._rebuild(values, indices, ENGINES["decompress"])
    # Forms are laid out for one device and dtype: make them anew, by an engine that runs there.
    engine = ENGINES[weight.engine]
    return moved.with_engine(engine.name if engine.why_not(moved) is None else None)


# ---- other views of it


def transpose(weight: NMTensor) -> NMTensor:
    """Swaps the last two dims of a 2-D (or expanded 2-D) weight.

    The canonical rows stay the same, only the group dim stands elsewhere in the shape.
    """
    *batch, rows, columns = weight._dense_shape()
    first = len(batch)
    return _reshaped(weight, first + 1 - (weight.group_dim - first), (*batch, columns, rows))


def _transposed_view(func: Any, weight: NMTensor, args: tuple, order: list[int]) -> NMTensor:
    """A view with the dims in another order, as far as that is a transposed matrix."""
    ndim, batch = len(weight._dense_shape()), len(weight.batch)
    as_it_is = list(range(ndim))
    if order == as_it_is:
        view = weight._map(aten.alias.default)
    elif ndim - batch == 2 and order == [*range(batch), batch + 1, batch]:
        view = transpose(weight)._map(aten.alias.default)
    else:
        raise _unsupported(func, f"of shape {list(weight._dense_shape())}: only the two dims of a matrix")
    return return_and_correct_aliasing(func, (weight, *args), {}, view)


@_implements(aten.t.default)
def _t(func: Any, weight: NMTensor) -> NMTensor:
    return _transposed_view(func, weight, (), [1, 0])


@_implements(aten.transpose.int)
def _transpose(func: Any, weight: NMTensor, dim0: int, dim1: int) -> NMTensor:
    order = list(range(len(weight._dense_shape())))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _transposed_view(func, weight, (dim0, dim1), order)


@_implements(aten.permute.default)
def _permute(func: Any, weight: NMTensor, dims: Sequence[int]) -> NMTensor:
    ndim = len(weight._dense_shape())
    return _transposed_view(func, weight, (dims,), [dim % ndim for dim in dims])


def _narrow(func: Any, weight: NMTensor, dim: int, start: int, length: int) -> NMTensor:
    """Rows ``start`` to ``start + length`` of a dim other than the group dim, sharing memory."""
    shape = list(weight._dense_shape())
    dim %= len(shape)
    if dim == weight.group_dim:
        raise _unsupported(func, f"along dim {dim}, which is the group dim")
    if weight.batch:
        raise _unsupported(func, "of an expanded weight")
    shape[dim] = length
    row_dim = dim - (dim > weight.group_dim)  # group dim last: dims behind it move up
    engine = ENGINES[weight.engine]
    piece = NMTensor(
        weight.packed_values.narrow(row_dim, start, length),
        weight.packed_indices.narrow(row_dim, start, length),
        weight.pattern,
        weight.group_dim,
        tuple(shape),
        weight.remainder,
        "decompress",
        (),
    )
    rows, size = engine.split_rows, weight._dense_shape()[dim]
    if not rows or start % rows or (length % rows and start + length != size):
        return piece.with_engine(
            next(e.name for e in ENGINES.values() if not e.forms and e.why_not(piece) is None)
        )
    forms = tuple(form.narrow(row_dim, start // rows, -(-length // rows)) for form in weight._forms())
    piece.engine = engine.name
    for name, form in zip(engine.forms, forms, strict=True):
        setattr(piece, f"form_{name}", form)
    return piece


@_implements(aten.split.Tensor)
def _split(func: Any, weight: NMTensor, split_size: int, dim: int = 0) -> list[NMTensor]:
    size = weight._dense_shape()[dim]
    starts = range(0, size, split_size) if size else range(1)
    pieces = [_narrow(func, weight, dim, start, min(split_size, size - start)) for start in starts]
    return return_and_correct_aliasing(func, (weight, split_size, dim), {}, pieces)


@_implements(aten.split_with_sizes.default)
def _split_with_sizes(
    func: Any, weight: NMTensor, split_sizes: Sequence[int], dim: int = 0
) -> list[NMTensor]:
    size = weight._dense_shape()[dim]
    if sum(split_sizes) != size or any(length < 0 for length in split_sizes):
        raise ValueError(f"split sizes must add up to {size}, the size of dim {dim}, got {list(split_sizes)}")
    pieces, start = [], 0
    for length in split_sizes:
        pieces.append(_narrow(func, weight, dim, start, length))
        start += length
    return return_and_correct_aliasing(func, (weight, split_sizes, dim), {}, pieces)


@_implements(aten.slice.Tensor)
def _slice(
    func: Any, weight: NMTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> NMTensor:
    if step != 1:
        raise _unsupported(func, f"with step {step}")
    size = weight._dense_shape()[dim]
    start, end, _ = slice(start, end).indices(size)
    if (start, end) == (0, size):  # also along the group dim: that is everything
        piece = weight._map(aten.alias.default)
    else:
        piece = _narrow(func, weight, dim, start, max(end - start, 0))
    return return_and_correct_aliasing(func, (weight, dim, start, end, step), {}, piece)


# ---- products


def _times(x: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight + bias`` for x ``[rows, in]``, weight ``[in, out]``."""
    return ENGINES[weight.engine].linear(x, transpose(weight), bias)


def _product(func: Any, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with one of them packed, ``[..., rows, in] @ [..., in, out]``."""
    if isinstance(b, NMTensor):
        if isinstance(a, NMTensor):
            raise _unsupported(func, "of two packed weights")
        return _times(a, b)
    assert isinstance(a, NMTensor)
    return ENGINES[a.engine].linear(b.mT, a, None).mT  # a @ b = (b^T @ a^T)^T


@_implements(aten.mm.default)
def _mm(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return _product(func, a, b)


@_implements(aten.bmm.default)
def _bmm(func: Any, a: Tensor, b: Tensor) -> Tensor:
    # matmul with more than two dims expands the weight: one and the same matrix for every batch.
    for weight in (a, b):
        if isinstance(weight, NMTensor) and not weight.batch:
            raise _unsupported(func, "of a batch of packed matrices")
    one = lambda x: _reshaped(x, x.group_dim - 1, x._dense_shape()[1:]) if isinstance(x, NMTensor) else x  # noqa: E731
    return _product(func, one(a), one(b))


@_implements(aten.addmm.default)
def _addmm(func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, NMTensor):
        raise _unsupported(func, "with a packed bias")
    if isinstance(b, NMTensor) and not isinstance(a, NMTensor) and bias.dim() == 1 and alpha == beta == 1:
        return _times(a, b, bias)
    product = _product(func, a, b)
    if alpha != 1:
        product = product * alpha
    # As addmm has it: with beta = 0 not even a NaN in bias counts.
    return product if beta == 0 else product + bias * beta


@_implements(aten.linear.default)
def _aten_linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _linear(input, weight, bias)


@_implements(aten.convolution.default)
def _convolution(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    if not isinstance(weight, NMTensor):
        raise _unsupported(func, "other than as its weight")
    return ENGINES[weight.engine].conv(func, input, weight, bias, *args)


@_implements(aten.convolution_backward.default)
def _convolution_backward(func: Any, grad: Tensor, input: Tensor, weight: Tensor, *args: Any) -> tuple:
    *geometry, output_mask = args
    if not isinstance(weight, NMTensor) or output_mask[1]:
        raise _unsupported(func, "for the gradient of a packed weight, which is frozen")
    return func(grad, input, unpack(weight), *geometry, output_mask)


# ---- writes


@_implements(aten.copy_.default)
def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, NMTensor):
        assert isinstance(source, NMTensor)
        return target.copy_(unpack(source), non_blocking)
    shape = target._dense_shape()
    source_shape = source._dense_shape() if isinstance(source, NMTensor) else tuple(source.shape)
    if source_shape != shape:
        raise ValueError(f"cannot copy shape {list(source_shape)} into an NMTensor of shape {list(shape)}")
    same_layout = (target.pattern, target.group_dim)
    if isinstance(source, NMTensor) and (source.pattern, source.group_dim) == same_layout:
        values, indices = source.packed_values, source.packed_indices
    else:
        dense = unpack(source) if isinstance(source, NMTensor) else source
        # Cast first: what underflows to zero in the target's dtype needs no place.
        dense = dense.to(device=target.packed_values.device, dtype=target.packed_values.dtype)
        _refuse_violation(dense, target.pattern, target.group_dim, target.remainder)
        values, indices = ops.pack(dense, target.pattern, dim=target.group_dim, remainder=target.remainder)
    target.packed_values.copy_(values, non_blocking)
    target.packed_indices.copy_(indices, non_blocking)
    for form, rebuilt in zip(target._forms(), ENGINES[target.engine].build(target), strict=True):
        form.copy_(rebuilt)
    return target


# Used by PyTorch itself to tell whether two parameters may stand for each other; says nothing about contents.
@_implements(aten.is_same_size.default)
def _is_same_size(func: Any, a: Tensor, b: Tensor) -> bool:
    return tuple(a.shape) == tuple(b.shape)
