"""Gradients of the ops. A mask is a constant to autograd: gradients pass where weights are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _conv_layout as conv_checks
from . import reference
from ._op_library import NAMESPACE, library


def _save_prune(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dim = inputs[3]
    bits = output[1]
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)


def _grad_prune(ctx: Any, grad: Tensor, _grad_bits: Tensor) -> tuple[Tensor, None, None, None, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.nmsparse.apply_bits(grad, bits, ctx.dim), None, None, None, None


def _save_apply_bits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.dim = inputs
    ctx.save_for_backward(bits)


def _grad_apply_bits(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.nmsparse.apply_bits(grad, bits, ctx.dim), None, None


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w, ctx.n, ctx.m, ctx.dim, _ = inputs
    ctx.k = w.shape[ctx.dim]
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices)


def _grad_compress(ctx: Any, grad: Tensor, _grad_indices: Tensor) -> tuple[Tensor, None, None, None, None]:
    (indices,) = ctx.saved_tensors
    grad_w = torch.ops.nmsparse.decompress(grad.contiguous(), indices, ctx.n, ctx.m, ctx.k, ctx.dim)
    return grad_w, None, None, None, None


def _save_transposable_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, indices, _, indices_t, bits = output
    ctx.shape = inputs[0].shape
    ctx.mark_non_differentiable(indices, indices_t, bits)
    ctx.save_for_backward(indices, indices_t)


def _grad_transposable_pack(ctx: Any, grad: Tensor, _indices: Any, grad_t: Tensor, *_others: Any) -> Tensor:
    indices, indices_t = ctx.saved_tensors
    rows, cols = ctx.shape
    normal = torch.ops.nmsparse.decompress(grad.contiguous(), indices, 2, 4, cols, 1)
    return normal + torch.ops.nmsparse.decompress(grad_t.contiguous(), indices_t, 2, 4, rows, 1).T


def _save_decompress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, ctx.n, ctx.m, _, ctx.dim = inputs
    ctx.save_for_backward(indices)


def _grad_decompress(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    (indices,) = ctx.saved_tensors
    return reference.gather_packed(grad, indices, ctx.n, ctx.m, ctx.dim), None, None, None, None, None


def _save_panel_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, bias, *layout, activation = inputs
    ctx.layout, ctx.activation = layout, activation
    # What came before an activation is summed again in the backward pass: the fusion is meant for inference.
    again = (x, bias) if activation != "none" else (None, None)
    ctx.save_for_backward(value_panels, index_panels, *again)


def _grad_panel_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is frozen."""
    value_panels, index_panels, x, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.panel_linear(x, value_panels, index_panels, bias, *ctx.layout, "none")
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nmsparse.panel_matmul(grad, value_panels, index_panels, *ctx.layout)
    if ctx.needs_input_grad[3]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, grad_bias, None, None, None, None, None


def _save_panel_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, value_panels, index_panels, *ctx.layout = inputs
    ctx.save_for_backward(value_panels, index_panels)


def _grad_panel_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.nmsparse.panel_linear(grad, *ctx.saved_tensors, None, *ctx.layout, "none")
    return grad_x, None, None, None, None, None, None


def _save_panel_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, bias, residual, *layout, activation = inputs
    ctx.layout, ctx.activation, ctx.sizes = layout, activation, x.shape
    again = (x, bias, residual) if activation != "none" else (None, None, None)
    ctx.save_for_backward(value_panels, index_panels, *again)


def _grad_panel_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias, residual; PyTorch's own convolution takes that of x, with a dense weight."""
    value_panels, index_panels, x, bias, residual = ctx.saved_tensors
    if ctx.activation != "none":
        operands = (x, value_panels, index_panels, bias, residual)
        before = torch.ops.nmsparse.panel_conv(*operands, *ctx.layout, "none")
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        n, m, rows, k, kernel, *geometry = ctx.layout
        taps = math.prod(kernel)
        row = taps * conv_checks.tap_inputs(n, m, k, taps, value_panels.dtype)
        dense = torch.ops.nmsparse.panel_unpack(value_panels, index_panels, n, m, rows, row)
        weight = conv_checks.weight_of_rows(dense, k, kernel)
        grad_x = _grad_conv_input(grad, ctx.sizes, weight, *geometry)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
    grad_residual = grad if ctx.needs_input_grad[4] else None
    return grad_x, None, None, grad_bias, grad_residual, *[None] * (len(ctx.layout) + 1)


def _grad_conv_input(
    grad: Tensor,
    sizes: Sequence[int],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of ``x [N, places..., C]``, with ``weight [O, I, kernel...]``."""
    before, after = padding[::2], padding[1::2]
    both = [min(sides) for sides in zip(before, after, strict=True)]
    # PyTorch pads both sides alike; what is more on one side stands for places of x.
    extra = [b - s for b, s in zip(before, both, strict=True)]
    places = [size + b + a - 2 * s for size, b, a, s in zip(sizes[1:-1], before, after, both, strict=True)]
    x = grad.new_empty(()).expand(sizes[0], sizes[-1], *places)  # only its sizes count
    grad_x = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1),
        x,
        weight,
        None,
        stride,
        both,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [True, False, False],
    )[0]
    for d, first in enumerate(extra):
        grad_x = grad_x.narrow(2 + d, first, sizes[1 + d])
    return grad_x.movedim(1, -1)


def _save_panel_linear_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, scales, sums, bias, *layout, activation = inputs
    ctx.layout, ctx.activation = layout, activation
    again = (x, sums, bias) if activation != "none" else (None, None, None)
    ctx.save_for_backward(value_panels, index_panels, scales, *again)


def _grad_panel_linear_int8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, as if x were not rounded (the slope of rounding is 0 nearly everywhere)."""
    value_panels, index_panels, scales, x, sums, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.panel_linear_int8(
            x, value_panels, index_panels, scales, sums, bias, *ctx.layout, "none"
        )
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.nmsparse.panel_unpack(value_panels, index_panels, *ctx.layout)
        scaled = weight.float() * scales.flatten()[: weight.shape[0]].unsqueeze(-1)
        grad_x = grad @ scaled.to(grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None


def _save_small_batch_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, scales, bias, *ctx.pattern, ctx.activation = inputs
    again = (x, bias) if ctx.activation != "none" else (None, None)
    ctx.save_for_backward(values, indices, scales, *again)


def _grad_small_batch_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is frozen."""
    values, indices, scales, x, bias = ctx.saved_tensors
    if ctx.activation != "none":
        weight = (values, indices, scales, bias, *ctx.pattern)
        grad = grad * _slope(ctx.activation, torch.ops.nmsparse.small_batch_linear(x, *weight, "none"))
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.nmsparse.decompress(values, indices, *ctx.pattern, 1)
        grad_x = grad @ (dense if scales is None else dense.float() * scales.unsqueeze(-1)).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _save_epilogue(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, scales, bias, ctx.activation = inputs
    ctx.save_for_backward(y, scales, bias)


def _grad_epilogue(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y and bias; scales belong to a frozen weight."""
    y, scales, bias = ctx.saved_tensors
    slope = grad.float()
    if ctx.activation != "none":
        before = torch.ops.nmsparse.epilogue(y, scales, bias, "none").float()
        slope = slope * _slope(ctx.activation, before)
    grad_y = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_y = (slope if scales is None else slope * scales).to(y.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = slope.sum(tuple(range(slope.dim() - 1))) if slope.dim() > 1 else slope
        grad_bias = grad_bias.to(y.dtype)
    return grad_y, None, grad_bias, None


def _slope(activation: str, x: Tensor) -> Tensor:
    """The derivative of an activation at ``x``."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


for _name, _backward, _setup in (
    ("panel_linear", _grad_panel_linear, _save_panel_linear),
    ("panel_matmul", _grad_panel_matmul, _save_panel_matmul),
    ("panel_conv", _grad_panel_conv, _save_panel_conv),
    ("panel_linear_int8", _grad_panel_linear_int8, _save_panel_linear_int8),
    ("small_batch_linear", _grad_small_batch_linear, _save_small_batch_linear),
    ("epilogue", _grad_epilogue, _save_epilogue),
    ("prune", _grad_prune, _save_prune),
    ("apply_bits", _grad_apply_bits, _save_apply_bits),
    ("compress", _grad_compress, _save_compress),
    ("decompress", _grad_decompress, _save_decompress),
    ("transposable_pack", _grad_transposable_pack, _save_transposable_pack),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=library)
