"""ERK within a budget, and rounded to patterns: the scheme that shapes alone suggest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from ..pattern import Pattern
from ..scheme import Scheme
from .budget import METRICS, Amount, Budget
from .constraints import Candidate, Candidates, Constraints, find_candidates
from .costs import Costs, Latency
from .erk import Erk, erk_densities, round_densities
from .latency import priced


def erk_scheme(
    model: nn.Module,
    budget: Budget | Mapping[str, Amount] | Iterable[str],
    *,
    m: int = 16,
    candidates: Iterable[Candidate] | None = None,
    skip: Iterable[str] = (),
    constraints: Constraints | None = None,
    example_input: object = None,
    latency: Latency | None = None,
) -> Scheme:
    """Rounds the ERK distribution of a budget to a scheme, which meets it.

    First each density becomes the candidate that it differs least from, as a ratio. While that is over the
    budget, the weight that is furthest above its density (as a ratio) takes its next sparser candidate. Then,
    while there is room, the weight that is furthest below takes its next denser one, if it still fits. It
    asks for shapes alone: the model may be on the meta device.

    Args:
        model: The model.
        budget: The budget; of several limits all hold.
        m: The group size.
        candidates: What a weight may become; ``None`` for powers of two, and dense; see `find_candidates`.
        skip: What stays dense.
        constraints: Further constraints.
        example_input: What the model is called with, for a budget of MACs.
        latency: What layers cost in time. By default a budget of latency has them measured.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not allowed, or no candidates meet the budget.
    """
    found = find_candidates(model, m=m, candidates=candidates, skip=skip, constraints=constraints)
    costs, limits = priced(model, found, Budget.parse(budget), example_input, latency)
    densities = erk_within(costs, found, limits).densities
    patterns = round_densities(
        {name: densities[name] for name in found},
        {name: tuple(reversed(found[name])) for name in found},
        lambda patterns: costs.within(patterns, limits),
    )
    return Scheme(
        {name: pattern for name, pattern in patterns.items() if not pattern.is_dense},
        dense={**{n: "dense by ERK" for n, p in patterns.items() if p.is_dense}, **found.dense},
        complete=True,
    )


def erk_within(costs: Costs, candidates: Candidates, limits: Mapping[str, float]) -> Erk:
    """The ERK distribution that just meets a budget; of several limits, the strictest counts.

    What it costs to keep a fraction of a weight that is no candidate is interpolated between those that are.
    What is not searched is dense.
    """
    shapes = {name: tuple(costs.weight(name).parameter.shape) for name in costs.names}
    fixed = [name for name in costs.names if name not in candidates]
    size = sum(costs.weight(name).parameter.numel() for name in costs.names)
    lowest = sum(costs.weight(name).parameter.numel() for name in fixed) / size
    density = min(1.0, limits.get("params", size) / size)
    others = [metric for metric in limits if metric != "params"]
    if others:
        tables = {metric: _cost_tables(costs, candidates, metric) for metric in others}
        spent = {metric: sum(_cost(costs, name, None, metric) for name in fixed) for metric in others}

        def fits(density: float) -> bool:
            kept = erk_densities(shapes, density, dense=fixed).densities
            return all(
                spent[metric] + sum(np.interp(kept[name], *table) for name, table in tables[metric].items())
                <= limits[metric]
                for metric in others
            )

        if not fits(density):
            low, high = lowest, density
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            density = low
    return erk_densities(shapes, max(density, lowest, 1e-9), dense=fixed)


def _cost(costs: Costs, name: str, pattern: Pattern | None, metric: str) -> float:
    return costs.of(name, pattern)[METRICS.index(metric)] or 0


def _cost_tables(
    costs: Costs, candidates: Candidates, metric: str
) -> dict[str, tuple[list[float], list[float]]]:
    """``{name: (densities, costs)}``, ascending, of candidates and dense."""
    tables = {}
    for name in candidates:
        points = {pattern.density: _cost(costs, name, pattern, metric) for pattern in candidates[name]}
        points[1.0] = _cost(costs, name, None, metric)
        if metric in ("params", "macs"):  # which are in proportion
            points[0.0] = 0.0
        densities = sorted(points)
        tables[name] = (densities, [points[density] for density in densities])
    return tables
