"""The engines that multiply with a packed weight, as one small table.

An engine runs from *forms*: tensors derived from the portable ``values`` and ``indices``, laid out as its
kernel likes them. `NMTensor` carries the forms of its engine as further inner tensors, so that compiled and
exported graphs see them; they are shared by views and never saved. A new engine is one more `register_engine`
call; nothing else knows which engines there are.

Forms describe the canonical rows ``[other dims..., K]`` (group dim last). A transposed weight has the same
rows, so its forms are the same too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        linear: ``(input [..., in], weight [out, in], bias [out] or None) -> [..., out]``; differentiable in
            input and bias.
        conv: ``(op, input, weight, bias, *args, **kwargs)`` with ``op`` one of ``F.conv1d/2d/3d`` and their
            transposed versions; the same as ``op(input, weight.to_dense(), bias, *args, **kwargs)``.
        forms: Names of the tensors that `build` derives.
        build: ``weight -> forms``, in the order of `forms`.
        split_rows: How many rows of the weight one index of the forms' leading dims stands for, so that
            narrowing there gives the forms of those rows. 0 if it does not; the pieces of a split weight then
            fall back to an engine without forms, as do those that do not begin and end with such rows.
        automatic: Whether `best_engine` may choose it. Not so for engines that take more memory than the
            dense weight.
    """

    name: str
    why_not: Callable[[NMTensor], str | None]
    linear: Callable[[Tensor, NMTensor, Tensor | None], Tensor]
    conv: Callable[..., Tensor]
    forms: tuple[str, ...] = ()
    build: Callable[[NMTensor], tuple[Tensor, ...]] = lambda weight: ()
    split_rows: int = 0
    automatic: bool = True


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
    return next(engine for engine in ENGINES.values() if engine.automatic and engine.why_not(weight) is None)


def find_engine(name: str) -> Engine:
    """Returns the engine of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {name!r}")
    return ENGINES[name]


def unpack(weight: NMTensor) -> Tensor:
    """Returns the dense weight: contiguous (unless expanded), of ``weight``'s shape and dtype.

    Differentiable in the values.

    A free function rather than a method, because ``torch.compile`` inlines functions on a subclass, but not
    methods that override one of ``torch.Tensor``.
    """
    dim = weight.group_dim - len(weight.batch)
    dense = ops.unpack(weight.packed_values, weight.packed_indices, weight.pattern, k=weight.k, dim=dim)
    return dense.expand(*weight.batch, *dense.shape) if weight.batch else dense


# ------------------------------------------------------------------------------- decompress: works everywhere


def _decompress_linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, unpack(weight), bias)


def _decompress_conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return op(input, unpack(weight), bias, *args, **kwargs)


# The dense weight is made in every call and, if gradients are wanted, kept for the backward pass. Least
# memory at rest, never faster than dense.
register_engine(
    Engine(
        name="decompress",
        why_not=lambda weight: None,
        linear=_decompress_linear,
        conv=_decompress_conv,
    )
)


# -------------------------------------------------------------------------- dense: decompressed once and kept


def _dense_build(weight: NMTensor) -> tuple[Tensor]:
    # A view with the group dim last, as the contract of forms wants it; moving it back gives the contiguous
    # weight.
    return (unpack(weight).movedim(weight.group_dim, -1),)


def _dense_weight(weight: NMTensor) -> Tensor:
    form: Tensor = getattr(weight, "form_dense")  # noqa: B009 - forms are no declared attributes
    return form.movedim(-1, weight.group_dim)


def _dense_linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, _dense_weight(weight), bias)


def _dense_conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return op(input, _dense_weight(weight), bias, *args, **kwargs)


# Exactly as fast as the dense weight, and takes its memory on top of the packed form's: only on request.
register_engine(
    Engine(
        name="dense",
        why_not=lambda weight: None,
        linear=_dense_linear,
        conv=_dense_conv,
        forms=("dense",),
        build=_dense_build,
        split_rows=1,
        automatic=False,
    )
)

# At the end, because they register themselves in the table above.
from . import engines_conv, engines_cpu  # noqa: E402, F401
