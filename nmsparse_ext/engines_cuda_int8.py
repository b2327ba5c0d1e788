"""The engine that reads int8 weights on NVIDIA GPUs for few tokens. It rounds, so it runs on request only.

A weight of floating point numbers is rounded to int8 when the engine is chosen, with one scale a row
(``amax / 127``); its values and indices stay as they are, and what is saved is not rounded. Inputs are not
rounded: up to `SMALL_BATCH_TOKENS` tokens the small-batch kernel multiplies them with the integers as it
reads those, which are half the bytes of 16-bit values (5/16 of the dense weight for 2:4). For more tokens the
weight is made dense in every call.

An output is off by at most ``s / 2 * sum |x|`` over the kept inputs of its row, with ``s`` the row's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import crossover
from ._op_gradients import _slope as slope
from ._op_library import NAMESPACE, library
from ._panel_layout import ACTIVATIONS
from .crossover import SMALL_BATCH, SMALL_BATCH_TOKENS
from .engines import Engine, portable, register_engine, unpack_rows, unpacked_conv
from .engines_cuda import problem_of, why_not_matrix
from .panels import Activation, transforming
from .reference import quantize_rows

if TYPE_CHECKING:
    from .tensor import NMTensor


def _why_not(weight: NMTensor) -> str | None:
    reason = why_not_matrix(weight)
    return crossover.reasons(problem_of(weight))[SMALL_BATCH] if reason is None else reason


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    integers, scales = quantize_rows(portable(weight)[0])
    return integers, scales.flatten().float()


def _dense(integers: Tensor, indices: Tensor, scales: Tensor, n: int, m: int, like: Tensor) -> Tensor:
    dense = torch.ops.nmsparse.decompress(integers, indices, n, m, like.shape[-1], 1)
    return (dense.float() * scales.unsqueeze(-1)).to(like.dtype)


def _int8_weight_linear(
    x: Tensor,
    integers: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    k = x.shape[-1]
    if k == 0 or x.numel() <= SMALL_BATCH_TOKENS * k:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.nmsparse.small_batch_linear(
                x, integers, indices, scales, bias, n, m, k, activation
            )
    y = F.linear(x, _dense(integers, indices, scales, n, m, x), bias)
    return y if activation == "none" else getattr(F, activation)(y)


def _fake(
    x: Tensor,
    integers: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], integers.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, integers, indices, scales, bias, ctx.n, ctx.m, ctx.activation = inputs
    ctx.save_for_backward(x, integers, indices, scales, bias)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is frozen."""
    x, integers, indices, scales, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.int8_weight_linear(
            x, integers, indices, scales, bias, ctx.n, ctx.m, "none"
        )
        grad = grad * slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _dense(integers, indices, scales, ctx.n, ctx.m, x)
    if ctx.needs_input_grad[4]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, grad_bias, None, None, None


library.define(
    "int8_weight_linear(Tensor x, Tensor integers, Tensor indices, Tensor scales, Tensor? bias, int n, "
    "int m, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("int8_weight_linear", _int8_weight_linear, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::int8_weight_linear", _fake, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::int8_weight_linear", _grad, setup_context=_save, lib=library)


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(input.dtype)
    values, rows = weight.values, weight.rows[0]
    if (values.requires_grad and torch.is_grad_enabled()) or transforming():
        # A gradient for the values, forward-mode derivatives, vmap: with the weight before rounding.
        y = F.linear(input, unpack_rows(weight).to(input.dtype), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    integers, scales = weight.forms()
    parts = (input, integers, weight.indices, scales)
    n, m = weight.pattern.n, weight.pattern.m
    if bias is None or (bias.dim() == 1 and bias.shape[0] == rows):
        return torch.ops.nmsparse.int8_weight_linear(*parts, bias, n, m, activation)
    y = torch.ops.nmsparse.int8_weight_linear(*parts, None, n, m, "none")
    y = y + bias.expand_as(y)
    return y if activation == "none" else getattr(F, activation)(y)


register_engine(
    Engine(
        name="cuda-int8",
        why_not=_why_not,
        linear=_linear,
        conv=unpacked_conv,
        forms=("integers", "scales"),
        build=_build,
        activations=ACTIVATIONS,
        automatic=False,
    )
)
