"""Shapes of packed convolutions and argument checks of their op.

The twin of ``csrc/core/conv_shape.h``, which says how a convolution's weight lies in panels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _panel_layout as panel_checks
from ._checks import ceil_div
from ._panel_layout import PANEL_ROWS, PanelLayout
from .pattern import Pattern

MAX_CONV_DIMS = 3


def tap_inputs(n: int, m: int, inputs: int, taps: int, dtype: torch.dtype) -> int:
    """Weights of a row of the panel form that one place of the kernel takes: ``inputs``, filled up.

    Whole steps, so that no window holds weights of two places, of which the indices are whole bytes.
    """
    if taps == 1:
        return inputs
    layout = PanelLayout.of(n, m, 0, dtype)
    step = layout.halves * layout.window
    bits = step // m * Pattern(n, m).bits_per_group
    unit = step * (8 // math.gcd(bits, 8))
    return ceil_div(inputs, unit) * unit


def weight_of_rows(rows: Tensor, k: int, kernel: Sequence[int]) -> Tensor:
    """The weight ``[O, k, *kernel]`` of its rows ``[O, taps * tap_inputs]``; a view."""
    return rows.view(rows.shape[0], *kernel, -1)[..., :k].movedim(-1, 1)


def output_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Places of the output along each dim; ``padding`` is before and after each, in turn."""
    return [
        (size + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d, size in enumerate(sizes)
    ]


def check_panel_conv(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> None:
    dims = len(kernel)
    torch._check(1 <= dims <= MAX_CONV_DIMS, lambda: f"kernel must have 1 to 3 sizes, got {dims}")
    torch._check(
        len(stride) == dims and len(dilation) == dims,
        lambda: f"stride and dilation must have {dims} sizes, as kernel has, got {stride} and {dilation}",
    )
    torch._check(
        len(padding) == 2 * dims,
        lambda: f"padding must have {2 * dims} sizes, before and after each dim, got {padding}",
    )
    torch._check(x.dim() == dims + 2, lambda: f"x must have {dims + 2} dimensions, got {x.dim()}")
    torch._check(
        min(*kernel, *stride, *dilation) > 0,
        lambda: f"kernel, stride and dilation must be positive, got {kernel}, {stride} and {dilation}",
    )
    torch._check(min(padding) >= 0, lambda: f"padding must not be negative, got {padding}")
    places = output_sizes(x.shape[1:-1], kernel, stride, padding, dilation)
    torch._check(
        all(size > 0 for size in places),
        lambda: f"the kernel {kernel} is larger than x, {list(x.shape)}, with padding {padding}",
    )
    panel_checks.check_panel_pattern(n, m)
    torch._check(rows >= 0 and k >= 0, lambda: f"rows and k must be >= 0, got {rows} and {k}")
    row = math.prod(kernel) * tap_inputs(n, m, k, math.prod(kernel), value_panels.dtype)
    panel_checks.check_panels(value_panels, index_panels, n, m, rows, row)
    torch._check(
        groups == 1 or (groups > 1 and rows % (groups * PANEL_ROWS) == 0),
        lambda: f"each of {groups} groups must have a multiple of 16 outputs, of {rows} in all",
    )
    torch._check(
        x.shape[-1] == groups * k,
        lambda: f"the last size of x must be groups * k = {groups * k}, got shape {list(x.shape)}",
    )
    panel_checks.check_product_operands(x, value_panels, bias, rows)
    if residual is not None:
        torch._check(
            list(residual.shape) == [x.shape[0], *places, rows] and residual.dtype == x.dtype,
            lambda: (
                f"residual must have the shape of the result, {[x.shape[0], *places, rows]}, and the dtype "
                f"of x, {x.dtype}, got {list(residual.shape)} of {residual.dtype}"
            ),
        )
        torch._check(residual.device == x.device, lambda: "x and residual must be on the same device")
    panel_checks.check_activation(activation)
