"""What the study of searches compares, in four families of tests, each corrected together."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from nmsparse_ext.recipes.study.comparison import Comparison, correct, pair_up
from nmsparse_ext.recipes.study.plan import Records
from nmsparse_ext.recipes.study.search.plan import Experiment, Job, SearchPlan

LABELS = {
    "dense": "dense",
    "uniform": "uniform",
    "erk": "ERK, rounded",
    "domino": "DominoSearch",
    "magnitude": "allocate, magnitude",
    "taylor": "allocate, taylor",
    "output": "allocate, output",
    "refined": "allocate, then DominoSearch",
}

# The baselines, each with the sign of "better than it" that the DominoSearch paper lets expect of an arm.
EXPECTED = {
    "uniform": {"erk": 1, "domino": 1, "magnitude": 1, "taylor": 1, "output": 1, "refined": 1},
    "domino": {"erk": -1},
}

ALL = "all"


def case_of(pattern: str, metric: str) -> str:
    """How a budget is called: "4:16 params"; "all params" for the mean over all patterns."""
    return f"{pattern} {metric}"


def cases_of(patterns: Sequence[str]) -> tuple[str, ...]:
    """The budgets of a metric, and their mean if they are several."""
    return (*patterns, ALL) if len(patterns) > 1 else tuple(patterns)


def compare_all(plan: SearchPlan, records: Records) -> list[Comparison]:
    """All comparisons of the plan.

    There are two questions, against uniform and against DominoSearch, and to each two families of tests that
    are corrected together: means over the budgets, and single budgets.
    """
    found: list[Comparison] = []
    for against in EXPECTED:
        asked = [c for e in plan.experiments for c in _of(e, records, against, plan.alpha)]
        found += correct([c for c in asked if is_mean(c)])
        found += correct([c for c in asked if not is_mean(c)])
    return found


def is_mean(c: Comparison) -> bool:
    """Whether it compares means over the budgets."""
    return c.case.startswith(ALL)


def figures_by_seed(
    records: Records, experiment: Experiment, arm: str, pattern: str = "", metric: str = ""
) -> dict[int, float | None]:
    """``{seed: test figure}`` of one arm at one budget; ``None`` for a run that diverged.

    Args:
        records: The runs so far.
        experiment: The experiment.
        arm: "dense", or a way to find a scheme.
        pattern: The budget's pattern; "all" for the mean over all of the metric.
        metric: What the budget limits.
    """
    if pattern == ALL:
        columns = [
            figures_by_seed(records, experiment, arm, each, metric) for each in experiment.budgets[metric]
        ]
        seeds = set.intersection(*map(set, columns))
        rows = {seed: [column[seed] for column in columns] for seed in sorted(seeds)}
        return {
            seed: None if None in row else statistics.fmean(value for value in row if value is not None)
            for seed, row in rows.items()
        }
    values: dict[int, float | None] = {}
    for seed in experiment.seeds:
        record = records.get(job_of(experiment, arm, seed, pattern, metric).key)
        if record is not None:
            values[seed] = record["test"][experiment.metric]
    return values


def job_of(experiment: Experiment, arm: str, seed: int, pattern: str, metric: str) -> Job:
    """The run of an arm at a budget; a dense one has none, and a uniform one is the same for every metric."""
    if arm == "dense":
        return Job(experiment.name, arm, seed)
    return Job(experiment.name, arm, seed, pattern, "" if arm == "uniform" else metric)


def _of(experiment: Experiment, records: Records, against: str, alpha: float) -> Iterator[Comparison]:
    """The comparisons of one experiment with one baseline."""
    better = 1 if experiment.higher_is_better else -1
    if against not in experiment.arms:
        return
    for metric, patterns in experiment.budgets.items():
        for pattern in cases_of(patterns):
            base = figures_by_seed(records, experiment, against, pattern, metric)
            for arm in experiment.arms:
                if arm in ("uniform", against):
                    continue
                values = figures_by_seed(records, experiment, arm, pattern, metric)
                yield Comparison(
                    experiment.name, case_of(pattern, metric), experiment.metric, arm, against,
                    better * EXPECTED[against].get(arm, 0), *pair_up(values, base, alpha),
                )  # fmt: skip
