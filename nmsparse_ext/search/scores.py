"""What a weight keeps with every n at once: one sort per group, then sums by rank.

Of a group the n largest ``|w|`` are kept, so what ``n:m`` keeps is nested in what ``(n + 1):m`` keeps. With
the sum of scores of each rank (over all groups) known, the score that ``n:m`` keeps is the sum of the first
n. No candidate needs a mask. Here the score is the square; `Ranking` sums others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

#: Weights sorted at a time, in groups: few enough for the cache, too few for PyTorch to start threads for.
_CHUNK = 1 << 19


def rank_sums(weight: Tensor, m: int, *, dim: int) -> Tensor:
    """Sums the squares of the weights of each rank.

    Args:
        weight: Float, of any dtype. Its size along ``dim`` is a multiple of ``m``.
        m: The size of a group.
        dim: The dim that groups run along.

    Returns:
        float64 [m]: entry r is the sum over all groups of the (r + 1)-th largest square.

    Equivalent to:
        ``groups.square().sort(-1, descending=True).values.double().sum(0)`` with groups ``[groups, m]``.
    """
    rows = groups_of(weight.detach(), m, dim)
    sums = torch.zeros(m, dtype=torch.float64, device=weight.device)
    for chunk in rows.split(max(1, _CHUNK // m)):
        sums += _sorted_squares(chunk)
    return sums


def lost_scores(sums: Tensor) -> list[float]:
    """``[lost with n = 1, ..., lost with n = m]`` from sums by rank; the last one is 0."""
    # Summed from the small end: what is lost with a large n must not drown in what is kept.
    tail = sums.flip(0).cumsum(0).flip(0).tolist()
    return [*tail[1:], 0.0]


def groups_of(tensor: Tensor, m: int, dim: int) -> Tensor:
    """``[groups, m]``, in the order of memory as far as possible."""
    return tensor.movedim(dim, -1).reshape(-1, m)


def _sorted_squares(groups: Tensor) -> Tensor:
    """float64 [m]: sums of the squares by rank, of ``groups`` [G, m]."""
    wide = groups if groups.dtype == torch.float64 else groups.float()
    # A sorting network over m columns of G squares each, so that every comparison is one pass of SIMD.
    columns = list(wide.t().square().contiguous().unbind(0))
    spare = torch.empty_like(columns[0])
    for high, low in sorting_network(len(columns)):
        torch.maximum(columns[high], columns[low], out=spare)
        torch.minimum(columns[high], columns[low], out=columns[low])
        columns[high], spare = spare, columns[high]
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


@cache
def sorting_network(n: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even mergesort for any n: pairs (high, low) to compare, in this order."""
    return tuple(_comparators(n))


def _comparators(n: int) -> Iterator[tuple[int, int]]:
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, j + min(k, n - j - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        yield i, i + k
            k //= 2
        p *= 2
