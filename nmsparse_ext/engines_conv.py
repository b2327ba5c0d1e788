"""The engine that convolves from panels on the CPU.

What it leaves to PyTorch, with a weight unpacked in every call: transposed convolutions, depthwise ones and
others whose groups have no multiple of 16 outputs, gradients of values, and forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._build import extension
from .conv_panels import conv_pack, conv_restore, conv_unpack, panel_conv, why_no_conv
from .engines import Engine, portable, register_engine, unpacked_conv, unpacked_linear
from .engines_cpu import cast_panels, panels_of
from .panels import Panels, transforming, why_no_panels

if TYPE_CHECKING:
    from .tensor import NMTensor

_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_ATEN_CONV = torch.ops.aten.convolution.default


def _why_not(weight: NMTensor) -> str | None:
    if extension is None:
        return "it needs the compiled extension"
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype, dims = weight.device, weight.dtype, weight.dim()
    if device.type != "cpu":
        return f"it runs on the CPU, the weight is on {device}"
    if not 3 <= dims <= 5:
        return f"it convolves in 1 to 3 dimensions, the weight has {dims} dimensions"
    if weight.group_dim != 1:
        return f"it sums over dim 1 of a weight, groups run along dim {weight.group_dim}"
    return why_no_panels(weight.pattern, dtype)


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    return conv_pack(*portable(weight), weight.pattern, k=weight.k)


def _restore(weight: NMTensor) -> tuple[Tensor, Tensor]:
    return conv_restore(panels_of(weight), weight.pattern, shape=weight.dense_shape())


def _dense_rows(weight: NMTensor) -> Tensor:
    dense = conv_unpack(panels_of(weight), weight.pattern, shape=weight.dense_shape())
    return dense.movedim(1, -1)


def _conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    geometry = _geometry(op, weight, *args, **kwargs)
    if (
        geometry is None
        or why_no_conv(input, weight.dense_shape(), geometry["groups"]) is not None
        or _wants_values_grad(weight)
        or transforming()
    ):
        return unpacked_conv(op, input, weight, bias, *args, **kwargs)
    if torch.is_autocast_enabled("cpu"):
        return _autocast_conv(input, weight, bias, geometry)
    return _convolve(input, weight, panels_of(weight), bias, geometry)


def _wants_values_grad(weight: NMTensor) -> bool:
    values = weight.packed_values
    return values is not None and values.requires_grad and torch.is_grad_enabled()


def _convolve(
    input: Tensor, weight: NMTensor, panels: Panels, bias: Tensor | None, geometry: dict[str, Any]
) -> Tensor:
    return panel_conv(input, panels, bias, weight.pattern, shape=weight.dense_shape(), **geometry)


def _autocast_conv(input: Tensor, weight: NMTensor, bias: Tensor | None, geometry: dict[str, Any]) -> Tensor:
    """As ``F.conv2d`` under autocast: input, weight and bias rounded to its dtype, and so is the result."""
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        input = input.to(dtype)
        panels = cast_panels(weight, dtype)
        own = panels.values.dtype
        bias = None if bias is None else bias.to(own)
        return _convolve(input.to(own), weight, panels, bias, geometry).to(dtype)


# ---------------------------------------------------------------------------------- arguments of convolutions


def _geometry(
    op: Callable[..., Tensor], weight: NMTensor, *args: Any, **kwargs: Any
) -> dict[str, Any] | None:
    """What follows the bias in a call of ``op``, as `panel_conv` wants it.

    ``None`` for what it cannot do, and for what ``op`` refuses: that then says so itself.
    """
    _, _, *kernel = weight.dense_shape()
    if op in _CONVS:
        found = _conv_arguments(kernel, *args, **kwargs)
    elif op is _ATEN_CONV:
        found = _aten_arguments(kernel, *args, **kwargs)
    else:
        return None
    if found is None:
        return None
    stride, padding, dilation, groups = found
    positive = min(stride) > 0 and min(dilation) > 0 and groups > 0 and min(padding) >= 0
    if not positive:
        return None
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


_Found = tuple[list[int], list[int], list[int], int]


def _conv_arguments(
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> _Found | None:
    dims = len(kernel)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    if len(strides) != dims or len(dilations) != dims:
        return None
    if isinstance(padding, str):
        if padding == "same" and max(strides) == 1:
            around = [d * (size - 1) for size, d in zip(kernel, dilations, strict=True)]
            return strides, [side for all in around for side in (all // 2, all - all // 2)], dilations, groups
        if padding != "valid":
            return None
        padding = 0
    paddings = _each(padding, dims)
    if len(paddings) != dims:
        return None
    return strides, [side for side in paddings for _ in range(2)], dilations, groups


def _aten_arguments(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> _Found | None:
    return None if transposed else _conv_arguments(kernel, stride, padding, dilation, groups)


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    """One number per dim; PyTorch lets a single one stand for all."""
    if isinstance(value, int):
        return [value] * dims
    return list(value) * dims if len(value) == 1 else list(value)


register_engine(
    Engine(
        name="cpu-conv-panels",
        why_not=_why_not,
        linear=unpacked_linear,
        conv=_conv,
        forms=("values", "indices"),
        build=_build,
        restore=_restore,
        dense_rows=_dense_rows,
    ),
    first=True,
)
