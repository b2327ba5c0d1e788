"""Products with packed weights: linear layers, matrix products, stacks of matrices (experts).

A weight is multiplied from its canonical rows ``[..., out, in]``: ``input @ rows.mT`` is what every engine
has (`along`). For the other product, ``input @ rows`` (`across`), a weight is made dense where its engine
does not have it.

The same functions serve twice: in ``FUNCTIONS``, above autograd and autocast, where gradients follow from the
engine's own rules and a weight is not cast in every call; and in ``OPS`` for whoever calls ATen ops directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._panel_layout import ACTIVATIONS
from ._tensor_tables import FUNCTIONS, implements, unsupported
from ._tensor_views import select
from .engines import ENGINES, unpack_rows
from .panels import Activation
from .tensor import NMTensor

aten = torch.ops.aten


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Multiplies with a packed (or dense) weight.

    Equivalent to ``F.linear(x, W.to_dense(), bias)``, and to ``F.relu``, ``F.gelu`` or ``F.silu`` of that. A
    packed weight on the CPU applies the activation to the sums before they are rounded and written.
    Differentiable in ``x``, in ``bias``, and in the values of a packed weight that was made by `compress`
    from a weight that requires gradients.

    Args:
        x: ``[..., in]``.
        W: ``[out, in]``, an `NMTensor` or a dense tensor.
        bias: ``[out]``, or of any shape that ``F.linear`` takes: one element, or one that broadcasts to the
            result.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (the exact one) or ``"silu"``.

    Returns:
        ``[..., out]``.

    Raises:
        ValueError: For an ``activation`` that there is not.
    """
    if activation == "none":
        return F.linear(x, W, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if isinstance(W, NMTensor) and activation in ENGINES[W.engine].activations and _inputs_last(W):
        return ENGINES[W.engine].linear(x, W, bias, activation)
    return getattr(F, activation)(F.linear(x, W, bias))


# -------------------------------------------------------------------------------------- one matrix or a stack


def _inputs_last(weight: NMTensor) -> bool:
    """Whether the groups run along the last dim, as in a weight ``[out, in]``."""
    return weight.group_dim == len(weight.batch) + len(weight.rows)


def along(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """``input @ rows.mT + bias``: ``[..., in] -> [..., out]``, from the engine's form."""
    if len(weight.rows) == 1:
        return ENGINES[weight.engine].linear(input, weight, bias)
    if weight.rows[0] == 0:  # no experts: no matrix to hand to an engine
        return _with_bias(torch.matmul(input, unpack_rows(weight).mT), bias)
    return _with_bias(_each(along, input, weight), bias)


def across(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """``input @ rows + bias``: ``[..., out] -> [..., in]``, what the gradient of an input takes.

    From the engine's form where it has this product, else from dense rows made for this call.
    """
    product = ENGINES[weight.engine].matmul
    y = torch.matmul(input, unpack_rows(weight)) if product is None else product(input, weight)
    return _with_bias(y, bias)


def _each(product: Callable[[Tensor, NMTensor], Tensor], input: Tensor, weight: NMTensor) -> Tensor:
    """A product of batches of matrices ``[..., experts, rows, in]``, one after the other."""
    experts = weight.rows[0]
    if input.dim() < 3:
        input = input.expand(experts, *(input if input.dim() == 2 else input.unsqueeze(0)).shape)
    if input.shape[-3] == 1:
        input = input.expand(*input.shape[:-3], experts, *input.shape[-2:])
    if input.shape[-3] != experts:
        raise RuntimeError(
            f"a stack of {experts} packed matrices cannot be multiplied with {list(input.shape)}"
        )
    parts = [product(input.select(-3, i), _matrix(weight, i)) for i in range(experts)]
    return torch.stack(parts, dim=-3)


def _matrix(weight: NMTensor, index: int) -> NMTensor:
    # Below autograd, where values would lose their gradient, they have none that could be lost.
    return select(weight, index)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.expand_as(y)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul`` with one of the two packed."""
    if isinstance(a, NMTensor) and isinstance(b, NMTensor):
        raise NotImplementedError(
            "NMTensor does not support aten.mm of two packed weights; work on .to_dense()"
        )
    if isinstance(b, NMTensor):
        return _from_right(a, b)
    assert isinstance(a, NMTensor)
    if b.dim() == 1:
        return _from_right(b, a, transposed=True)
    return _from_right(b.mT, a, transposed=True).mT  # a @ b = (b^T @ a^T)^T


def _from_right(
    x: Tensor, weight: NMTensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """``x @ weight + bias``, or ``x @ weight.mT + bias``."""
    if weight.batch:
        x = x.expand(*torch.broadcast_shapes(x.shape[:-2], weight.batch), *x.shape[-2:])
    return (along if _inputs_last(weight) == transposed else across)(x, weight, bias)


def _matrices(name: str, weight: Tensor, dims: int) -> None:
    if weight.dim() != dims:
        raise RuntimeError(
            f"{name} takes {dims}-D tensors, got a packed weight of shape {list(weight.shape)}"
        )


# --------------------------------------------------------------------------------------------- above autograd


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if type(weight) is NMTensor and weight.group_dim == 1 and len(weight.rows) == 1:
        return ENGINES[weight.engine].linear(input, weight, bias)
    if not isinstance(weight, NMTensor):
        raise NotImplementedError(
            "F.linear takes an NMTensor as weight only; use .to_dense() for input or bias"
        )
    if len(weight.rows) == 1 and weight.group_dim == 0 and not weight.batch:
        return across(input, weight, bias)
    # Whatever F.linear itself would say to other shapes.
    raise RuntimeError(f"F.linear takes a matrix as weight, got a packed one of shape {list(weight.shape)}")


def _torch_matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    _no_out("matmul", out)
    return matmul(input, other)


def _rmatmul(self: Tensor, other: Tensor) -> Tensor:
    return matmul(other, self)


def _no_out(name: str, out: Tensor | None) -> None:
    if out is not None:
        raise NotImplementedError(f"NMTensor does not support {name} with out=; work on .to_dense()")


def _torch_mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    _no_out("mm", out)
    _matrices("mm", input, 2)
    _matrices("mm", mat2, 2)
    return matmul(input, mat2)


def _torch_bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    _no_out("bmm", out)
    _matrices("bmm", input, 3)
    _matrices("bmm", mat2, 3)
    return matmul(input, mat2)


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    """``torch.addmm`` and ``torch.baddbmm`` with one of the matrices packed."""
    _no_out("addmm", out)
    if isinstance(input, NMTensor):
        raise NotImplementedError("NMTensor does not support addmm with a packed bias; work on .to_dense()")
    if alpha == beta == 1 and isinstance(mat2, NMTensor) and not isinstance(mat1, NMTensor):
        return _from_right(mat1, mat2, input)
    product = matmul(mat1, mat2)
    if alpha != 1:
        product = product * alpha
    # As addmm has it: with beta = 0 not even a NaN in bias counts.
    return product if beta == 0 else product + (input * beta).expand_as(product)


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.grouped_mm`` with a packed stack ``mat_b [experts, in, out]``.

    Rows ``offs[e - 1]`` to ``offs[e]`` of ``mat_a [rows, in]`` meet matrix e; without ``offs`` it is ``bmm``.
    Where the rows are cut is read on the host, so this is for eager mode.

    Raises:
        NotImplementedError: For a packed ``mat_a``, for what is no stack, and in compiled graphs.
    """
    if isinstance(mat_a, NMTensor) or not isinstance(mat_b, NMTensor) or len(mat_b.rows) != 2:
        raise NotImplementedError("NMTensor supports grouped_mm as mat_b [experts, in, out] only")
    if offs is None:
        y = matmul(mat_a, mat_b)
        y = _with_bias(y, bias if bias is None else bias.unsqueeze(-2))
    else:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "NMTensor does not support grouped_mm in compiled graphs: which rows meet which matrix is "
                "not known there; use bmm, or keep these weights dense"
            )
        ends = offs.tolist()
        starts = [0, *ends[:-1]]
        parts = [
            _from_right(mat_a[start:end], _matrix(mat_b, e), None if bias is None else bias[e])
            for e, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        rest = mat_a.shape[0] - ends[-1]
        if rest:
            parts.append(parts[0].new_zeros(rest, mat_b.shape[-1]))
        y = torch.cat(parts)
    return y if out_dtype is None else y.to(out_dtype)


FUNCTIONS[F.linear] = _linear
FUNCTIONS[torch.matmul] = FUNCTIONS[torch.Tensor.matmul] = _torch_matmul
FUNCTIONS[torch.Tensor.__matmul__] = _torch_matmul
FUNCTIONS[torch.Tensor.__rmatmul__] = _rmatmul
FUNCTIONS[torch.mm] = FUNCTIONS[torch.Tensor.mm] = _torch_mm
FUNCTIONS[torch.bmm] = FUNCTIONS[torch.Tensor.bmm] = _torch_bmm
FUNCTIONS[torch.addmm] = FUNCTIONS[torch.Tensor.addmm] = addmm
FUNCTIONS[torch.baddbmm] = FUNCTIONS[torch.Tensor.baddbmm] = addmm
for _owner, _name in ((torch, "_grouped_mm"), (F, "grouped_mm")):
    if hasattr(_owner, _name):  # newer than the oldest torch
        FUNCTIONS[getattr(_owner, _name)] = grouped_mm

# --------------------------------------------------------------------------------------------- below autograd


@implements(aten.mm.default, aten.bmm.default)
def _mm(func: Any, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(a, NMTensor) and isinstance(b, NMTensor):
        raise unsupported(func, "of two packed weights")
    return matmul(a, b)


@implements(aten.addmm.default, aten.baddbmm.default)
def _addmm(func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, NMTensor):
        raise unsupported(func, "with a packed bias")
    return addmm(bias, a, b, beta=beta, alpha=alpha)


@implements(aten.linear.default)
def _aten_linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _linear(input, weight, bias)


@implements(aten._grouped_mm.default)
def _aten_grouped_mm(func: Any, mat_a: Tensor, mat_b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    named = dict(zip(("offs", "bias", "out_dtype"), args, strict=False))
    return grouped_mm(mat_a, mat_b, **named, **kwargs)
