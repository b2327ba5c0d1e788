"""Shapes of the panel form and argument checks of its ops.

The twin of ``csrc/core/panel_layout.h``, which says what the form is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as checks
from ._checks import ceil_div

PANEL_ROWS = 16
WINDOW_INPUTS = 16  # room of a window
MAX_PANEL_M = 16
MAX_INT8_KEPT = 1 << 17  # of a row, for sums of int8 products to fit into 32 bits
PRODUCT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PANEL_DTYPES = (*PRODUCT_DTYPES, torch.int8)  # products of int8 have an op of their own
INT8_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WINDOWS_OF_STEP = {torch.bfloat16: 2, torch.int8: 4}
ACTIVATIONS = ("none", "relu", "gelu", "silu")


@dataclass(frozen=True)
class PanelLayout:
    """How a weight of ``k`` inputs lies in panels.

    Attributes:
        n: Kept of every group.
        m: Size of a group.
        halves: Windows in a step: 2 for bfloat16, 4 for int8.
        window: Inputs that a window covers.
        slots: Kept weights of one row in a window.
        index_bits: Width of an index field: 2 for the place in the group, 4 for the place in the window.
        fields: Index fields per word and half.
        steps: Steps per panel.
        words: Index words per panel and lane.
    """

    n: int
    m: int
    halves: int
    window: int
    slots: int
    index_bits: int
    fields: int
    steps: int
    words: int

    @staticmethod
    def of(n: int, m: int, k: int, dtype: torch.dtype) -> PanelLayout:
        """The layout of weights of ``dtype``."""
        halves = _WINDOWS_OF_STEP.get(dtype, 1)
        window = WINDOW_INPUTS // m * m
        slots = window // m * n
        index_bits = 2 if m in (1, 2, 4) and 2 * n <= m else 4
        fields = 32 // halves // index_bits
        unroll = fields // slots if fields % slots == 0 else 1
        steps = ceil_div(ceil_div(k, halves * window), unroll) * unroll
        words = ceil_div(steps * slots, fields)
        return PanelLayout(n, m, halves, window, slots, index_bits, fields, steps, words)

    def value_shape(self, rows: int) -> list[int]:
        """Shape of ``value_panels``."""
        shape = [ceil_div(rows, PANEL_ROWS), self.steps, self.slots, PANEL_ROWS]
        return shape if self.halves == 1 else [*shape, self.halves]

    def index_shape(self, rows: int) -> list[int]:
        """Shape of ``index_panels``."""
        return [ceil_div(rows, PANEL_ROWS), self.words, PANEL_ROWS]


def check_panel_pattern(n: int, m: int) -> None:
    torch._check(
        1 <= n <= m <= MAX_PANEL_M,
        lambda: f"the pattern must satisfy 1 <= n <= m <= {MAX_PANEL_M}, got {n}:{m}",
    )


def check_panel_dtype(tensor: Tensor, name: str) -> None:
    torch._check(
        tensor.dtype in PANEL_DTYPES,
        lambda: f"{name} must be one of {', '.join(map(str, PANEL_DTYPES))}, got {tensor.dtype}",
    )


def check_panel_pack(values: Tensor, indices: Tensor, n: int, m: int, k: int) -> None:
    check_panel_pattern(n, m)
    check_panel_dtype(values, "values")
    torch._check(values.dim() == 2, lambda: f"values must have 2 dimensions, got {values.dim()}")
    checks.check_packed(values, indices, n, m, k, 1)


def check_panels(value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int) -> None:
    check_panel_pattern(n, m)
    torch._check(rows >= 0 and k >= 0, lambda: f"rows and k must be >= 0, got {rows} and {k}")
    check_panel_dtype(value_panels, "value_panels")
    torch._check(
        index_panels.dtype == torch.int32,
        lambda: f"index_panels must be torch.int32, got {index_panels.dtype}",
    )
    layout = PanelLayout.of(n, m, k, value_panels.dtype)
    for name, tensor, shape in (
        ("value_panels", value_panels, layout.value_shape(rows)),
        ("index_panels", index_panels, layout.index_shape(rows)),
    ):
        torch._check(
            tensor.dim() == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
            lambda name=name, tensor=tensor, shape=shape: (
                f"{name} must have shape {shape} for {rows} rows of {k} in {n}:{m}, got {list(tensor.shape)}"
            ),
        )
        checks.check_contiguous(tensor, name)
    checks.check_same_device(index_panels, "index_panels", value_panels, "value_panels")


def check_panel_linear(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    activation: str,
) -> None:
    check_panels(value_panels, index_panels, n, m, rows, k)
    torch._check(
        value_panels.dtype in PRODUCT_DTYPES,
        lambda: f"value_panels must be one of {PRODUCT_DTYPES}, got {value_panels.dtype}",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == k,
        lambda: f"the last size of x must be k = {k}, got shape {list(x.shape)}",
    )
    check_product_operands(x, value_panels, bias, rows)
    check_activation(activation)


def check_panel_matmul(
    x: Tensor, value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> None:
    check_panels(value_panels, index_panels, n, m, rows, k)
    torch._check(
        value_panels.dtype in PRODUCT_DTYPES,
        lambda: f"value_panels must be one of {PRODUCT_DTYPES}, got {value_panels.dtype}",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == rows,
        lambda: f"the last size of x must be rows = {rows}, got shape {list(x.shape)}",
    )
    check_product_operands(x, value_panels, None, rows)


def check_product_operands(x: Tensor, value_panels: Tensor, bias: Tensor | None, rows: int) -> None:
    """``x`` and ``bias`` beside the panels of a weight with ``rows`` outputs."""
    torch._check(
        x.dtype == value_panels.dtype,
        lambda: f"x must have the dtype of value_panels, {value_panels.dtype}, got {x.dtype}",
    )
    checks.check_same_device(x, "x", value_panels, "value_panels")
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == rows and bias.dtype == x.dtype,
            lambda: f"bias must be [{rows}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}",
        )
        checks.check_same_device(bias, "bias", x, "x")


def check_activation(activation: str) -> None:
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}",
    )


def check_panel_linear_int8(
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
) -> None:
    torch._check(
        value_panels.dtype == torch.int8, lambda: f"value_panels must be int8, got {value_panels.dtype}"
    )
    check_panels(value_panels, index_panels, n, m, rows, k)
    shape = [ceil_div(rows, PANEL_ROWS), PANEL_ROWS]
    for name, tensor, dtype in (("scales", scales, torch.float32), ("sums", sums, torch.int32)):
        torch._check(
            tensor.dtype == dtype
            and tensor.dim() == 2
            and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
            lambda name=name, tensor=tensor, dtype=dtype: (
                f"{name} must be {shape} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            ),
        )
        checks.check_contiguous(tensor, name)
        checks.check_same_device(tensor, name, value_panels, "value_panels")
    torch._check(
        ceil_div(k, m) * n <= MAX_INT8_KEPT,
        lambda: f"rows must keep at most {MAX_INT8_KEPT} weights for sums in 32 bits, got k = {k} in {n}:{m}",
    )
    torch._check(
        x.dtype in INT8_INPUT_DTYPES,
        lambda: f"x must be one of {', '.join(map(str, INT8_INPUT_DTYPES))}, got {x.dtype}",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == k,
        lambda: f"the last size of x must be k = {k}, got shape {list(x.shape)}",
    )
    checks.check_same_device(x, "x", value_panels, "value_panels")
    check_product_operands(x, x, bias, rows)
    check_activation(activation)
