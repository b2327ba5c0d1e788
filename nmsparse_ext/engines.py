"""The engines that multiply with a packed weight, as one small table.

An engine runs from *forms*: tensors derived from the portable ``values`` and ``indices``, laid out as its
kernel likes them. `NMTensor` carries the forms of its engine as further inner tensors, so that compiled and
exported graphs see them; they are shared by views and never saved. A new engine is one more `register_engine`
call; nothing else knows which engines there are.

Forms describe the canonical rows ``[other dims..., K]`` (group dim last). A transposed weight has the same
rows, so its forms are the same too. That is why an engine multiplies with rows: ``linear`` is
``input @ rows.T``, which is ``F.linear`` for a weight ``[out, in]`` grouped along ``in`` and
``input @ weight`` for one ``[in, out]`` grouped along ``in``. The product along the other dim (the gradient
of the input above all) is ``matmul``; where an engine lacks it, ``products.across`` makes the weight dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .tensor import NMTensor


@dataclass(frozen=True)
class Engine:
    """How packed weights are multiplied.

    Attributes:
        name: The key in the table, stored with each weight.
        why_not: ``weight -> None``, or the reason why this engine cannot run it here (device, dtype,
            pattern).
        linear: ``(input [..., in], weight with rows [out, in], bias or None) -> [..., out]``: ``input @
            rows.T`` with a bias of any shape that ``F.linear`` takes; differentiable in input and bias. A
            fourth argument, one of `activations`, names what is applied on the way out.
        conv: ``(op, input, weight, bias, *args, **kwargs)`` with ``op`` one of ``F.conv1d/2d/3d`` and their
            transposed versions; the same as ``op(input, weight.to_dense(), bias, *args, **kwargs)``.
        forms: Names of the tensors that `build` derives.
        build: ``weight -> forms``, in the order of `forms`. The first has the weight's dtype.
        refill: ``(weight, forms) -> None``: writes what `build` gives for ``weight`` into ``forms``, whose
            packed form was written to; ``None`` to build and copy.
        restore: ``weight -> (values, indices)`` from the forms alone, bit for bit what `build` was given;
            ``None`` if that cannot be, so that the packed form has to be kept.
        dense_rows: ``weight -> dense [other dims..., K]``, a faster way to the dense weight than from the
            packed form; ``None`` if there is none.
        matmul: ``(input [..., out], weight with rows [out, in]) -> [..., in]``: ``input @ rows``,
            differentiable in input; ``None`` if the weight has to be made dense for it.
        activations: Names of the activations that `linear` can apply to its sums.
        split_rows: How many rows of the weight one index of the forms' leading dims stands for (one number
            for all of them, or one for each), so that narrowing there gives the forms of those rows. 0 if it
            does not; the pieces of a split weight then fall back to an engine without forms, as do those that
            do not begin and end with such rows.
        matrix_engine: For an engine of stacks of matrices: the name of the one that runs ``weight[i]`` from
            what the forms have at ``[i]``.
        automatic: Whether `best_engine` may choose it, or for which weights. Not so for engines that take
            more memory than the dense weight, or round the weights.
    """

    name: str
    why_not: Callable[[NMTensor], str | None]
    linear: Callable[..., Tensor]
    conv: Callable[..., Tensor]
    forms: tuple[str, ...] = ()
    build: Callable[[NMTensor], tuple[Tensor, ...]] = lambda weight: ()
    refill: Callable[[NMTensor, tuple[Tensor, ...]], None] | None = None
    restore: Callable[[NMTensor], tuple[Tensor, Tensor]] | None = None
    dense_rows: Callable[[NMTensor], Tensor] | None = None
    matmul: Callable[[Tensor, NMTensor], Tensor] | None = None
    activations: tuple[str, ...] = ()
    split_rows: int | tuple[int, ...] = 0
    matrix_engine: str = ""
    automatic: bool | Callable[[NMTensor], bool] = True

    def chosen_for(self, weight: NMTensor) -> bool:
        """Whether `best_engine` may choose it for ``weight``."""
        return self.automatic(weight) if callable(self.automatic) else self.automatic


ENGINES: dict[str, Engine] = {}


def register_engine(engine: Engine, *, first: bool = False) -> None:
    """Adds ``engine`` to the table, as the most preferred one if ``first``.

    Raises:
        ValueError: If there is an engine of that name already.
    """
    if engine.name in ENGINES:
        raise ValueError(f"there is an engine named {engine.name!r} already")
    others = dict(ENGINES)
    ENGINES[engine.name] = engine
    if first:
        for name, other in others.items():  # dicts keep insertion order: put the others behind it
            del ENGINES[name]
            ENGINES[name] = other


def best_engine(weight: NMTensor) -> Engine:
    """Returns the most preferred engine that can run ``weight`` where it is. There always is one."""
    return next(
        engine for engine in ENGINES.values() if engine.chosen_for(weight) and engine.why_not(weight) is None
    )


def best_stack_engine(weight: NMTensor) -> Engine:
    """Returns the most preferred engine that can run a stack of matrices where it is. There always is one.

    By its shape a stack ``[experts, in, out]`` could be the weight of a 1-D convolution, too, which
    `best_engine` takes it for. By "decompress" its matrices still go to what runs each from the packed form.
    """
    stacks = (engine for engine in ENGINES.values() if engine.matrix_engine)
    return next((engine for engine in stacks if engine.why_not(weight) is None), ENGINES["decompress"])


def find_engine(name: str) -> Engine:
    """Returns the engine of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {name!r}")
    return ENGINES[name]


def portable(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """The values and indices of a weight; made from the engine's form where only that is kept."""
    if weight.packed_values is not None and weight.packed_indices is not None:
        return weight.packed_values, weight.packed_indices
    restore = ENGINES[weight.engine].restore
    assert restore is not None, weight.engine
    return restore(weight)


def unpack(weight: NMTensor) -> Tensor:
    """Returns the dense weight: contiguous (unless expanded), of ``weight``'s shape and dtype.

    Differentiable in the values.

    A free function rather than a method, because ``torch.compile`` inlines functions on a subclass, but not
    methods that override one of ``torch.Tensor``.
    """
    dim = weight.group_dim - len(weight.batch)
    if weight.packed_values is None:
        dense = unpack_rows(weight).movedim(-1, dim).contiguous()
    else:
        assert weight.packed_indices is not None
        dense = ops.unpack(weight.packed_values, weight.packed_indices, weight.pattern, k=weight.k, dim=dim)
    return dense.expand(*weight.batch, *dense.shape) if weight.batch else dense


def unpack_rows(weight: NMTensor) -> Tensor:
    """Returns the canonical rows, dense: ``[other dims..., K]`` without expanded dims; differentiable."""
    dense_rows = ENGINES[weight.engine].dense_rows
    values = weight.packed_values
    if dense_rows is not None and (values is None or not values.requires_grad):
        return dense_rows(weight)
    values, indices = portable(weight)
    return ops.unpack(values, indices, weight.pattern, k=weight.k, dim=-1)


# ------------------------------------------------------------------------------- decompress: works everywhere


def unpacked_linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """An engine's ``linear`` by way of the dense weight, for what it has no kernel for."""
    return F.linear(input, unpack_rows(weight), bias)


def unpacked_conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """An engine's ``conv`` by way of the dense weight, for what it has no kernel for."""
    return op(input, unpack(weight), bias, *args, **kwargs)


# The dense weight is made in every call and, if gradients are wanted, kept for the backward pass. Least
# memory at rest, never faster than dense.
register_engine(
    Engine(
        name="decompress",
        why_not=lambda weight: None,
        linear=unpacked_linear,
        conv=unpacked_conv,
    )
)


# -------------------------------------------------------------------------- dense: decompressed once and kept


def _dense_build(weight: NMTensor) -> tuple[Tensor]:
    # A view with the group dim last, as the contract of forms wants it; moving it back gives the contiguous
    # weight.
    dim = weight.group_dim - len(weight.batch)
    dense = ops.unpack(*portable(weight), weight.pattern, k=weight.k, dim=dim)
    return (dense.movedim(dim, -1),)


def _dense_rows(weight: NMTensor) -> Tensor:
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    return getattr(weight, "form_dense")  # noqa: B009 - forms are no declared attributes


def _dense_linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, _dense_rows(weight), bias)


def _dense_conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return op(input, _dense_rows(weight).movedim(-1, weight.group_dim), bias, *args, **kwargs)


# Exactly as fast as the dense weight, and takes its memory on top of the packed form's: only on request.
register_engine(
    Engine(
        name="dense",
        why_not=lambda weight: None,
        linear=_dense_linear,
        conv=_dense_conv,
        forms=("dense",),
        build=_dense_build,
        dense_rows=_dense_rows,
        split_rows=1,
        automatic=False,
    )
)

# At the end, because they register themselves in the table above.
from . import (  # noqa: E402, F401
    engines_conv,
    engines_cpu,
    engines_cuda,
    engines_cuda_8bit,
    engines_cuda_conv,
    engines_int8,
)
