"""Reorders the columns of a matrix so that an N:M pattern keeps more of it.

Swapping two columns of different groups changes what each row keeps by what the newcomers bring above the
threshold that they meet. With ``A`` the scores [rows, columns] and ``T[:, p]`` the n-th largest score of
what is left of p's group without p, a group keeps, with column q in place of p, as much more as
``V[p, q] - V[p, p]`` where ``V[p, q] = sum_rows relu(A[:, q] - T[:, p])``. So one table V knows the gain of
all swaps, ``V[p, q] + V[q, p] - V[p, p] - V[q, q]``, and as ``relu(x) = (|x| + x) / 2`` it is a table of
Manhattan distances. Swaps of different groups do not influence one another, so the best of them are made
together, until none gains. Out of that optimum a few random swaps lead to the next; the best one found is
the result, and it is never worse than the order that was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pattern import Pattern

#: Columns whose swaps are looked at together: the table has the square of it.
_BLOCK = 256
#: Rows that the search looks at; the result is judged by all of them.
_ROWS = 512
_MIN_GAIN = 1e-6  # relative to what is kept: less is rounding


class Scored(NamedTuple):
    """A matrix that the order is for.

    Attributes:
        scores: What each weight is worth, float32 ``[rows, columns]``, not negative.
        pattern: Its pattern; groups run along the columns.
    """

    scores: Tensor
    pattern: Pattern


def kept(matrix: Scored, order: Tensor | None = None) -> float:
    """The sum of the scores that the pattern keeps, with the columns in ``order``."""
    scores = matrix.scores if order is None else matrix.scores[:, order]
    groups = scores.unflatten(1, (-1, matrix.pattern.m))
    return float(groups.topk(matrix.pattern.n, dim=2).values.sum(dtype=torch.float64))


def best_order(matrices: Sequence[Scored], *, restarts: int = 8, seed: int = 0) -> Tensor:
    """Finds an order of the columns that all matrices share, with which they keep more together.

    Args:
        matrices: At least one, all with as many columns, a multiple of every pattern's m.
        restarts: How many optima are tried beyond the first. Each takes about as long as the first one.
        seed: Of the random swaps.

    Returns:
        int64 [columns]: which column comes at each place. The identity where nothing better was found.
    """
    columns = matrices[0].scores.shape[1]
    unit = math.lcm(*(matrix.pattern.m for matrix in matrices))
    generator = torch.Generator().manual_seed(seed)
    looked_at = [Scored(_some_rows(matrix.scores), matrix.pattern) for matrix in matrices]
    identity = torch.arange(columns)
    best, best_kept = identity, _kept(looked_at, identity)
    order = best
    for restart in range(restarts + 1):
        if restart:
            order = _shaken(best, unit, generator)
        order = _improved(looked_at, order, unit, generator)
        now = _kept(looked_at, order)
        if now > best_kept * (1 + _MIN_GAIN):
            best, best_kept = order, now
    # The rows that were not looked at have a say, too.
    return best if _kept(matrices, best) > _kept(matrices, identity) else identity


def _some_rows(scores: Tensor) -> Tensor:
    rows = scores.shape[0]
    return scores if rows <= _ROWS else scores[torch.linspace(0, rows - 1, _ROWS).long()]


def _kept(matrices: Sequence[Scored], order: Tensor) -> float:
    return sum(kept(matrix, order) for matrix in matrices)


def _shaken(order: Tensor, unit: int, generator: torch.Generator) -> Tensor:
    """A few columns of an order, moved around among themselves."""
    columns = len(order)
    moved = torch.randperm(columns, generator=generator)[: max(2, min(columns // 8, 4 * unit))]
    shaken = order.clone()
    shaken[moved] = order[moved.roll(1)]
    return shaken


def _improved(matrices: Sequence[Scored], order: Tensor, unit: int, generator: torch.Generator) -> Tensor:
    """Swaps columns until no swap gains; of many columns, block by block of groups drawn at random."""
    columns = len(order)
    units = columns // unit
    per_block = max(2, _BLOCK // unit)
    if units <= per_block:
        return order[_swapped([Scored(m.scores[:, order], m.pattern) for m in matrices], unit)]
    order = order.clone()
    for _ in range(2):
        shuffled = torch.randperm(units, generator=generator)
        for block in shuffled.split(per_block):
            places = (block[:, None] * unit + torch.arange(unit)).flatten()
            part = order[places]
            order[places] = part[_swapped([Scored(m.scores[:, part], m.pattern) for m in matrices], unit)]
    return order


def _swapped(matrices: Sequence[Scored], unit: int) -> Tensor:
    """The order of the columns after all swaps that gain, the best ones first."""
    columns = matrices[0].scores.shape[1]
    order = torch.arange(columns)
    least = _MIN_GAIN * sum(kept(matrix) for matrix in matrices)
    tables = [_Table(matrix) for matrix in matrices if not matrix.pattern.is_dense]
    for _ in range(4 * columns):  # each round gains; this only bounds the rounding's share
        swaps = _disjoint(
            sum((table.gains() for table in tables), torch.zeros(columns, columns)), unit, least
        )
        if not swaps:
            break
        here, there = (torch.tensor(places) for places in zip(*swaps, strict=True))
        order[here], order[there] = order[there], order[here]
        for table in tables:
            table.swap(here, there)
    return order


class _Table:
    """The table V of one matrix, kept up to date while columns are swapped."""

    def __init__(self, matrix: Scored) -> None:
        self._pattern = matrix.pattern
        self._columns = matrix.scores.T.contiguous()  # [columns, rows]: the rows of one column lie together
        self._sums = self._columns.sum(1)
        self._group = torch.arange(len(self._sums)) // matrix.pattern.m
        self._above = torch.empty(len(self._sums), len(self._sums))
        self._renew(torch.arange(len(self._sums) // matrix.pattern.m))

    def gains(self) -> Tensor:
        """[columns, columns]: how much more is kept after swapping two columns."""
        own = self._above.diagonal()
        gains = (self._above + self._above.T - own - own[:, None]) / 2
        return gains.masked_fill_(self._group == self._group[:, None], 0.0)

    def swap(self, here: Tensor, there: Tensor) -> None:
        """Swaps columns, pair by pair."""
        moved, from_ = torch.cat([here, there]), torch.cat([there, here])
        self._columns[moved] = self._columns[from_]
        self._sums[moved] = self._sums[from_]
        self._above[:, moved] = self._above[:, from_]
        self._renew(self._group[moved].unique())

    def _renew(self, groups: Tensor) -> None:
        """Computes the rows of some groups anew: twice V."""
        n, m = self._pattern.n, self._pattern.m
        places = (groups[:, None] * m + torch.arange(m)).flatten()
        scores = self._columns[places].unflatten(0, (-1, m))  # [groups, m, rows]
        largest = scores.topk(n + 1, dim=1).values
        nth, next_one = largest[:, n - 1 : n], largest[:, n:]
        # Without a kept column the n-th largest is what came after it.
        threshold = torch.where(scores >= nth, next_one, nth).flatten(0, 1)
        above = torch.cdist(threshold, self._columns, p=1.0)
        self._above[places] = above.add_(self._sums).sub_(threshold.sum(1)[:, None])


def _disjoint(gains: Tensor, unit: int, least: float) -> list[tuple[int, int]]:
    """The swaps that gain most, no two of them in the same units."""
    columns = gains.shape[0]
    units = columns // unit
    # The best swap of each pair of units is enough to choose from.
    tiles = gains.view(units, unit, units, unit).transpose(1, 2).reshape(units, units, -1)
    best, at = tiles.max(2)
    first, second = torch.triu_indices(units, units)
    values, ranking = best[first, second].sort(descending=True)
    ranking = ranking[values > least]
    taken: set[int] = set()
    swaps = []
    for pair in ranking.tolist():
        a, b = int(first[pair]), int(second[pair])
        if a in taken or b in taken:
            continue
        taken |= {a, b}
        place = int(at[a, b])
        swaps.append((a * unit + place // unit, b * unit + place % unit))
    return swaps
