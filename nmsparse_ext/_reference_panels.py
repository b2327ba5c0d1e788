"""The CPU engine's panels in pure PyTorch: packing, restoring, and products. See `reference.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _conv_layout as conv_checks
from . import _panel_layout as panel_checks
from . import reference
from ._checks import ceil_div
from ._panel_layout import PANEL_ROWS, WINDOW_INPUTS, PanelLayout
from .pattern import Pattern
from .reference_rule import as_int


def _window_places(indices: Tensor, n: int, m: int, k: int, layout: PanelLayout) -> Tensor:
    """Where in its group each value stands: ``int64 [rows, windows, slots]``.

    Missing groups at the end point at their first weight.
    """
    group_bits = reference.group_bits_of(indices, n, m, k)
    if Pattern(n, m).encoding == "bitmask":
        places = (1 - group_bits).sort(dim=-1, stable=True).indices[..., :n]
    else:
        places = reference.index_fields(group_bits, n, m)
    windows = layout.steps * layout.halves
    missing = windows * (layout.window // m) - places.shape[-2]
    return F.pad(places, (0, 0, 0, missing)).reshape(places.shape[0], windows, layout.slots)


def _group_starts(layout: PanelLayout, device: torch.device) -> Tensor:
    """The place in the window at which the group of each slot starts: ``int64 [slots]``."""
    return torch.arange(layout.slots, device=device) // layout.n * layout.m


def _by_panel(rows: Tensor, layout: PanelLayout) -> Tensor:
    """``[rows, windows, slots] -> [panels, steps, slots, 16, halves]``, missing rows filled with 0."""
    panels = ceil_div(rows.shape[0], PANEL_ROWS)
    rows = F.pad(rows, (0, 0, 0, 0, 0, panels * PANEL_ROWS - rows.shape[0]))
    split = rows.reshape(panels, PANEL_ROWS, layout.steps, layout.halves, layout.slots)
    return split.permute(0, 2, 4, 1, 3)


def _field_shifts(layout: PanelLayout, device: torch.device) -> Tensor:
    """The bit at which each field of a word starts: ``int64 [fields, 1, halves]``."""
    shifts = torch.arange(layout.fields, device=device) * layout.index_bits
    return shifts.view(-1, 1, 1) + torch.arange(layout.halves, device=device) * (32 // layout.halves)


def panel_pack(values: Tensor, indices: Tensor, n: int, m: int, k: int) -> tuple[Tensor, Tensor]:
    """The panel form of a packed weight ``[rows, k]``: values and index words; see ``core/panel_layout.h``.

    Returns:
        ``value_panels [panels, steps, slots, 16]`` (bfloat16: ``[..., 16, 2]``, int8: ``[..., 16, 4]``) and
        ``index_panels int32 [panels, words, 16]``.
    """
    panel_checks.check_panel_pack(values, indices, n, m, k)
    layout = PanelLayout.of(n, m, k, values.dtype)
    rows, windows = values.shape[0], layout.steps * layout.halves
    kept = F.pad(as_int(values), (0, windows * layout.slots - values.shape[1]))
    value_panels = _by_panel(kept.reshape(rows, windows, layout.slots), layout)
    if layout.halves == 1:
        value_panels = value_panels.squeeze(-1)

    fields = _window_places(indices, n, m, k, layout)
    if layout.index_bits == 4:
        fields = fields + _group_starts(layout, values.device)
    fields = _by_panel(fields, layout).flatten(1, 2)  # [panels, slots of the panel, 16, halves]
    fields = F.pad(fields, (0, 0, 0, 0, 0, layout.words * layout.fields - fields.shape[1]))
    fields = fields.reshape(fields.shape[0], layout.words, layout.fields, PANEL_ROWS, layout.halves)
    words = (fields << _field_shifts(layout, values.device)).sum((2, 4))
    words = words - ((words >> 31) << 32)  # as the int32 with the same bits
    return value_panels.contiguous().view(values.dtype), words.to(torch.int32)


def _by_row(value_panels: Tensor, index_panels: Tensor, layout: PanelLayout) -> tuple[Tensor, Tensor]:
    """Values (as integers) and index fields row by row: ``[panels * 16, windows, slots]``."""
    panels = value_panels.shape[0]
    words = index_panels.to(torch.int64).view(panels, layout.words, 1, PANEL_ROWS, 1)
    fields = (words >> _field_shifts(layout, words.device)) & ((1 << layout.index_bits) - 1)
    fields = fields.flatten(1, 2)[:, : layout.steps * layout.slots]

    def by_row(x: Tensor) -> Tensor:
        split = x.reshape(panels, layout.steps, layout.slots, PANEL_ROWS, layout.halves)
        windows = layout.steps * layout.halves
        return split.permute(0, 3, 1, 4, 2).reshape(panels * PANEL_ROWS, windows, layout.slots)

    return by_row(as_int(value_panels)), by_row(fields)


def panel_restore(
    value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> tuple[Tensor, Tensor]:
    """What `panel_pack` was given, bit for bit: ``values [rows, groups * n]`` and ``indices``."""
    panel_checks.check_panels(value_panels, index_panels, n, m, rows, k)
    layout = PanelLayout.of(n, m, k, value_panels.dtype)
    groups = ceil_div(k, m)
    values, places = _by_row(value_panels, index_panels, layout)
    if layout.index_bits == 4:
        places = places - _group_starts(layout, places.device)
    # Without a copy it could be the panels' own memory.
    kept = values.flatten(1)[:rows, : groups * n].clone(memory_format=torch.contiguous_format)
    kept = kept.view(value_panels.dtype)
    places = places.flatten(1)[:rows, : groups * n].reshape(rows, groups, n)
    return kept, reference.encode_group(places, n, m)


def panel_unpack(value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int) -> Tensor:
    """The dense weight ``[rows, k]`` of its panel form."""
    panel_checks.check_panels(value_panels, index_panels, n, m, rows, k)
    layout = PanelLayout.of(n, m, k, value_panels.dtype)
    values, places = (part[:rows] for part in _by_row(value_panels, index_panels, layout))
    if layout.index_bits == 2:
        places = places + _group_starts(layout, places.device)
    # In damaged indices a field of 2 bits can name a place behind its window.
    places = places % WINDOW_INPUTS
    dense = values.new_zeros(rows, layout.steps * layout.halves, WINDOW_INPUTS)
    dense.scatter_(-1, places, values)
    return dense[..., : layout.window].flatten(1)[:, :k].contiguous().view(value_panels.dtype)


def panel_linear(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    activation: str,
) -> Tensor:
    """``activation(x @ W.T + bias)`` with ``W [rows, k]`` in panel form: ``[..., k] -> [..., rows]``.

    Sums are taken in float32, or in float64 for float64, and rounded once, after the activation ("none",
    "relu", "gelu", "silu").
    """
    panel_checks.check_panel_linear(x, value_panels, index_panels, bias, n, m, rows, k, activation)
    compute = torch.promote_types(torch.float32, x.dtype)
    weight = panel_unpack(value_panels, index_panels, n, m, rows, k).to(compute)
    y = F.linear(x.to(compute), weight, None if bias is None else bias.to(compute))
    if activation != "none":
        y = getattr(F, activation)(y)
    return y.to(x.dtype)


def panel_matmul(
    x: Tensor, value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> Tensor:
    """``x @ W`` with ``W [rows, k]`` in panel form: ``[..., rows] -> [..., k]``.

    The gradient of the input of `panel_linear`. Sums are taken in float32, or in float64 for float64, and
    rounded once.
    """
    panel_checks.check_panel_matmul(x, value_panels, index_panels, n, m, rows, k)
    compute = torch.promote_types(torch.float32, x.dtype)
    weight = panel_unpack(value_panels, index_panels, n, m, rows, k).to(compute)
    return (x.to(compute) @ weight).to(x.dtype)


def panel_conv(
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
) -> Tensor:
    """``activation(convolution(x, W) + bias + residual)``.

    ``x [N, places..., groups * k]``, residual and result ``[N, places..., rows]``.

    ``W [rows, *kernel, k]`` is in panel form, see ``core/conv_shape.h``; ``padding`` is before and after each
    dim, in turn. Sums are taken and rounded as those of `panel_linear`.
    """
    conv_checks.check_panel_conv(
        x,
        value_panels,
        index_panels,
        bias,
        residual,
        n,
        m,
        rows,
        k,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        activation,
    )
    places = conv_checks.output_sizes(x.shape[1:-1], kernel, stride, padding, dilation)
    if x.shape[0] == 0 or rows == 0:
        return x.new_empty((x.shape[0], *places, rows))
    compute = torch.promote_types(torch.float32, x.dtype)
    taps = math.prod(kernel)
    tap = conv_checks.tap_inputs(n, m, k, taps, x.dtype)
    dense = panel_unpack(value_panels, index_panels, n, m, rows, taps * tap)
    weight = conv_checks.weight_of_rows(dense, k, kernel).to(compute)
    before_and_after = [
        size for d in reversed(range(len(kernel))) for size in (padding[2 * d], padding[2 * d + 1])
    ]
    image = F.pad(x.to(compute).movedim(-1, 1), before_and_after)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    y = conv(image, weight, None if bias is None else bias.to(compute), stride, 0, dilation, groups)
    if residual is not None:
        y = y + residual.movedim(-1, 1).to(compute)
    if activation != "none":
        y = getattr(F, activation)(y)
    return y.movedim(1, -1).to(x.dtype).contiguous()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows to int8, symmetric, with one scale each; see ``core/quantize.h``. No op of its own.

    Returns:
        The integers, of ``x``'s shape, and the scales, float32 ``[..., 1]``: ``amax / 127``; 0, with integers
        0, for rows below ``2**-100``; NaN, with integers 0, for rows that hold a NaN or an infinity.
    """
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite, zero = amax.isfinite(), amax < 2.0**-100  # amax of a NaN is NaN
    # A number divided by a tensor is the number times a rounded reciprocal: not what is wanted here.
    inverse = torch.where(finite & ~zero, torch.full_like(amax, 127.0) / amax, 0.0)
    integers = torch.where(inverse != 0, (x * inverse).round(), 0.0).to(torch.int8)
    scale = torch.where(zero, 0.0, amax / 127.0)
    return integers, torch.where(finite, scale, torch.nan)


def panel_linear_int8(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    activation: str,
) -> Tensor:
    """``activation(x @ (W * scales).T + bias)`` with int8 ``W [rows, k]`` in panel form, in integers.

    Rows of ``x`` are rounded to int8 (``quantize_rows``), products are summed exactly, and each sum becomes
    ``float32(sum) * (scale of x * scale of W)``, plus bias, activated, rounded once to ``x``'s dtype.

    ``scales`` float32 ``[panels, 16]`` are the scales of the weight's rows, ``sums`` int32 ``[panels, 16]``
    the sums of their values, which some processors need.
    """
    panel_checks.check_panel_linear_int8(
        x, value_panels, index_panels, scales, sums, bias, n, m, rows, k, activation
    )
    integers, x_scale = quantize_rows(x)
    weight = panel_unpack(value_panels, index_panels, n, m, rows, k)
    exact = F.linear(integers.double(), weight.double())  # integers below 2^53
    y = exact.float() * (x_scale * scales.flatten()[:rows])
    if bias is not None:
        y = y + bias.float()
    if activation != "none":
        y = getattr(F, activation)(y)
    return y.to(x.dtype)
