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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._panel_layout import INT8_INPUT_DTYPES, MAX_INT8_KEPT, MAX_PANEL_M, PANEL_ROWS
from .engines import Engine, register_engine, unpack
from .int8 import Int8Panels, int8_panels, multiply_int8, panels_of
from .panels import Activation

if TYPE_CHECKING:
    from .tensor import NMTensor

_WEIGHT_DTYPES = (*INT8_INPUT_DTYPES, torch.int8)


def _why_not(weight: NMTensor) -> str | None:
    values = weight.packed_values
    if values.device.type != "cpu":
        return f"it runs on the CPU, the weight is on {values.device}"
    if values.dim() != 2:
        return f"it multiplies matrices, the weight has {values.dim()} dimensions"
    if values.dtype not in _WEIGHT_DTYPES:
        return f"it takes weights of {', '.join(map(str, _WEIGHT_DTYPES))}, not {values.dtype}"
    if weight.pattern.m > MAX_PANEL_M:
        return f"panels hold patterns with m <= {MAX_PANEL_M}, not {weight.pattern}"
    if values.shape[1] > MAX_INT8_KEPT:
        return f"its sums hold {MAX_INT8_KEPT} products, the rows keep {values.shape[1]} weights"
    return None


def _build(weight: NMTensor) -> Int8Panels:
    return int8_panels(weight.packed_values, weight.packed_indices, weight.pattern, k=weight.k)


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    values = weight.packed_values
    if torch.is_autocast_enabled("cpu"):
        input = input.to(torch.get_autocast_dtype("cpu"))
        bias = None if bias is None else bias.to(input.dtype)
    if (
        weight.group_dim != 1
        or (values.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
    ):
        # Groups along the outputs, a gradient for the values, forward-mode derivatives: with the weight as
        # it was before rounding.
        y = F.linear(input, unpack(weight).to(input.dtype), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    panels, rows = panels_of(weight), values.shape[0]
    if bias is None or tuple(bias.shape) == (rows,):
        return multiply_int8(
            input, panels, bias, weight.pattern, rows=rows, k=weight.k, activation=activation
        )
    y = multiply_int8(input, panels, None, weight.pattern, rows=rows, k=weight.k) + bias
    return y if activation == "none" else getattr(F, activation)(y)


def _conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return op(input, unpack(weight), bias, *args, **kwargs)


register_engine(
    Engine(
        name="cpu-int8",
        why_not=_why_not,
        linear=_linear,
        conv=_conv,
        forms=Int8Panels._fields,
        build=_build,
        split_rows=PANEL_ROWS,
        automatic=False,
    )
)
