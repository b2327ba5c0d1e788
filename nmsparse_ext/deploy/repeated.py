"""The measurement of `convert`, made several times over: what of a ratio is the machine's noise?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..pattern import Pattern
from ..scheme import Scheme
from .example import ExampleInput, example_call
from .explain import packed_plans
from .measure import alternate
from .plan import Plan, Seconds
from .race import race


@dataclass(frozen=True)
class Spread:
    """The median of some ratios, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        """Of at least one ratio."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Compared:
    """Packed against dense: one layer, or the whole model.

    Attributes:
        name: Parameter name; ``"the model"`` for all of it.
        pattern: The pattern, as text; ``""`` for the model.
        tokens: Rows of input that the weight meets; ``None`` for the model.
        engine: What runs the packed weight; ``""`` for the model.
        dense_ms: Median time dense, in eager mode.
        prepacked_ms: With a dense weight that oneDNN or MKL packed beforehand; ``None`` where there is none.
        packed_ms: Median time packed.
        to_eager: Dense time in eager mode, divided by the packed one.
        to_best: The fastest dense product, divided by the fastest packed one: as compiled models call both.
    """

    name: str
    pattern: str
    tokens: int | None
    engine: str
    dense_ms: float
    prepacked_ms: float | None
    packed_ms: float
    to_eager: Spread
    to_best: Spread

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        rows: One for each weight that can run packed, then the whole model if it was asked for.
        cold: Whether layers were timed with weights from memory, not from the caches.
        left: Why the other weights of the scheme have no row.
    """

    rows: tuple[Compared, ...]
    cold: bool
    left: dict[str, str]


def compare(
    model: nn.Module,
    scheme: Scheme,
    example_input: ExampleInput,
    *,
    rounds: int = 5,
    whole: bool = True,
    after: Callable[[], object] = lambda: None,
) -> Comparison:
    """Times a model dense and packed, layer by layer and as a whole, ``rounds`` times over.

    Weights are pruned by magnitude for it where they do not hold their pattern; the model is left as it was.

    Args:
        model: The model, dense.
        scheme: The patterns.
        example_input: What the model is called with in earnest.
        rounds: How often everything is measured; each is a median of several calls.
        whole: Whether the model is timed as a whole, too: all weights of the scheme packed, against none.
        after: Called after each round.

    Raises:
        ValueError: If nothing of the scheme can run packed, or does run, or the scheme does not match.
    """
    plans = packed_plans(model, scheme)
    if not plans:
        raise ValueError("there is no weight that could run packed with this pattern")
    measured: dict[Plan, list[Seconds]] = {plan: [] for plan in plans}
    totals: list[dict[str, float]] = []
    cold = False
    for _ in range(rounds):
        for plan in plans:
            plan.seconds, plan.tokens = Seconds(), 0
        cold = race(model, plans, example_input, None, "best")
        for plan in plans:
            if plan.seconds.dense > 0:
                measured[plan].append(plan.seconds)
        if whole:
            totals.append(_whole(model, [plan for plan in plans if measured[plan]], example_input))
        after()
    rows = [_row(plan, seconds) for plan, seconds in measured.items() if seconds]
    if not rows:
        raise ValueError(f"nothing was timed: {plans[0].weight.name}: {plans[0].reason}")
    if whole:
        rows.append(_model_row(totals))
    left = {plan.weight.name: plan.reason for plan, seconds in measured.items() if not seconds}
    return Comparison(tuple(rows), cold, left)


def _row(plan: Plan, seconds: Sequence[Seconds]) -> Compared:
    pattern: Pattern | None = plan.pattern
    prepacked = [one.prepacked for one in seconds if one.prepacked]
    return Compared(
        name=plan.weight.name,
        pattern=str(pattern),
        tokens=plan.tokens,
        engine=str(getattr(plan.packed, "engine", "")),
        dense_ms=statistics.median(one.dense for one in seconds) * 1e3,
        prepacked_ms=statistics.median(prepacked) * 1e3 if prepacked else None,
        packed_ms=statistics.median(one.packed for one in seconds) * 1e3,
        to_eager=Spread.of([one.over_eager for one in seconds]),
        to_best=Spread.of([one.over_best for one in seconds]),
    )


def _model_row(totals: Sequence[dict[str, float]]) -> Compared:
    ratios = Spread.of([one["dense"] / one["packed"] for one in totals])
    dense, packed = (statistics.median(one[name] for one in totals) * 1e3 for name in ("dense", "packed"))
    return Compared("the model", "", None, "", dense, None, packed, ratios, ratios)


def _whole(model: nn.Module, plans: Sequence[Plan], example_input: ExampleInput) -> dict[str, float]:
    """Seconds of the model in eager mode, with dense and with packed weights in turn."""
    device = plans[0].weight.parameter.device if plans else torch.device("cpu")
    with example_call(model, example_input, None) as call:

        def placed(packed: bool) -> Callable[[], object]:
            def run() -> object:
                for plan in plans:
                    plan.place(packed)
                return call(model)

            return run

        try:
            return alternate({"dense": placed(False), "packed": placed(True)}, device, rounds=3)
        finally:
            for plan in plans:
                plan.place(packed=False)
