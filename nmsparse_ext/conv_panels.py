"""Convolutions with a weight in panel form: a thin layer over the ops.

The rows of the weight are its outputs; along each lie the places of the kernel, one after the other, and the
input channels of each place (``csrc/core/conv_shape.h`` draws it). So the product is the one of `panels`, and
what a pixel of the output sees of the image takes the place of a row of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import ceil_div
from ._conv_layout import tap_inputs, weight_of_rows
from ._panel_layout import PANEL_ROWS
from .panels import Activation, Panels, panel_pack, panel_restore, panel_unpack, without_autograd
from .pattern import Pattern

__all__ = ["conv_pack", "conv_restore", "conv_unpack", "panel_conv", "why_no_conv"]

_nms = torch.ops.nmsparse

# By dims of places: orders of dims that move the channels behind them, and back.
_TO_LAST = {1: (0, 2, 1), 2: (0, 2, 3, 1), 3: (0, 2, 3, 4, 1)}
_FROM_LAST = {1: (0, 2, 1), 2: (0, 3, 1, 2), 3: (0, 4, 1, 2, 3)}


def conv_pack(values: Tensor, indices: Tensor, pattern: Pattern, *, k: int) -> Panels:
    """Lays the packed weight of a convolution out in panels.

    Args:
        values: ``[O, *kernel, groups * n]``.
        indices: uint8 ``[O, *kernel, bytes]``.
        pattern: Its pattern, ``m <= 16``.
        k: Input channels of a filter.

    Returns:
        New tensors: the panels of ``O`` rows.
    """
    taps = math.prod(values.shape[1:-1])
    tap = tap_inputs(pattern.n, pattern.m, k, taps, values.dtype)
    if taps > 1:
        groups = ceil_div(tap, pattern.m)
        values = _filled(values, groups * pattern.n)
        indices = _filled(indices, groups * pattern.bits_per_group // 8)
    return panel_pack(values.flatten(1), indices.flatten(1), pattern, k=taps * tap)


def _filled(x: Tensor, size: int) -> Tensor:
    """``x`` with zeros at the end of its last dim, ``size`` in all."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def conv_restore(panels: Panels, pattern: Pattern, *, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `conv_pack` was given, bit for bit, for a weight of ``shape [O, I, *kernel]``."""
    rows, k, *kernel = shape
    taps = math.prod(kernel)
    tap = tap_inputs(pattern.n, pattern.m, k, taps, panels.values.dtype)
    values, indices = panel_restore(panels, pattern, rows=rows, k=taps * tap)
    bits = ceil_div(k, pattern.m) * pattern.bits_per_group
    values = values.view(rows, *kernel, values.shape[1] // taps)
    indices = indices.view(rows, *kernel, indices.shape[1] // taps)
    values = values[..., : ceil_div(k, pattern.m) * pattern.n].contiguous()
    indices = indices[..., : ceil_div(bits, 8)].contiguous()
    if bits % 8 and taps > 1:  # where the groups began that fill a place up
        indices[..., -1] &= (1 << bits % 8) - 1
    return values, indices


def conv_unpack(panels: Panels, pattern: Pattern, *, shape: Sequence[int]) -> Tensor:
    """The dense weight, of ``shape [O, I, *kernel]``; its memory is in the order ``[O, *kernel, I]``."""
    rows, k, *kernel = shape
    taps = math.prod(kernel)
    row = taps * tap_inputs(pattern.n, pattern.m, k, taps, panels.values.dtype)
    return weight_of_rows(panel_unpack(panels, pattern, rows=rows, k=row), k, kernel)


def why_unaligned(rows: int, groups: int) -> str | None:
    """Why the panels of ``rows`` outputs do not fall into ``groups`` groups, or ``None`` if they do."""
    if groups > 1 and rows % (groups * PANEL_ROWS):
        return f"each of {groups} groups must have a multiple of {PANEL_ROWS} outputs, of {rows} in all"
    return None


def why_no_conv(input: Tensor, shape: Sequence[int], groups: int) -> str | None:
    """Why `panel_conv` cannot take these, or ``None`` if it can.

    Args:
        input: As for `panel_conv`.
        shape: Of the weight, ``[O, I, *kernel]``.
        groups: Groups of the convolution.
    """
    if input.dim() not in (len(shape), len(shape) - 1):
        return f"the input has {input.dim()} dimensions, the weight {len(shape)}"
    if input.shape[-len(shape) + 1] != groups * shape[1]:
        return f"the input has {input.shape[-len(shape) + 1]} channels, not {groups} * {shape[1]}"
    return why_unaligned(shape[0], groups)


def panel_conv(
    input: Tensor,
    panels: Panels,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Convolves with a weight in panel form; differentiable in ``input``, ``bias`` and ``residual``.

    Equivalent to ``activation(F.conv2d(input, conv_unpack(panels, ...), bias, ...) + residual)`` (or
    ``conv1d``, ``conv3d``) with an input padded beforehand, except that sums are taken in float32 and rounded
    once, and that what meets a pruned weight does not count, not even infinity.

    Channels are read next to each other, so an input in channels_last needs no copy.

    Args:
        input: ``[N, C, *places]`` or ``[C, *places]`` with 1 to 3 dims of places, any strides, of the panels'
            dtype.
        panels: The weight, from `conv_pack`.
        bias: ``[O]``, of the same dtype.
        pattern: The weight's pattern.
        shape: The weight's shape ``[O, C / groups, *kernel]``.
        stride: Per dim of places.
        padding: Before and after each dim of places, in turn.
        dilation: Per dim of places.
        groups: Groups of the convolution; if several, each has a multiple of 16 outputs.
        residual: Of the result's shape and dtype; added to the sums before the activation.
        activation: Applied to the sums. With gradients, the sums are taken once more in the backward pass.

    Returns:
        ``[N, O, *places]`` or ``[O, *places]``: channels_last where the input is (in 2-D and 3-D), else
        contiguous; as ``F.conv2d`` has it with a contiguous weight.
    """
    rows, k, *kernel = shape
    geometry = (kernel, stride, padding, dilation, groups, activation)
    batched = input if input.dim() == len(shape) else input.unsqueeze(0)
    to_last = _TO_LAST[len(kernel)]
    if residual is not None:
        residual = (residual if batched is input else residual.unsqueeze(0)).permute(to_last)
    operands = (batched.permute(to_last), panels.values, panels.indices, bias, residual)
    with without_autograd(input, bias, residual):
        y = _nms.panel_conv(*operands, pattern.n, pattern.m, rows, k, *geometry)
    y = y.permute(_FROM_LAST[len(kernel)])
    if not _is_channels_last(batched):
        y = y.contiguous()
    return y if batched is input else y.squeeze(0)


def _is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes the strides of ``x [N, C, *places]`` for channels_last; it has none in 1-D."""
    dims = x.dim()
    if dims == 3:
        return False
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(dims - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True
