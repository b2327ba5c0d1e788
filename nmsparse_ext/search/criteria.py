"""What pruning a weight costs the model, by several criteria: the losses that `allocate` minimises.

Whatever the criterion, a pattern keeps the weights of largest magnitude, because that is what training and
pruning with the scheme will do. The criterion only says what the others are worth.
"""

from __future__ import annotations

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
from .ranking import Ranking
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
    losses = {}
    for name, weight in candidates.weights.items():
        dim = _group_dim(weight)
        sums = {m: rank_sums(weight.parameter, m, dim=dim) for m in _sizes(candidates[name])}
        losses[name] = _by_rank(name, candidates[name], sums)
    return losses


def taylor_losses(
    model: nn.Module, candidates: Candidates, step: Callable[[nn.Module], Tensor], steps: int
) -> dict[str, Losses]:
    """The sum of ``(weight * gradient)^2`` of the pruned weights, as a mean over ``steps`` calls of ``step``.

    That is the first-order change of the loss if one weight is removed, squared (Molchanov et al. 2017, 2019,
    "Importance Estimation for Neural Network Pruning"). Squared before the mean, since at a minimum the mean
    gradient is near 0 while batches still pull.

    Groups are sorted once, before the first step; their order takes a byte a weight, for each m among the
    candidates. A gradient is summed up in that order as soon as the backward pass has it, and let go: those
    of all weights are never there at once.

    Raises:
        TypeError: If ``step`` returns no tensor.
        ValueError: If a loss is no finite scalar, no gradient reaches a weight, or one is not finite.
    """
    rankings = {
        name: {m: Ranking(weight.parameter, m, dim=_group_dim(weight)) for m in _sizes(candidates[name])}
        for name, weight in candidates.weights.items()
    }
    sums: dict[str, dict[int, Tensor]] = {}
    reached: set[str] = set()

    def add(name: str, gradient: Tensor) -> None:
        if name not in reached and gradient.any():
            reached.add(name)
        total = sums.setdefault(name, {})
        for m, ranking in rankings[name].items():
            squares = ranking.squares(candidates.weights[name].parameter, gradient)
            total[m] = total[m] + squares if m in total else squares

    visit_gradients(model, candidates.weights, step, steps, add)
    for name in candidates:
        if name not in reached:
            raise ValueError(f"no gradient of the loss reaches {name}: skip it, or give another step")
    return {
        name: _by_rank(name, candidates[name], {m: total / steps for m, total in sums[name].items()})
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
    values = weight.parameter.detach()

    def matrices(change: Tensor) -> Tensor:
        return as_matrices(weight, change, len(moments.counts))

    losses = {}
    for pattern in patterns:
        pruned = values - ops.nm_prune(values, pattern, dim=_group_dim(weight))
        losses[pattern] = 0.0 if pattern.is_dense else moments.error(matrices(pruned))
    total = moments.error(matrices(values))
    if not math.isfinite(sum(losses.values()) + total):
        raise ValueError(f"{weight.name} or its inputs have NaN or infinite values")
    return Losses(losses, total)


def visit_gradients(
    model: nn.Module,
    weights: Mapping[str, Weight],
    step: Callable[[nn.Module], Tensor],
    steps: int,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Calls ``step`` some times, and ``visit(name, gradient)`` for each weight that a loss depends on.

    A gradient is visited while the backward pass goes on, and is not kept. The model stays as it was:
    ``requires_grad`` and ``.grad``, too.

    Raises:
        TypeError: If ``step`` returns no tensor.
        ValueError: If a loss is no finite scalar.
    """
    parameters = {name: weight.parameter for name, weight in weights.items()}
    needed = {name: p.requires_grad for name, p in parameters.items()}

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        def visited(gradient: Tensor) -> Tensor:
            visit(name, gradient)
            # Goes on in the gradient's place, without its memory.
            return gradient.new_zeros(()).expand(gradient.shape)

        return visited

    handles = []
    try:
        for name, p in parameters.items():
            p.requires_grad_(True)
            handles.append(p.register_hook(hook(name)))
        for _ in range(steps):
            with torch.enable_grad():
                loss = step(model)
                if not isinstance(loss, Tensor):
                    raise TypeError(f"step must return the loss as a Tensor, got {type(loss).__name__}")
                if loss.numel() != 1 or not torch.isfinite(loss).all():
                    raise ValueError(f"step must return one finite number, got {loss.detach()}")
                torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(needed[name])


def _sizes(patterns: Iterable[Pattern]) -> tuple[int, ...]:
    """The m of the candidates that are not dense."""
    return tuple(sorted({pattern.m for pattern in patterns if not pattern.is_dense}))


def _group_dim(weight: Weight) -> int:
    assert weight.group_dim is not None  # searched weights have one
    return weight.group_dim


def _by_rank(name: str, patterns: Iterable[Pattern], sums: Mapping[int, Tensor]) -> Losses:
    """The losses of all candidates, from the sums by rank for each m among them."""
    lost: dict[int, list[float]] = {}
    for m, by_rank in sums.items():
        if not torch.isfinite(by_rank).all():
            raise ValueError(f"{name} has NaN or infinite weights or scores")
        lost[m] = lost_scores(by_rank)
    return Losses(
        {p: 0.0 if p.is_dense else lost[p.m][p.n - 1] for p in patterns},
        max((float(by_rank.sum()) for by_rank in sums.values()), default=0.0),
    )
