"""The engine that convolves with packed weights on NVIDIA GPUs.

A 1x1 convolution of a channels_last input is a matrix product whose tokens are pixels, and goes one of the
three ways of ``engines_cuda.py``, by the same table; strides take the pixels that count, at the price of a
copy of these. All other convolutions are PyTorch's, with the dense weight: there are no sparse kernels for
them.

The dense weight is made once and kept, so that no call unpacks, and freed where the table says that a 1x1
never wants it. That is packed and dense weight, 1.56 times the dense bytes for 2:4 in 16 bits, for the speed
of dense: for memory there is the engine ``cuda-packed``, which unpacks in every call. It is kept in
channels_last, which is how tensor cores want it; an input that is not costs a copy of the weight in every
call. Transposed convolutions, and weights that are not grouped along dim 1, are left to "decompress".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cusparselt, engines_cuda, ops
from ._checks import holds_data
from .crossover import DENSE, LT
from .engines import Engine, portable, register_engine, unpack, unpacked_conv, unpacked_linear
from .engines_conv import _geometry as geometry_of
from .engines_cuda import is_pointwise, matrix_parts, why_not_conv
from .panels import transforming

if TYPE_CHECKING:
    from .tensor import NMTensor

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


# -------------------------------------------------------------------------------------------------- the forms


def _dense(weight: NMTensor) -> Tensor:
    """The dense rows ``[O, *kernel, I]``, in the layout that convolutions are best called with."""
    values, indices = portable(weight)
    dims = len(weight.dense_shape())
    if dims in _FORMATS:
        return ops.unpack(values, indices, weight.pattern, k=weight.k, dim=-1)
    return ops.unpack(values, indices, weight.pattern, k=weight.k, dim=1).movedim(1, -1)


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """The dense rows and the library's form; empty where they are not needed."""
    values, _ = portable(weight)
    blob = values.new_empty(0, dtype=torch.uint8)
    dense = _dense(weight)
    if not is_pointwise(weight) or not holds_data(values):
        return dense, blob
    branches = engines_cuda.branches_of(weight)
    if LT in branches:
        blob = cusparselt.compress(dense.reshape(dense.shape[0], -1))
    return dense if DENSE in branches else values.new_empty(0), blob


def _refill(weight: NMTensor, forms: tuple[Tensor, ...]) -> None:
    dense, blob = forms
    rows = _dense(weight)
    if dense.numel():
        dense.copy_(rows)
    if blob.numel():
        blob.copy_(cusparselt.compress(rows.reshape(rows.shape[0], -1)))


def _dense_rows(weight: NMTensor) -> Tensor:
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    dense: Tensor = getattr(weight, "form_dense")  # noqa: B009 - forms are no declared attributes
    return dense if dense.numel() else _dense(weight)


# ------------------------------------------------------------------------------------------------- convolving


def convolve(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`Engine.conv` of "cuda-conv" and "cuda-packed"."""
    values = weight.packed_values
    if (values is not None and values.requires_grad and torch.is_grad_enabled()) or transforming():
        return unpacked_conv(op, input, weight, bias, *args, **kwargs)
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return _convolve(op, input, weight, bias, args, kwargs)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if weight.values.dtype == dtype:
            return _convolve(op, input, weight, bias, args, kwargs)
        if weight.shared is not None and not torch.compiler.is_compiling():
            return _convolve(op, input, weight.shared.cast_weight(dtype), bias, args, kwargs)
        # There is no place where a cast weight could stay.
        return op(input, unpack(weight).to(dtype), bias, *args, **kwargs)


def _convolve(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    dense, blob = getattr(weight, "form_dense", None), getattr(weight, "form_blob", None)
    dims = len(weight.dense_shape())
    channels_last = input.dim() == dims and _is_channels_last(input)
    strides = _strides_of_pixels(op, weight, args, kwargs) if channels_last else None
    if strides is not None and input.shape[1] == weight.k:
        x = input.movedim(1, -1)
        for dim, stride in enumerate(strides, start=1):
            if stride > 1:
                x = x[(slice(None),) * dim + (slice(None, None, stride),)]
        values, indices = matrix_parts(weight)
        flat = dense if dense is None or not dense.numel() else dense.reshape(dense.shape[0], -1)
        operands = (values, indices, flat, blob)
        return engines_cuda.multiply_any(x, operands, weight, bias, "none").movedim(-1, 1)
    if dense is None or not dense.numel():
        return unpacked_conv(op, input, weight, bias, *args, **kwargs)
    w = dense.movedim(-1, 1)
    if dims in _FORMATS and not channels_last:
        # Else PyTorch would turn the input around, and the result. Of a 1x1 it looks at strides alone.
        w = dense.reshape(w.shape) if is_pointwise(weight) else w.contiguous()
    return op(input, w, bias, *args, **kwargs)


def _is_channels_last(input: Tensor) -> bool:
    if input.dim() in _FORMATS:
        return input.is_contiguous(memory_format=_FORMATS[input.dim()])
    return input.dim() == 3 and input.movedim(1, -1).is_contiguous()


def _strides_of_pixels(
    op: Callable[..., Tensor], weight: NMTensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[int] | None:
    """The strides of a 1x1 convolution without padding and groups; None if it is another one."""
    if not is_pointwise(weight):
        return None
    geometry = geometry_of(op, weight, *args, **kwargs)
    if geometry is None or geometry["groups"] != 1 or any(geometry["padding"]):
        return None
    strides: list[int] = geometry["stride"]
    return strides


register_engine(
    Engine(
        name="cuda-conv",
        why_not=why_not_conv,
        linear=unpacked_linear,
        conv=convolve,
        forms=("dense", "blob"),
        build=_build,
        refill=_refill,
        dense_rows=_dense_rows,
    ),
    first=True,
)
