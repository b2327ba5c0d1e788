"""What a training step does to all its sparse weights at once: one call, one pass over memory.

These are thin: they run at every step, so arguments are checked by the kernels (``RuntimeError``), not here.
Tensors of one position belong together; see `reference_lists` for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)

_nms = torch.ops.nmsparse


def add_pruned(
    grads: Sequence[Tensor],
    ws: Sequence[Tensor],
    bits: Sequence[Tensor],
    *,
    dims: Sequence[int],
    alphas: Sequence[float],
    scale: Tensor | None = None,
    outs: Sequence[Tensor],
) -> None:
    """``outs[i] = grads[i] + alphas[i] * scale * where(mask, 0, ws[i])``: SR-STE's gradient.

    Args:
        grads: The gradients: float64, float32, bfloat16 or float16.
        ws: The dense weights, of their shapes.
        bits: The packed masks.
        dims: The group dims.
        alphas: The strengths.
        scale: One float32 on the weights' device, or ``None`` for 1.
        outs: Where the sums go; may be the gradients themselves. The sum is taken in this dtype (16-bit ones
            in float32).
    """
    _nms.foreach_add_pruned(grads, ws, bits, dims, alphas, scale, outs)


def add_kept(
    grads: Sequence[Tensor],
    ws: Sequence[Tensor],
    bits: Sequence[Tensor],
    *,
    dims: Sequence[int],
    alphas: Sequence[float],
    scale: Tensor | None = None,
    outs: Sequence[Tensor],
) -> None:
    """``outs[i] = where(mask, grads[i] + alphas[i] * scale * ws[i], 0)``: DominoSearch's gradient.

    Arguments as of `add_pruned`.
    """
    _nms.foreach_add_kept(grads, ws, bits, dims, alphas, scale, outs)


def vote(
    ws: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    *,
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    counts: Tensor,
) -> None:
    """``counts[i]``: in how many groups of ``ws[i]`` fewer than ``ns[i]`` weights are above the threshold.

    Args:
        ws: The weights: float64 or float32.
        thresholds: One a group, of `group_thresholds`.
        ns: Numbers of weights.
        ms: The group sizes.
        dims: The group dims.
        counts: int64 ``[len(ws)]``, on the weights' device.
    """
    _nms.foreach_vote(ws, thresholds, ns, ms, dims, counts)


def group_thresholds(w: Tensor, m: int, *, dim: int) -> Tensor:
    """The mean of the ``m // 2`` smallest ``|w|`` of each group: ``[other dims..., groups]``."""
    return _nms.group_thresholds(w, m, dim)


def apply_bits(
    ws: Sequence[Tensor], bits: Sequence[Tensor], *, dims: Sequence[int], outs: Sequence[Tensor]
) -> None:
    """``outs[i] = where(mask, ws[i], 0)``, rounded to the dtype of ``outs[i]``."""
    _nms.foreach_apply_bits(ws, bits, dims, outs)


def reselect(
    ws: Sequence[Tensor],
    *,
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    outs: Sequence[Tensor],
    bits: Sequence[Tensor],
    changes: Tensor,
    places: Sequence[int],
    work: Tensor | None = None,
) -> None:
    """Chooses masks anew: the largest ``|w|`` of each group.

    Args:
        ws: The dense weights.
        ns: How many weights of each group are kept.
        ms: The group sizes.
        dims: The group dims.
        outs: Receive the masked weights, rounded to their dtypes.
        bits: The old packed masks; receive the new ones.
        changes: int64, one dimension; receives how many weights changed sides.
        places: Where in ``changes``.
        work: Working memory, uint8 of the size of the largest mask, so that nothing is allocated; kernels on
            the CPU do not need it.
    """
    _nms.foreach_reselect(ws, ns, ms, dims, outs, bits, changes, places, work)


def sgd_(*arguments: Any) -> None:
    """One step of SGD, see `reference.sgd_`; made by `nms.optim.SGD`."""
    _nms.sgd_(*arguments)


def adamw_(*arguments: Any) -> None:
    """One step of AdamW, see `reference.adamw_`; made by `nms.optim.AdamW`."""
    _nms.adamw_(*arguments)
