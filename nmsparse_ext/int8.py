"""Packed products in integers: int8 weights with a scale a row, inputs rounded to int8 on the way in.

There are two ways here. A weight of floating point numbers is rounded when it is given the engine::

    W = nms.compress(w, "2:4").with_engine("cpu-int8")      # or nms.convert(model, engine="cpu-int8")
    y = F.linear(x, W, bias)

A weight that somebody else has quantized keeps its integers and scales as they are::

    W = nms.compress(w_int8, "2:4").with_engine("cpu-int8")  # w_int8: torch.int8, with its zeros
    y = nms.int8_linear(x, W, scales, bias)

How numbers are rounded, and what becomes of NaN and infinity, is in ``csrc/core/quantize.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)
from ._panel_layout import ACTIVATIONS, INT8_INPUT_DTYPES, PANEL_ROWS
from .panels import Activation, _wants_autograd, panel_pack
from .pattern import Pattern
from .reference import quantize_rows

if TYPE_CHECKING:
    from .tensor import NMTensor

__all__ = ["Int8Panels", "int8_linear", "int8_panels", "multiply_int8"]


class Int8Panels(NamedTuple):
    """A weight ``[rows, k]`` of int8 in panel form (``csrc/core/panel_layout.h``).

    Attributes:
        values: int8 ``[panels, steps, slots, 16, 4]``.
        indices: int32 ``[panels, words, 16]``.
        scales: float32 ``[panels, 16]``: what one unit of a row's integers stands for.
        sums: int32 ``[panels, 16]``: sums of the rows' integers.
    """

    values: Tensor
    indices: Tensor
    scales: Tensor
    sums: Tensor


def int8_panels(values: Tensor, indices: Tensor, pattern: Pattern, *, k: int) -> Int8Panels:
    """Lays a packed weight out in panels of int8.

    Args:
        values: ``[rows, groups * n]``. int8 values are taken as they are, with scale 1; others are rounded,
            row by row: ``scale = amax / 127``, to the nearest integer, ties to even.
        indices: uint8 ``[rows, bytes]``.
        pattern: Its pattern, ``m <= 16``.
        k: Inputs of a row.

    Returns:
        New tensors.
    """
    if values.dtype == torch.int8:
        integers, scales = values, torch.ones(values.shape[0], 1, device=values.device)
    else:
        integers, scales = quantize_rows(values)
    panels = panel_pack(integers, indices, pattern, k=k)
    return Int8Panels(*panels, _by_panel(scales.flatten()), _by_panel(integers.sum(1, dtype=torch.int32)))


def _by_panel(per_row: Tensor) -> Tensor:
    """``[rows] -> [panels, 16]``, missing rows filled with 0."""
    return F.pad(per_row, (0, -per_row.shape[0] % PANEL_ROWS)).view(-1, PANEL_ROWS)


def multiply_int8(
    x: Tensor,
    panels: Int8Panels,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    rows: int,
    k: int,
    activation: Activation = "none",
) -> Tensor:
    """Multiplies in integers with a weight in panel form; see `int8_linear`.

    Args:
        x: ``[..., k]``, any strides, float32, bfloat16 or float16.
        panels: The weight ``[rows, k]``.
        bias: ``[rows]``, of ``x``'s dtype.
        pattern: The weight's pattern.
        rows: Outputs.
        k: Inputs.
        activation: Applied to the sums.

    Returns:
        ``[..., rows]``, contiguous.
    """
    arguments = (x, *panels, bias, pattern.n, pattern.m, rows, k, activation)
    if _wants_autograd(x, bias):
        return torch.ops.nmsparse.panel_linear_int8(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as in panels.panel_linear
        return torch.ops.nmsparse.panel_linear_int8(*arguments)


def int8_linear(
    x: Tensor,
    weight: NMTensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
) -> Tensor:
    """A linear layer from an int8 weight and its scales, as they come from a quantized checkpoint.

    Rows of ``x`` are rounded to int8 (symmetric, ``scale = amax / 127``), products are summed exactly, and
    each sum becomes ``float32(sum) * (scale of x * scales[row])``, plus bias, activated, rounded once to
    ``x``'s dtype. The integers of the weight are used as they are. A row of ``x`` that holds a NaN or an
    infinity gives NaNs; one of zeros, or below ``2**-100``, gives ``activation(bias)``. On a GPU ``x`` is
    rounded only where cuSPARSELt goes, and that only by `crossover.allow_rounded_inputs`.

    Equivalent to, within the rounding of ``x``::

        w = weight.to_dense().float() * scales[:, None]
        activation(F.linear(x.float(), w, bias.float())).to(x.dtype)

    Args:
        x: ``[..., in]``, float32, bfloat16 or float16, any strides.
        weight: int8 ``[out, in]``, packed along its inputs: ``compress(w, pattern).with_engine("cpu-int8")``;
            on a GPU ``compress(w, pattern)``. Symmetric: there are no zero points.
        scales: ``[out]`` or ``[out, 1]``, floating point: what one unit of each row's integers stands for.
        bias: ``[out]``; taken in ``x``'s dtype.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` or ``"silu"``.

    Returns:
        ``[..., out]`` of ``x``'s dtype; differentiable in ``x`` (as if it were not rounded) and ``bias``.

    Raises:
        TypeError: If an argument is of the wrong type or dtype.
        ValueError: If the weight is not run by engine "cpu-int8", sizes do not fit, or there is no such
            activation.
    """
    from .tensor import NMTensor

    if not isinstance(weight, NMTensor):
        raise TypeError(f"weight must be an NMTensor, got {type(weight).__name__}")
    for name, argument in (("x", x), ("scales", scales), *((("bias", bias),) if bias is not None else ())):
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(argument).__name__}")
    if weight.engine not in ("cpu-int8", "cuda-int8"):
        raise ValueError(
            f"weight must be run by engine 'cpu-int8', got {weight.engine!r}: use "
            "weight.with_engine('cpu-int8'), or 'cuda-int8' on a GPU"
        )
    if weight.dtype != torch.int8:
        raise TypeError(
            f"weight must be int8, got {weight.dtype}, which brings scales of its own: use F.linear"
        )
    if weight.group_dim != 1:
        raise ValueError(f"weight must be packed along dim 1, its inputs, got dim {weight.group_dim}")
    out, inputs = weight.dense_shape()
    if x.dtype not in INT8_INPUT_DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, INT8_INPUT_DTYPES))}, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must have last size {inputs}, got shape {list(x.shape)}")
    if not scales.dtype.is_floating_point:
        raise TypeError(f"scales must be floating point, got {scales.dtype}")
    if tuple(scales.shape) not in ((out,), (out, 1)):
        raise ValueError(f"scales must have shape [{out}] or [{out}, 1], got {list(scales.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias must have shape [{out}], got {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if weight.engine == "cuda-int8":
        from .engines_cuda_8bit import parts_of, with_parts

        parts = parts_of(weight)._replace(scales=scales.detach().float().flatten())
        return with_parts(x, parts, weight, None if bias is None else bias.to(x.dtype), activation)
    panels = panels_of(weight)._replace(scales=_by_panel(scales.detach().float().flatten()))
    bias = None if bias is None else bias.to(x.dtype)
    return multiply_int8(x, panels, bias, weight.pattern, rows=out, k=inputs, activation=activation)


def panels_of(weight: NMTensor) -> Int8Panels:
    """The forms of a weight of engine "cpu-int8"; built anew if it was written to."""
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    # Forms are no declared attributes.
    return Int8Panels(*(getattr(weight, f"form_{name}") for name in Int8Panels._fields))
