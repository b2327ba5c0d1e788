"""What DominoSearch decides, and by what: levels, votes, dominoes, and how hard each weight is pulled.

Nothing here trains. The state is a handful of numbers a weight, all of them on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..pattern import Pattern
from .constraints import Candidates
from .costs import Costs
from .erk_scheme import erk_within


class Rules(NamedTuple):
    """The constants of the game; see `domino_search`."""

    vote: float
    erk_weight: float
    macs_weight: float
    tolerance: float
    negative_factors: bool


class Game:
    """The levels of all searched weights, and what moves them.

    Args:
        candidates: What each weight may become.
        costs: What that costs.
        limits: The budget in absolute numbers.
        rules: The constants.
        start: ``{name: pattern}``: where weights start that do not start dense.

    Attributes:
        n: ``{name: kept weights of each group}``: the level that a weight is trained with, from m down.
        patterns: ``{name: pattern}``: the last candidate that the level has reached; dense at first.
        erk: The distribution that weights are steered to.
        trace: ``(step, name, n)`` of every candidate reached: the dominoes.
        moves: ``(step, name, n)`` of every level reached, the dominoes among them.

    Raises:
        ValueError: If the candidates of a weight differ in m, or a start is none of them.
    """

    def __init__(
        self,
        candidates: Candidates,
        costs: Costs,
        limits: Mapping[str, float],
        rules: Rules,
        start: Mapping[str, Pattern] | None = None,
    ) -> None:
        self._costs, self._limits, self._rules = costs, limits, rules
        self._candidates = {name: _of_one_m(name, candidates[name]) for name in candidates}
        self.m = {name: patterns[-1].m for name, patterns in self._candidates.items()}
        self._start = dict(start or {})
        for name, pattern in self._start.items():
            if pattern not in self._candidates.get(name, ()):
                listed = ", ".join(map(str, self._candidates.get(name, ()))) or "none, it is not searched"
                raise ValueError(f"start must be candidates, got {pattern} for {name}, which has {listed}")
        self.patterns = {name: self._start.get(name, Pattern(m, m)) for name, m in self.m.items()}
        self.n = {name: pattern.n for name, pattern in self.patterns.items()}
        self.trace: list[tuple[int, str, int]] = []
        self.moves: list[tuple[int, str, int]] = []
        self.erk = erk_within(costs, candidates, limits)

    @property
    def met(self) -> bool:
        """Whether the budget is met, within the tolerance, by patterns that are all candidates."""
        if not all(self.patterns[name] in patterns for name, patterns in self._candidates.items()):
            return False
        total, dense = self._costs.total(self.patterns).as_dict(), self._costs.dense.as_dict()
        slack = self._rules.tolerance + 1e-12  # of the dense model's; and what rounding adds up to
        return all(total[metric] <= limit + slack * dense[metric] for metric, limit in self._limits.items())

    @property
    def shares(self) -> dict[str, float]:
        """What is left of the dense model: ``{metric: fraction}``."""
        return self._costs.shares(self.patterns)

    @property
    def needs_macs(self) -> bool:
        """Whether factors depend on MACs."""
        return self._rules.macs_weight > 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a game depends on, in plain numbers and text."""
        candidates = {name: " ".join(map(str, patterns)) for name, patterns in self._candidates.items()}
        start = {name: str(pattern) for name, pattern in self._start.items()}
        return {**self._rules._asdict(), "candidates": candidates, "start": start}

    def sparsest(self, name: str) -> Pattern:
        """The sparsest candidate of a weight."""
        return self._candidates[name][-1]

    def can_move(self, name: str) -> bool:
        """Whether the weight has not come to its sparsest candidate."""
        return self.n[name] > self._candidates[name][-1].n

    @property
    def over(self) -> bool:
        """Whether no weight can become sparser."""
        return not any(map(self.can_move, self.n))

    def play(self, step: int, below: Mapping[str, int], groups: Mapping[str, int]) -> bool:
        """One check: weights whose groups vote for it go one level down.

        Args:
            step: Number of the step.
            below: ``{name: groups with fewer than n weights above their threshold}``.
            groups: ``{name: groups}``.

        Returns:
            Whether the budget is met. If it is, what comes after that domino in the order of the model has
            not been looked at: the search is over.
        """
        for name in self.n:
            votes, voters = below[name], groups[name]
            if not self.can_move(name) or voters == 0 or votes / voters < self._rules.vote:
                continue
            self.n[name] -= 1
            move = (step, name, self.n[name])
            self.moves.append(move)
            pattern = Pattern(self.n[name], self.m[name])
            if pattern in self._candidates[name]:
                self.patterns[name] = pattern
                self.trace.append(move)
                if self.met:
                    return True
        return False

    def factors(self, macs: Mapping[str, int]) -> dict[str, float]:
        """How hard each weight is pulled: by what it still lacks of its ERK sparsity, and by its MACs.

        Both parts are scaled to a largest magnitude of 1. A weight that is sparser than its ERK share has a
        negative part, and may have a negative factor.

        Args:
            macs: ``{name: multiply-accumulates}`` of the dense weights.
        """
        density = {name: pattern.density for name, pattern in self.patterns.items()}
        # ERK sparsity minus present sparsity. What must not stay dense lacks at least its densest candidate.
        densest = {name: patterns[0].density for name, patterns in self._candidates.items()}
        missing = {name: density[name] - min(self.erk.densities[name], densest[name]) for name in self.n}
        scale = max(map(abs, missing.values())) if max(missing.values()) >= 0.01 else 0.0
        work = {name: macs[name] * density[name] for name in self.n}
        most = max(work.values())
        factors = {}
        for name in self.n:
            of_erk = missing[name] / scale if scale else 0.0
            of_macs = work[name] / most if most else 0.0
            factor = self._rules.erk_weight * of_erk + self._rules.macs_weight * of_macs
            factors[name] = factor if self._rules.negative_factors else max(factor, 0.0)
        return factors

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; plain numbers and text."""
        patterns = {name: str(pattern) for name, pattern in self.patterns.items()}
        return {"n": dict(self.n), "patterns": patterns, "trace": [*self.trace], "moves": [*self.moves]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another game of the same candidates stood."""
        self.n.update(state["n"])
        self.patterns = {name: Pattern.parse(text) for name, text in state["patterns"].items()}
        self.trace = [tuple(move) for move in state["trace"]]
        self.moves = [tuple(move) for move in state["moves"]]


def _of_one_m(name: str, patterns: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """The candidates of a weight as patterns of the same m, densest first; dense is m:m."""
    sizes = sorted({pattern.m for pattern in patterns if not pattern.is_dense})
    if len(sizes) != 1:
        raise ValueError(
            f"candidates of DominoSearch must have one m for each weight, got "
            f"{', '.join(map(str, patterns))} for {name}"
        )
    return tuple(Pattern(sizes[0], sizes[0]) if pattern.is_dense else pattern for pattern in patterns)
