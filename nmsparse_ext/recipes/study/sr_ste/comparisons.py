"""What the study compares: the paper's expectations, one comparison each, tested together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nmsparse_ext.recipes.study.comparison import Comparison, correct, pair_up
from nmsparse_ext.recipes.study.plan import Records
from nmsparse_ext.recipes.study.sr_ste.plan import Experiment, SrStePlan

LABELS = {
    "dense": "dense",
    "ste": "STE",
    "sr-ste": "SR-STE",
    "sr-ste-decoupled": "SR-STE, decoupled",
    "sweep": "SR-STE",
}


@dataclass(frozen=True)
class SrSteComparison(Comparison):
    """A comparison at a pattern.

    Attributes:
        lambda_w: Lambda of `arm`, if it is of the sweep.
    """

    lambda_w: float | None = None


def compare_all(plan: SrStePlan, records: Records) -> list[SrSteComparison]:
    """All comparisons of the plan, with p-values corrected for their number."""
    return correct([c for experiment in plan.experiments for c in _of(experiment, records, plan.alpha)])


def figures_by_seed(
    records: Records,
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


def _of(experiment: Experiment, records: Records, alpha: float) -> Iterator[SrSteComparison]:
    """The comparisons of one experiment."""
    better = 1 if experiment.higher_is_better else -1

    def one(
        figure: str, arm: str, against: str, pattern: str, expected: int, lambda_w: float | None = None
    ) -> SrSteComparison:
        a = figures_by_seed(records, experiment, arm, pattern, figure, lambda_w)
        b = figures_by_seed(records, experiment, against, pattern, figure)
        pairs, diverged, paired = pair_up(a, b, alpha)
        return SrSteComparison(
            experiment.name, pattern, figure, arm, against, expected, pairs, diverged, paired,
            lambda_w=lambda_w,
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
