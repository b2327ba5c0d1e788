"""A comparison of two ways over paired seeds, as part of a family that is corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from nmsparse_ext.recipes.study.statistics import Paired, compare, holm


@dataclass(frozen=True)
class Comparison:
    """One way against another, in one case, in one figure.

    Attributes:
        experiment: The experiment's name.
        case: What both are compared at: a pattern, a budget.
        figure: "accuracy", "loss" or "sad".
        arm: What is compared.
        against: With what.
        expected: The sign of `arm` - `against` that the paper lets expect: 1 or -1; 0 if it says nothing.
        pairs: Seeds with both runs.
        diverged: How many of them have no figure, because a run diverged. They are left out.
        paired: The comparison; ``None`` with fewer than two pairs.
        corrected: Holm's p-value among all comparisons of the family.
    """

    experiment: str
    case: str
    figure: str
    arm: str
    against: str
    expected: int
    pairs: int
    diverged: int
    paired: Paired | None
    corrected: float | None = None

    def verdict(self, alpha: float) -> str:
        """What follows, in a few words."""
        if self.paired is None or self.corrected is None:
            return "not enough pairs"
        if self.corrected >= alpha:
            return "no difference shown"
        higher = self.paired.mean > 0
        word = "higher" if higher else "lower"
        if not self.expected:
            return word
        return f"{word}, as expected" if higher == (self.expected > 0) else f"{word}, against expectation"


C = TypeVar("C", bound=Comparison)


def pair_up(
    a: Mapping[int, float | None], b: Mapping[int, float | None], alpha: float
) -> tuple[int, int, Paired | None]:
    """Compare figures by seed.

    Args:
        a: ``{seed: figure}`` of one way; ``None`` for a run that diverged.
        b: The same of the other.
        alpha: One minus the interval's level.

    Returns:
        Seeds with both runs; how many of them have a run that diverged; the comparison of the others,
        ``None`` if they are fewer than two.
    """
    pairs = [(a[seed], b[seed]) for seed in a if seed in b]
    whole = [(x, y) for x, y in pairs if x is not None and y is not None]
    paired = compare([x for x, _ in whole], [y for _, y in whole], alpha) if len(whole) > 1 else None
    return len(pairs), len(pairs) - len(whole), paired


def correct(family: Sequence[C]) -> list[C]:
    """The same comparisons with p-values corrected for their number; untested ones do not count."""
    tested = [comparison for comparison in family if comparison.paired is not None]
    corrected = iter(holm([c.paired.p for c in tested if c.paired is not None]))
    return [c if c.paired is None else replace(c, corrected=next(corrected)) for c in family]
