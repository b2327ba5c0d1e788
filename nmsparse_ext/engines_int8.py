"""The engine that multiplies in integers on the CPU. It rounds, so it runs on request only.

A weight of floating point numbers is rounded to int8 when the engine is chosen, with one scale a row
(``amax / 127``); its values and indices stay as they are, and what is saved is not rounded. Inputs are
rounded in every call, with one scale a row of the batch.

How far off that is: with ``|x - x'| <= s_x / 2`` and ``|w - w'| <= s_w / 2`` for every input and kept weight,
an output differs from the exact one by at most::

    s_x / 2 * sum |w|  +  s_w / 2 * sum |x|  +  kept * s_x * s_w / 4

where sums run over the kept weights of the row; rounding errors being independent, it is typically
``sqrt(kept)`` times smaller: some 1 % of an output's usual size for normally distributed numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._panel_layout import ACTIVATIONS, INT8_INPUT_DTYPES, MAX_INT8_KEPT, MAX_PANEL_M, PANEL_ROWS
from .engines import Engine, portable, register_engine, unpack_rows, unpacked_conv
from .int8 import Int8Panels, int8_panels, multiply_int8, panels_of
from .panels import Activation, transforming

if TYPE_CHECKING:
    from .tensor import NMTensor

_WEIGHT_DTYPES = (*INT8_INPUT_DTYPES, torch.int8)


def _why_not(weight: NMTensor) -> str | None:
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype = weight.device, weight.dtype
    if device.type != "cpu":
        return f"it runs on the CPU, the weight is on {device}"
    if len(weight.rows) != 1:
        return f"it multiplies matrices, the weight has {len(weight.rows) + 1} dimensions"
    if dtype not in _WEIGHT_DTYPES:
        return f"it takes weights of {', '.join(map(str, _WEIGHT_DTYPES))}, not {dtype}"
    pattern = weight.pattern
    if pattern.m > MAX_PANEL_M:
        return f"panels hold patterns with m <= {MAX_PANEL_M}, not {pattern}"
    kept = pattern.groups(weight.k) * pattern.n
    if kept > MAX_INT8_KEPT:
        return f"its sums hold {MAX_INT8_KEPT} products, the rows keep {kept} weights"
    return None


def _build(weight: NMTensor) -> Int8Panels:
    return int8_panels(*portable(weight), weight.pattern, k=weight.k)


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    values = weight.packed_values
    if torch.is_autocast_enabled("cpu"):
        input = input.to(torch.get_autocast_dtype("cpu"))
        bias = None if bias is None else bias.to(input.dtype)
    if (values is not None and values.requires_grad and torch.is_grad_enabled()) or transforming():
        # A gradient for the values, forward-mode derivatives, vmap: with the weight before rounding.
        y = F.linear(input, unpack_rows(weight).to(input.dtype), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    panels, rows = panels_of(weight), weight.rows[0]
    if bias is None or (bias.dim() == 1 and bias.shape[0] == rows):
        return multiply_int8(
            input, panels, bias, weight.pattern, rows=rows, k=weight.k, activation=activation
        )
    y = multiply_int8(input, panels, None, weight.pattern, rows=rows, k=weight.k)
    y = y + bias.expand_as(y)
    return y if activation == "none" else getattr(F, activation)(y)


register_engine(
    Engine(
        name="cpu-int8",
        why_not=_why_not,
        linear=_linear,
        conv=unpacked_conv,
        forms=Int8Panels._fields,
        build=_build,
        activations=tuple(name for name in ACTIVATIONS if name != "none"),
        split_rows=PANEL_ROWS,
        automatic=False,
    )
)
