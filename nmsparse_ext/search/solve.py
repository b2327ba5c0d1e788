"""Chooses one option per weight so that least is lost within all limits: a multiple-choice knapsack.

Branch and bound of HiGHS through ``scipy.optimize.milp``, which also proves a bound: no choice within the
limits loses less. Most instances of this kind are solved to optimality in well under a second; models with
dozens of equal layers have so many almost equal choices that the proof can take longer than it is worth, so
that it stops at a relative gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: HiGHS takes 1e-6 for 0, in rows and objective: numbers are scaled to so much.
_SCALE = 1e4


class Option(NamedTuple):
    """One way to treat a weight: what it loses, and what it costs in each limited metric."""

    loss: float
    costs: Mapping[str, float]


class Choice(NamedTuple):
    """What `choose` returns.

    Attributes:
        chosen: The index of the chosen option of each item.
        loss: What they lose together.
        bound: No choice within the limits loses less, up to the solver's tolerance of 1e-6.
    """

    chosen: list[int]
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much of `loss` a better choice could save at most, relative."""
        return max(0.0, (self.loss - self.bound) / self.loss) if self.loss > 0 else 0.0


def choose(
    items: Sequence[Sequence[Option]],
    limits: Mapping[str, float],
    *,
    max_gap: float = 0.0,
    max_seconds: float = 20.0,
) -> Choice:
    """Chooses an option of each item: least total loss, with the total of every metric within its limit.

    Args:
        items: The options of each item; every option has all limited metrics among its costs.
        limits: The most that all chosen options may cost together, per metric.
        max_gap: Stop when the loss is proven to be within this part of the optimum.
        max_seconds: Stop then, with the best that was found.

    Raises:
        ValueError: If no choice is within the limits, or none was found in ``max_seconds``.
        ModuleNotFoundError: If SciPy is missing.
    """
    # What nothing costs binds nothing, and would have no scale.
    limits = {
        k: most for k, most in limits.items() if any(o.costs[k] > 0 for options in items for o in options)
    }
    kept = [_undominated(options, limits) for options in items]
    # Of options that lose as little, the undominated one is the cheapest.
    best = [min(rest, key=lambda j, o=options: o[j].loss) for options, rest in zip(items, kept, strict=True)]  # type: ignore[misc]
    if _within(items, best, limits):
        loss = _loss(items, best)
        return Choice(best, loss, loss)
    bound = None
    shrunk = dict.fromkeys(limits, 1.0)
    for _ in range(6):
        chosen, lower = _milp(items, kept, {k: limits[k] * shrunk[k] for k in limits}, max_gap, max_seconds)
        bound = lower if bound is None else bound
        excess = {k: _total(items, chosen, k) / limits[k] - 1 for k in limits}
        if _within(items, chosen, limits):
            loss = _loss(items, chosen)
            return Choice(chosen, loss, min(bound, loss))
        # The solver's tolerance let a limit be exceeded by a hair. Ask for that much less.
        for k, over in excess.items():
            if over > 0:
                shrunk[k] -= 2 * over
    raise ValueError("no choice within the limits was found: they are too close to what is possible")


def _undominated(options: Sequence[Option], limits: Mapping[str, float]) -> list[int]:
    """Indices of the options that no other one matches or beats in loss and every limited cost."""
    order = sorted(
        range(len(options)), key=lambda j: (options[j].loss, sum(options[j].costs[k] for k in limits))
    )
    kept: list[int] = []
    for j in order:  # whatever beats j came before it
        if not any(all(options[i].costs[k] <= options[j].costs[k] for k in limits) for i in kept):
            kept.append(j)
    return kept


def _milp(
    items: Sequence[Sequence[Option]],
    kept: Sequence[Sequence[int]],
    limits: Mapping[str, float],
    max_gap: float,
    max_seconds: float,
) -> tuple[list[int], float]:
    """The chosen options, and a lower bound of the loss."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(i, j) for i, options in enumerate(kept) for j in options]
    losses = np.array([items[i][j].loss for i, j in flat])
    # One unit is the largest loss of all divided by _SCALE, whatever a criterion measures in.
    unit = max(losses.max(), 1e-300) / _SCALE
    one_each = csr_array(
        (np.ones(len(flat)), ([i for i, _ in flat], range(len(flat)))), shape=(len(items), len(flat))
    )
    rows = np.array([[items[i][j].costs[k] / limits[k] * _SCALE for i, j in flat] for k in limits])
    result = milp(
        losses / unit,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, -np.inf, _SCALE)],
        # Without presolve: it is no faster for these small problems, and writes to stdout more often. A line
        # of HiGHS may still come; the command line keeps it out of its output (`own_stdout`).
        options={"mip_rel_gap": max_gap, "time_limit": max_seconds, "presolve": False},
    )
    if result.x is None:
        names = " and ".join(limits)
        if result.status == 2:
            raise ValueError(f"no choice of candidates is within the budget of {names} at once")
        raise ValueError(f"found no choice within the budget of {names} in {max_seconds} s: {result.message}")
    chosen: list[int] = []
    for i, options in enumerate(kept):
        at = [position for position, (item, _) in enumerate(flat) if item == i]
        chosen.append(options[int(np.argmax(result.x[at]))])
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
    return chosen, float(bound) * unit


def _total(items: Sequence[Sequence[Option]], chosen: Sequence[int], metric: str) -> float:
    return sum(options[j].costs[metric] for options, j in zip(items, chosen, strict=True))


def _loss(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[j].loss for options, j in zip(items, chosen, strict=True))


def _within(items: Sequence[Sequence[Option]], chosen: Sequence[int], limits: Mapping[str, float]) -> bool:
    # Limits that are fractions of totals carry the rounding of a product; see costs._ROUNDING.
    return all(_total(items, chosen, k) <= limit * (1 + 1e-9) for k, limit in limits.items())
