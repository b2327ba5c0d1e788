"""The ops of DominoSearch: thresholds, the vote of the groups, and the pull on kept weights.

There are ``groups``, the size of the group dim divided by ``m``, in a row; thresholds have the shape
``[other dims..., groups]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _list_checks as checks
from .reference_rule import magnitude_key, ranking


def group_thresholds(w: Tensor, m: int, dim: int) -> Tensor:
    """The mean of the ``m // 2`` smallest ``|w|`` of each group.

    The smallest are those that the selection rule would prune first. They are summed in float64, in the order
    of their positions, and the mean is rounded to the dtype of ``w``.

    Args:
        w: float64 or float32.
        m: The group size, 2 or more, a divisor of the size of the group dim.
        dim: The group dim.

    Returns:
        ``[other dims..., groups]`` of the dtype of ``w``.
    """
    checks.check_group_thresholds(w, m, dim)
    groups = w.movedim(dim, -1).unflatten(-1, (w.shape[dim] // m, m)).abs()
    half = m // 2
    order = ranking(w, m, dim)
    # In place of a sum over [groups, half]: torch does not say in which order that one adds.
    places = order[..., m - half :].sort(dim=-1).values
    smallest = groups.gather(-1, places).double()
    total = torch.zeros(smallest.shape[:-1], dtype=torch.float64, device=w.device)
    for i in range(half):
        total += smallest[..., i]
    mean = (total / half).to(w.dtype)
    return torch.where(mean.isnan(), torch.nan, mean)  # one of all the NaNs


def foreach_vote(
    ws: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    counts: Tensor,
) -> None:
    """``counts[i]`` becomes the number of groups of ``ws[i]`` with fewer than ``ns[i]`` weights above theirs.

    A weight is above the threshold of its group if ``|w|`` is larger; to the selection rule, that is: NaN is
    larger than everything, and equal to NaN.

    Args:
        ws: The weights: float64 or float32.
        thresholds: One a group, ``[other dims..., groups]`` of the weight's dtype.
        ns: How many weights a group must at least have above its threshold for not being counted.
        ms: The group sizes, divisors of the group dims' sizes.
        dims: The group dims.
        counts: int64 ``[len(ws)]``.
    """
    checks.check_foreach_vote(ws, thresholds, ns, ms, dims, counts)
    for i, (w, threshold, n, m, dim) in enumerate(zip(ws, thresholds, ns, ms, dims, strict=True)):
        keys = magnitude_key(w).movedim(dim, -1).unflatten(-1, (w.shape[dim] // m, m))
        above = (keys > magnitude_key(threshold).unsqueeze(-1)).sum(-1)
        counts[i] = (above < n).sum()


def foreach_add_kept(
    grads: Sequence[Tensor],
    ws: Sequence[Tensor],
    bits: Sequence[Tensor],
    dims: Sequence[int],
    alphas: Sequence[float],
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> None:
    """``outs[i] = where(bits[i], grads[i] + alphas[i] * scale * ws[i], 0)``.

    ``outs[i]`` may be wider than ``grads[i]``: the sum is then taken in its dtype.
    """
    checks.check_foreach_add_pruned(grads, ws, bits, dims, alphas, scale, outs)
    for grad, w, mask, dim, alpha, out in zip(grads, ws, bits, dims, alphas, outs, strict=True):
        out.copy_(grad)
        # Kept and pruned change sides: add_pruned_ adds where there is no bit.
        torch.ops.nmsparse.add_pruned_(out, w, ~mask, dim, alpha, scale)
        torch.ops.nmsparse.apply_bits_(out, mask, dim)
