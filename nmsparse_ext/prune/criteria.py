"""What each criterion makes of one weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..pattern import Pattern
from ..search.matrices import as_matrices, from_matrices
from ..search.moments import BLOCK, Moments
from ..weights import Weight
from .sparsegpt import prune_matrix

CRITERIA = ("magnitude", "wanda", "sparsegpt")
NEED_CALIBRATION = ("wanda", "sparsegpt")
#: What inputs that are never there count, of the mean over all.
_LEAST = 1e-6


def block_of(criterion: str) -> int | None:
    """Inputs in a block of the moments that a criterion needs; ``None`` for all in one."""
    return None if criterion == "sparsegpt" else BLOCK


def working_dtype(weight: Weight) -> torch.dtype:
    """What sums over a weight's inputs are made in."""
    return torch.float64 if weight.parameter.dtype == torch.float64 else torch.float32


def pruned_values(
    weight: Weight, pattern: Pattern, criterion: str, moments: Moments | None, dampening: float
) -> Tensor:
    """What a weight becomes, in its shape and dtype; the weight itself is not changed.

    Raises:
        ValueError: If the moments cannot be used.
    """
    values = weight.parameter.detach()
    dim = weight.group_dim
    assert dim is not None  # a scheme's weights have one
    if criterion == "magnitude" or moments is None:
        return ops.nm_prune(values, pattern, dim=dim, remainder="pad")
    if criterion == "wanda":
        scores = score_by_inputs(weight, values, moments)
        return ops.apply_bits(values, ops.mask_bits(scores, pattern, dim=dim, remainder="pad"), dim=dim)
    matrices = as_matrices(weight, values, len(moments.counts)).to(working_dtype(weight))
    pruned = [
        prune_matrix(matrix, moment, pattern, segment=weight.span, dampening=dampening)
        for matrix, moment in zip(matrices, moments.blocks[0], strict=True)
    ]
    return torch.empty_like(values).copy_(from_matrices(weight, torch.stack(pruned)))


def score_by_inputs(weight: Weight, values: Tensor, moments: Moments) -> Tensor:
    """Wanda's ``|w| * |x|``, in the weight's shape."""
    matrices = as_matrices(weight, values, len(moments.counts)).to(working_dtype(weight))
    return from_matrices(weight, matrices.abs() * _norms(moments)[:, None])


def _norms(moments: Moments) -> Tensor:
    """Norms of each input, ``[matrices or 1, inputs]``; of one factor for all, which does not matter."""
    norms = moments.squares().clamp_min(0).sqrt()
    mean = norms.mean(1, keepdim=True)
    return torch.where(mean > 0, norms.maximum(_LEAST * mean), 1.0)


def output_error(weight: Weight, before: Tensor, after: Tensor, moments: Moments) -> float | None:
    """``|W' x - W x| / |W x|`` over what the moments stand for; ``None`` if there is no output."""
    count, dtype = len(moments.counts), working_dtype(weight)
    old = as_matrices(weight, before, count).to(dtype)
    change = as_matrices(weight, after, count).to(dtype) - old
    output = moments.error(old)
    return math.sqrt(moments.error(change) / output) if output > 0 else None


def kept_part(before: Tensor, after: Tensor) -> float:
    """Which part of the sum of squares of ``before`` stands where ``after`` is not 0."""
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    squares = before.to(dtype).square()
    total = float(squares.sum(dtype=torch.float64))
    stays = after.to(dtype) != 0
    return float(squares.mul_(stays).sum(dtype=torch.float64)) / total if total else 1.0
