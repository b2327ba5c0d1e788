"""What pruning a weight costs the model, by several criteria: the losses that `allocate` minimises.

Whatever the criterion, a pattern keeps the weights of largest magnitude, because that is what training and
pruning with the scheme will do. The criterion only says what the others are worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..deploy.example import ExampleInput
from ..pattern import Pattern
from ..weights import Weight
from .constraints import Candidates
from .matrices import as_matrices
from .moments import Moments, input_moments
from .scores import lost_scores, rank_sums

CRITERIA = ("magnitude", "taylor", "output")


class Losses(NamedTuple):
    """What a weight loses.

    Attributes:
        of: ``{candidate: loss}``; 0 for a dense one.
        total: The loss of pruning it altogether.
    """

    of: dict[Pattern, float]
    total: float


def magnitude_losses(candidates: Candidates) -> dict[str, Losses]:
    """The sum of squares of the pruned weights.

    Raises:
        ValueError: If a weight has NaN or infinity, or squares that overflow.
    """
    return {name: _by_rank(candidates.weights[name], candidates[name]) for name in candidates}


def taylor_losses(
    model: nn.Module, candidates: Candidates, step: Callable[[nn.Module], Tensor], steps: int
) -> dict[str, Losses]:
    """The sum of ``(weight * gradient)^2`` of the pruned weights, as a mean over ``steps`` calls of ``step``.

    That is the first-order change of the loss if one weight is removed, squared (Molchanov et al. 2017, 2019,
    "Importance Estimation for Neural Network Pruning"). Squared before the mean, since at a minimum the mean
    gradient is near 0 while batches still pull. Needs a float32 copy of the searched weights.

    Raises:
        TypeError: If ``step`` returns no tensor.
        ValueError: If a loss is no finite scalar, or no gradient reaches a weight.
    """
    squares = squared_gradients(model, candidates.weights, step, steps)
    return {
        name: _by_rank(
            weight := candidates.weights[name],
            candidates[name],
            squares[name].mul_(weight.parameter.detach().square()),
        )
        for name in candidates
    }


def output_losses(
    model: nn.Module, candidates: Candidates, calibration: Iterable[ExampleInput]
) -> dict[str, Losses]:
    """The mean square error that pruning causes in the layer's output, summed over the outputs.

    The mean is over the calibration data: tokens of a linear layer, positions of a convolution.

    Raises:
        TypeError: If a batch is not what a model can be called with.
        ValueError: If the inputs of a weight are not known, or nothing reaches it.
    """
    moments = input_moments(model, candidates.weights, calibration)
    return {
        name: _output_loss(candidates.weights[name], candidates[name], moments.pop(name))
        for name in candidates
    }


def _output_loss(weight: Weight, patterns: Iterable[Pattern], moments: Moments) -> Losses:
    assert weight.group_dim is not None
    values = weight.parameter.detach()

    def matrices(change: Tensor) -> Tensor:
        return as_matrices(weight, change, len(moments.counts))

    losses = {}
    for pattern in patterns:
        pruned = values - ops.nm_prune(values, pattern, dim=weight.group_dim)
        losses[pattern] = 0.0 if pattern.is_dense else moments.error(matrices(pruned))
    total = moments.error(matrices(values))
    if not math.isfinite(sum(losses.values()) + total):
        raise ValueError(f"{weight.name} or its inputs have NaN or infinite values")
    return Losses(losses, total)


def squared_gradients(
    model: nn.Module, weights: Mapping[str, Weight], step: Callable[[nn.Module], Tensor], steps: int
) -> dict[str, Tensor]:
    """``{name: mean of gradient^2 over the steps}``, float32; the model stays as it was."""
    parameters = {name: weight.parameter for name, weight in weights.items()}
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    needed = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        for _ in range(steps):
            with torch.enable_grad():
                loss = step(model)
                if not isinstance(loss, Tensor):
                    raise TypeError(f"step must return the loss as a Tensor, got {type(loss).__name__}")
                if loss.numel() != 1 or not torch.isfinite(loss).all():
                    raise ValueError(f"step must return one finite number, got {loss.detach()}")
                gradients = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
            for total, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / steps)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(needed[name])
    for name, total in squares.items():
        if not total.any():
            raise ValueError(f"no gradient of the loss reaches {name}: skip it, or give another step")
    return squares


def _by_rank(weight: Weight, patterns: Iterable[Pattern], scores: Tensor | None = None) -> Losses:
    """The losses of all candidates, with one sort for each m among them."""
    assert weight.group_dim is not None  # searched weights have one
    losses: dict[Pattern, float] = {}
    total = 0.0
    for m, group in itertools.groupby(sorted(patterns, key=lambda p: p.m), key=lambda p: p.m):
        sparse = [pattern for pattern in group if not pattern.is_dense]
        if not sparse:
            continue
        sums = rank_sums(weight.parameter, m, dim=weight.group_dim, scores=scores)
        total = float(sums.sum())
        if not torch.isfinite(sums).all():
            raise ValueError(f"{weight.name} has NaN or infinite weights or scores")
        lost = lost_scores(sums)
        losses |= {pattern: lost[pattern.n - 1] for pattern in sparse}
    return Losses({pattern: losses.get(pattern, 0.0) for pattern in patterns}, total)
