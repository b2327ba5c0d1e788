"""What a reader of the page must know to judge it."""

from __future__ import annotations

from collections.abc import Mapping

from nmsparse_ext.recipes.study.search.plan import Experiment, SearchPlan


def caveats(plan: SearchPlan) -> list[str]:
    """The last section of the page."""
    lines = [
        "## How to read this",
        "",
        "- The networks and runs are tiny: a study of the mechanism, not of ImageNet. The digits networks "
        "are close to what can be reached at all, which leaves little to gain at the larger budgets.",
        "- A seed has its own dense model, order of the data and, for the digits, split into training and "
        "validation data. Two ways that come to the same scheme have the same fine-tuning, bit for bit, so "
        "that their difference is exactly 0.",
        "- ERK may round to the uniform scheme itself, as in the GPT, whose layers are alike; the difference "
        "is then exactly 0 too.",
        "- `taylor` and `output` see some training batches, as many as stand below; `magnitude` and ERK see "
        "no data.",
        "- The published DominoSearch checks every 100 steps, pulls with 0.1 every 5th step at a learning "
        "rate of 0.01, and takes tens of thousands of steps. Here:",
        *(line for experiment in plan.experiments for line in _constants(experiment)),
        "- DominoSearch stops with the first scheme that is within the budget (the authors' code: within "
        "0.001 of it), so it may keep less than the others; so may all, since no scheme need use a budget "
        "up.",
        "- Sizes, lengths, learning rates, λ and the constants above were settled with seeds "
        f"{', '.join(map(str, _pilot_seeds(plan)))}, on validation data alone; λ and the learning rate of "
        "the fine-tuning by uniform schemes. The tested runs read the test data once, after the last step. "
        "While they were being made, this page was looked at; "
        + ("the plan got more budgets, else it" if plan.extends else "the plan")
        + " stayed as it was.",
        "- Times were taken beside other work"
        + (", those of the extension in another sitting than the rest" if plan.extends else "")
        + ". All ways have equally many searches in each, so compare ways, and budgets only with care.",
        "- All runs are in `bench/results/search_study.jsonl`, one a line, with their schemes and curves.",
    ]
    missing = [
        f"{experiment.name} at the MACs of {', '.join(left)}"
        for experiment in plan.experiments
        if "macs" in experiment.budgets
        and (left := [p for p in experiment.patterns if p not in experiment.budgets["macs"]])
    ]
    if missing:
        lines.append(f"- Not run, for want of time: {'; '.join(missing)}.")
    return lines


def _constants(experiment: Experiment) -> list[str]:
    """How DominoSearch was shortened, and where its second form starts."""
    domino, refine = experiment.search["domino"], experiment.search["refine"]
    pull = domino["lr"] * domino["pull"] * domino["check_every"] / domino["pull_every"]
    return [
        f"    - {experiment.name}: {_settings(domino)}. Between two checks kept weights are pulled down by "
        f"{100 * pull:.2g} % times their factor; published: 2 %. {experiment.search['calibration']} batches "
        "for the criteria.",
        f'    - {experiment.name}, "allocate, then DominoSearch": starts from the allocation by '
        f"{refine['criterion']} for {refine['times']:g} times the budget, with "
        f"{_settings(refine['domino'])} and the rest as above.",
    ]


def _pilot_seeds(plan: SearchPlan) -> list[int]:
    return sorted({seed for experiment in plan.experiments for seed in experiment.pilot_seeds})


def _settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
