"""What each weight costs with each pattern: the table that every search asks.

How search code uses it::

    candidates = find_candidates(model, m=16, skip=["conv1"])   # {name: (16:16, 8:16, ..., 1:16)}
    costs = Costs(model, example_input, candidates=candidates)  # nothing runs again after this line
    limits = costs.limits(Budget(params=0.125))                 # {"params": 1_460_000.0}, absolute
    costs.check(candidates, limits)                             # ValueError if that cannot be reached
    costs.of("fc.weight", Pattern(2, 16))                       # Cost(params=..., macs=..., bytes=..., ...)
    costs.total({"fc.weight": Pattern(2, 16)})                  # what is not named counts as dense
    costs.within({"fc.weight": Pattern(2, 16)}, limits)         # True or False
    costs.shares(scheme)                                        # {"params": 0.13, ...} of the dense model

Counted are the model's prunable weights: those that layers multiply with, whether they are searched, skipped
or too short for a pattern. Embeddings, what is tied to one and parameters that the registry does not know
count only if a search includes them. That is what papers count, and what lets ``params=0.125`` mean the same
for a language model with and without a tied head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from torch import nn

from ..macs import count_macs
from ..pattern import Pattern
from ..weights import Weight, prunable_weights
from .budget import METRICS, Budget
from .constraints import Candidates

#: ``(parameter name, pattern, None for dense) -> seconds`` of its layer on the example input.
Latency: TypeAlias = "Callable[[str, Pattern | None], float]"

#: Sums of floating-point seconds and fractions of totals may be off by so much without exceeding a limit.
_ROUNDING = 1e-9


class Cost(NamedTuple):
    """What a weight, or all of them, cost.

    Attributes:
        params: Weights kept.
        macs: Multiply-accumulates of one call on the example input; ``None`` without one.
        bytes: Bytes of values and indices as packed, or of the dense weight.
        latency: Seconds of the layers' products in that call; ``None`` if not measured.
    """

    params: int
    macs: int | None
    bytes: int
    latency: float | None

    def as_dict(self) -> dict[str, float]:
        """The metrics that are known."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Costs:
    """The cost of every counted weight with any pattern; see the top of this file.

    Args:
        model: The model, wrapped or not.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments. The model runs once
            on it, to count MACs; the counts are for the whole batch.
        candidates: The searched weights; those that are not counted anyway are counted too.
        latency: How long each layer takes with each pattern; see `measure_latency`.

    Attributes:
        names: The counted weights, in the order of the model.
        unknown_macs: Those whose module type nobody has said how to count for. They are left out of the sums
            of MACs.
        unpacked: ``{name: reason}`` of weights that ``latency`` found unable to run packed, so that no
            pattern makes them faster.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: object = None,
        *,
        candidates: Candidates | None = None,
        latency: Latency | None = None,
    ) -> None:
        searched = {} if candidates is None else candidates.weights
        self._weights: dict[str, Weight] = {weight.name: weight for weight in prunable_weights(model)}
        self._weights |= {name: weight for name, weight in searched.items() if name not in self._weights}
        self._aliases = {alias: w.name for w in self._weights.values() for alias in w.names}
        counts = None if example_input is None else count_macs(model, example_input)
        self._macs = None if counts is None else {name: counts[name] or 0 for name in self._weights}
        self._latency = latency
        self.unpacked: Mapping[str, str] = getattr(latency, "unpacked", {})
        self.names = tuple(self._weights)
        self.unknown_macs = () if counts is None else tuple(n for n in self.names if counts[n] is None)
        self._known: dict[tuple[str, Pattern | None], Cost] = {}
        self.dense = self.total({})

    def weight(self, name: str) -> Weight:
        """The counted weight of that name.

        Raises:
            ValueError: If there is none.
        """
        key = self._aliases.get(name) or self._aliases.get(f"{name}.weight")
        if key is None:
            raise ValueError(f"{name} is no weight whose cost is counted")
        return self._weights[key]

    def of(self, name: str, pattern: Pattern | None = None) -> Cost:
        """The cost of one weight; ``None``, like ``n == m``, means dense.

        Raises:
            ValueError: If the weight is not counted.
        """
        if pattern is not None and pattern.is_dense:
            pattern = None
        key = (name, pattern)
        if key not in self._known:
            weight = self.weight(name)
            self._known[key] = Cost(
                params=weight.kept(pattern),
                macs=None if self._macs is None else weight.kept(pattern, self._macs[weight.name]),
                bytes=weight.nbytes(pattern),
                latency=None if self._latency is None else self._latency(weight.name, pattern),
            )
        return self._known[key]

    def total(self, scheme: Mapping[str, Pattern]) -> Cost:
        """The cost of all counted weights; those that ``scheme`` does not name are dense.

        Raises:
            ValueError: If it names a weight that is not counted.
        """
        patterns = {self.weight(name).name: pattern for name, pattern in scheme.items()}
        rows = [self.of(name, patterns.get(name)) for name in self.names]
        return Cost(
            params=sum(row.params for row in rows),
            macs=None if self._macs is None else sum(row.macs or 0 for row in rows),
            bytes=sum(row.bytes for row in rows),
            latency=None if self._latency is None else sum(row.latency or 0.0 for row in rows),
        )

    def shares(self, scheme: Mapping[str, Pattern]) -> dict[str, float]:
        """What is left of the dense model: ``{metric: fraction}`` of the known metrics."""
        total, dense = self.total(scheme).as_dict(), self.dense.as_dict()
        return {metric: total[metric] / dense[metric] if dense[metric] else 1.0 for metric in total}

    def limits(self, budget: Budget) -> dict[str, float]:
        """The budget in absolute numbers: ``{metric: most}``, latency in seconds.

        Raises:
            ValueError: If it limits what is not known here.
        """
        dense = self.dense.as_dict()
        limits = {}
        for metric, limit in budget.limits().items():
            if metric not in dense:
                needed = "an example_input" if metric == "macs" else "an example_input and measuring"
                raise ValueError(f"a budget of {metric} needs {needed}")
            limits[metric] = limit.value * dense[metric] if limit.relative else limit.value
        return limits

    def within(self, scheme: Mapping[str, Pattern], limits: Budget | Mapping[str, float]) -> bool:
        """Whether a scheme costs no more than a budget, or than `limits`, allows."""
        absolute = self.limits(limits) if isinstance(limits, Budget) else limits
        total = self.total(scheme).as_dict()
        return all(total[metric] <= limit * (1 + _ROUNDING) for metric, limit in absolute.items())

    def check(self, candidates: Candidates, limits: Mapping[str, float]) -> None:
        """Refuses limits that cannot be reached, whatever the other limits.

        Raises:
            ValueError: Naming the metric, the least that can be reached and how much of it is not searched.
        """
        for metric, limit in limits.items():
            index = METRICS.index(metric)
            searched = sum(min(self.of(name, p)[index] or 0 for p in candidates[name]) for name in candidates)
            fixed = sum(self.of(name)[index] or 0 for name in self.names if name not in candidates)
            if searched + fixed > limit * (1 + _ROUNDING):
                left = {n: self.of(n)[index] or 0 for n in self.names if n not in candidates}
                most = sorted((n for n in left if left[n]), key=lambda n: -left[n])[:3]
                why = "; ".join(f"{n}: {candidates.dense.get(n, 'not searched')}" for n in most)
                raise ValueError(
                    f"the budget of {metric} is {amount(metric, limit)}, but the sparsest candidates leave "
                    f"{amount(metric, searched + fixed)} of {amount(metric, self.dense[index] or 0)}"
                    + (f", {amount(metric, fixed)} of it in weights that stay dense ({why})" if fixed else "")
                )


def amount(metric: str, value: float) -> str:
    """A value of a metric as text: ``1,234,567`` or ``3.21 ms``."""
    return f"{value * 1e3:,.3f} ms" if metric == "latency" else f"{round(value):,}"
