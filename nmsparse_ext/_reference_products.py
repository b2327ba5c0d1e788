"""Products straight from the packed form, and what follows a product, in pure PyTorch. See `reference.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _product_checks as checks
from . import reference


def _finish(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(y * scales + bias)`` in float32."""
    if scales is not None:
        y = y * scales
    if bias is not None:
        y = y + bias.float()
    return y if activation == "none" else getattr(F, activation)(y)


def small_batch_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    k: int,
    activation: str,
) -> Tensor:
    """``activation(x @ W.T * scales + bias)`` with a packed ``W [rows, k]``: ``[..., k] -> [..., rows]``.

    The weight is read as it is stored, once for all tokens, which is what takes the time of a product of few
    tokens on a GPU.

    Args:
        x: float16 or bfloat16 ``[..., k]``.
        values: ``[rows, groups * n]`` of the dtype of ``x``, or int8, which needs ``scales``.
        indices: uint8 ``[rows, bytes]``, as `compress` gives them. Codes that `check_indices` refuses give a
            result that means nothing, but never make anything outside of ``x`` be read.
        scales: float32 ``[rows]``, of int8 values.
        bias: ``[rows]`` of the dtype of ``x``.
        n: Kept of every group.
        m: Size of a group.
        k: Inputs.
        activation: "none", "relu", "gelu" or "silu".

    Returns:
        ``[..., rows]`` of the dtype of ``x``. Sums are taken in float32 and rounded once, after the
        activation.
    """
    checks.check_small_batch_linear(x, values, indices, scales, bias, n, m, k, activation)
    weight = reference.decompress(values, indices, n, m, k, 1)
    return _finish(F.linear(x.float(), weight.float()), scales, bias, activation).to(x.dtype)


def epilogue(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(y * scales + bias)`` along the last dim, in float32, rounded once.

    What follows a product, for libraries that do not fuse it.

    Args:
        y: float32, bfloat16 or float16 ``[..., rows]``.
        scales: float32 ``[rows]``.
        bias: ``[rows]`` of the dtype of ``y``.
        activation: "none", "relu", "gelu" or "silu".
    """
    checks.check_epilogue(y, scales, bias, activation)
    return torch.empty_like(y).copy_(_finish(y.float(), scales, bias, activation))


def epilogue_(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> None:
    """`epilogue` in place."""
    checks.check_epilogue(y, scales, bias, activation)
    y.copy_(_finish(y.float(), scales, bias, activation))
