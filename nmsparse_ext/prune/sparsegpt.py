"""SparseGPT for any N:M: which weights go, and what the others become to make up for it.

Of a layer ``W x`` the output error of a change D is ``tr(D H D^T)`` with ``H = E[x x^T]``; see
`search.moments`. The rows of W do not matter to one another, so look at one. If its weights from column i on
may still change, setting ``w_i`` to 0 costs the least when the others change by ``-w_i / G_ii * G_i``, where
G is the inverse of the part of H from column i on, and it costs ``w_i^2 / G_ii`` (the optimal brain surgeon;
Frantar and Alistarh 2023, "SparseGPT"). Columns are dealt with once, from left to right. All the inverses
that takes are in one upper triangular U with ``H^-1 = U^T U``: for column i, ``G_ii = U_ii^2`` and
``G_i = U_ii U_i``.

Which weights of a group go is settled at its first column, by the costs ``w^2 / U_jj^2`` as they are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..pattern import Pattern

#: How many times more dampening is tried than was asked for, each time ten times as much.
_TRIES = 4


def prune_matrix(
    matrix: Tensor,
    moment: Tensor,
    pattern: Pattern,
    *,
    segment: int | None = None,
    dampening: float = 0.01,
    columns: int = 128,
) -> Tensor:
    """Prunes a matrix, with the update of the weights that stay.

    Args:
        matrix: Float32 or float64 ``[outputs, inputs]``; groups run along the inputs.
        moment: ``E[x x^T]`` of its inputs, ``[inputs, inputs]``, in the same dtype. Any multiple of it gives
            the same result.
        pattern: The pattern.
        segment: Groups start anew after so many inputs; ``None`` for never. A short last group of each
            segment of length l keeps ``min(n, l)``.
        dampening: What is added to the diagonal of ``moment``, as a part of its mean.
        columns: How many columns are worked on before the others learn of it: only a matter of speed.

    Returns:
        A new matrix, with zeros where it was pruned.

    Raises:
        ValueError: If the moment is not finite, or cannot be made positive definite.
    """
    inputs = matrix.shape[1]
    factor = inverse_factor(moment, dampening)
    # A column of weights is a row here: what belongs together lies together.
    left = matrix.T.clone(memory_format=torch.contiguous_format)
    for first, last in blocks(inputs, pattern.m, segment or inputs, columns):
        part, own = left[first:last], factor[first:last, first:last]
        errors = torch.empty_like(part)
        for i in range(last - first):
            start, end = _group(first + i, pattern.m, segment or inputs)
            if start == first + i:  # the first column of a group
                here = slice(i, min(i + end - start, last - first))
                costs = (part[here] / own.diagonal()[here, None]).abs().T
                stays = ops.nm_mask(costs, pattern, remainder="pad").T
                offset = i
            errors[i] = torch.where(stays[i - offset], 0.0, part[i]) / own[i, i]
            part[i:].addr_(own[i, i:], errors[i], alpha=-1)
            part[i].masked_fill_(~stays[i - offset], 0.0)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return left.T.contiguous()


def inverse_factor(moment: Tensor, dampening: float) -> Tensor:
    """The upper triangular U with ``U^T U = (moment + dampening)^-1``.

    Raises:
        ValueError: If the moment is not finite, or cannot be made positive definite.
    """
    mean = float(moment.diagonal().mean()) if moment.numel() else 0.0
    if not torch.isfinite(moment).all():
        raise ValueError("its inputs are NaN, infinite, or too large")
    if mean <= 0:  # nothing but zeros came: no weight is worth more than another
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    part = dampening
    for _ in range(_TRIES + 1):
        # H = V V^T with V upper triangular is a Cholesky factorisation from the other end; U = V^-1. There
        # are never more than two matrices besides the moment.
        damped = moment.flip(0, 1)
        damped.diagonal().add_(part * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            inverse = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            return torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
        part = max(10 * part, 1e-6)
    raise ValueError(
        f"the second moments of its inputs are singular with dampening={dampening}, and with {part / 10:g} "
        "still: give more calibration data, or more dampening"
    )


def blocks(inputs: int, m: int, segment: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of about so many columns that end where groups do."""
    ranges = []
    first = 0
    while first < inputs:
        last = min(first + columns, inputs)
        start, end = _group(last - 1, m, segment)
        if end != last:  # not in the middle of a group: before it, if that leaves any
            last = start if start > first else end
        ranges.append((first, min(last, inputs)))
        first = ranges[-1][1]
    return ranges


def _group(column: int, m: int, segment: int) -> tuple[int, int]:
    """Where the group of a column starts and ends."""
    base = column // segment * segment
    start = base + (column - base) // m * m
    return start, min(start + m, base + segment)
