"""What the study compares: the paper's expectations, one comparison each, tested together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nmsparse_ext.recipes.study.plan import Experiment, Plan, Record
from nmsparse_ext.recipes.study.statistics import Paired, compare, holm

LABELS = {
    "dense": "dense",
    "ste": "STE",
    "sr-ste": "SR-STE",
    "sr-ste-decoupled": "SR-STE, decoupled",
    "sweep": "SR-STE",
}


@dataclass(frozen=True)
class Comparison:
    """One way of training against another, at one pattern, in one figure.

    Attributes:
        experiment: The experiment's name.
        pattern: n:m.
        figure: "accuracy", "loss" or "sad".
        arm: What is compared.
        against: With what.
        lambda_w: Lambda of `arm`, if it is of the sweep.
        expected: The sign of `arm` - `against` that the paper lets expect: 1 or -1; 0 if it says nothing.
        pairs: Seeds with both runs.
        diverged: How many of them have no figure, because a run diverged. They are left out.
        paired: The comparison; ``None`` with fewer than two pairs.
        corrected: Holm's p-value among all comparisons of the study.
    """

    experiment: str
    pattern: str
    figure: str
    arm: str
    against: str
    lambda_w: float | None
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


def compare_all(plan: Plan, records: Mapping[str, Record]) -> list[Comparison]:
    """All comparisons of the plan, with p-values corrected for their number."""
    found = [
        comparison for experiment in plan.experiments for comparison in _of(experiment, records, plan.alpha)
    ]
    tested = [comparison for comparison in found if comparison.paired is not None]
    corrected = iter(holm([c.paired.p for c in tested if c.paired is not None]))
    return [c if c.paired is None else replace(c, corrected=next(corrected)) for c in found]


def figures_by_seed(
    records: Mapping[str, Record],
    experiment: Experiment,
    arm: str,
    pattern: str,
    figure: str,
    lambda_w: float | None = None,
) -> dict[int, float | None]:
    """``{seed: figure}`` of the tested runs of one arm; ``None`` for a run that diverged.

    "sad" is the mean share of weights that change sides per step, over the whole run.
    """
    values: dict[int, float | None] = {}
    for record in records.values():
        if (record["experiment"], record["stage"], record["arm"]) != (experiment.name, "main", arm):
            continue
        if arm != "dense" and record["pattern"] != pattern:
            continue
        if lambda_w is not None and record["lambda_w"] != lambda_w:
            continue
        sad = record["sad"]
        values[record["seed"]] = sum(sad) / len(sad) if figure == "sad" else record["test"][figure]
    return dict(sorted(values.items()))


def _of(experiment: Experiment, records: Mapping[str, Record], alpha: float) -> Iterator[Comparison]:
    """The comparisons of one experiment."""
    better = 1 if experiment.higher_is_better else -1

    def one(
        figure: str, arm: str, against: str, pattern: str, expected: int, lambda_w: float | None = None
    ) -> Comparison:
        a = figures_by_seed(records, experiment, arm, pattern, figure, lambda_w)
        b = figures_by_seed(records, experiment, against, pattern, figure)
        pairs = [(a[seed], b[seed]) for seed in a if seed in b]
        whole = [(x, y) for x, y in pairs if x is not None and y is not None]
        paired = compare([x for x, _ in whole], [y for _, y in whole], alpha) if len(whole) > 1 else None
        return Comparison(
            experiment.name, pattern, figure, arm, against, lambda_w, expected,
            len(pairs), len(pairs) - len(whole), paired,
        )  # fmt: skip

    for pattern in experiment.patterns:
        for arm in experiment.arms:
            yield one(experiment.metric, arm, "ste", pattern, better)
            yield one("sad", arm, "ste", pattern, -1)
        if "sr-ste-decoupled" in experiment.arms:
            yield one(experiment.metric, "sr-ste-decoupled", "sr-ste", pattern, 0)
    for lambda_w in experiment.sweep:
        if lambda_w < 0:
            yield one(experiment.metric, "sweep", "ste", experiment.sweep_pattern, -better, lambda_w)
            yield one("sad", "sweep", "ste", experiment.sweep_pattern, 1, lambda_w)
