"""Gradients of products through cuSPARSELt: the weight is frozen, input and bias get theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._op_gradients import _slope as slope
from .pattern import Pattern


class Backing(NamedTuple):
    """What gradients of the input are made from.

    Attributes:
        values: Of the packed weight, ``[..., rows, groups * n]``.
        indices: The same.
        pattern: Its pattern.
        transposed: The transposed weight as cuSPARSELt multiplies it, uint8 ``[bytes]``; None if it has no
            pattern that embeds.
    """

    values: Tensor
    indices: Tensor
    pattern: Pattern
    transposed: Tensor | None


class Epilogue(NamedTuple):
    """What happens to the sums."""

    alpha: float
    activation: str


class LtLinear(torch.autograd.Function):
    """``activation(alpha * x @ W.mT + bias)``, see `cusparselt.linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        blob: Tensor,
        values: Tensor,
        indices: Tensor,
        transposed: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        """``x`` is ``[tokens, k]`` or ``[batches, tokens, k]``."""
        multiply, pattern, rows, epilogue = rest
        ctx.multiply, ctx.pattern, ctx.epilogue, ctx.k = multiply, pattern, epilogue, x.shape[-1]
        # What came before an activation is summed again in the backward pass.
        again = (x, bias) if epilogue.activation != "none" else (None, None)
        ctx.save_for_backward(blob, values, indices, transposed, *again)
        ctx.rows = rows
        return multiply(x, blob, bias, rows, epilogue)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Gradients of ``x`` and ``bias``."""
        (grad,) = grads
        blob, values, indices, transposed, x, bias = ctx.saved_tensors
        alpha, activation = ctx.epilogue
        if activation != "none":
            before = ctx.multiply(x, blob, bias, ctx.rows, Epilogue(alpha, "none"))
            grad = grad * slope(activation, before)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if transposed is not None:
                grad_x = ctx.multiply(grad.contiguous(), transposed, None, ctx.k, Epilogue(alpha, "none"))
            else:
                dense = ops.unpack(values, indices, ctx.pattern, k=ctx.k, dim=-1)
                grad_x = grad @ dense if alpha == 1 else grad @ dense * alpha
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
        return grad_x, grad_bias, None, None, None, None, None
