"""The study's page: what was found, with intervals, in Markdown with plots."""

from __future__ import annotations

from collections.abc import Sequence

from nmsparse_ext.recipes.study.cells import difference, finite, mean_cell, row, tested_cells
from nmsparse_ext.recipes.study.plan import Record, Records
from nmsparse_ext.recipes.study.sr_ste.comparisons import (
    LABELS,
    SrSteComparison,
    compare_all,
    figures_by_seed,
)
from nmsparse_ext.recipes.study.sr_ste.plan import Experiment, SrStePlan


def render(records: Records, plan: SrStePlan) -> str:
    """The page as Markdown."""
    comparisons = compare_all(plan, records)
    jobs = list(plan.jobs())
    made = sum(job.key in records for job in jobs)
    seconds = sum(record["cpu_seconds"] for record in records.values())
    lines = [
        "# The SR-STE paper's claims, tested",
        "",
        f"Made by `nmsparse study report` from {made} of {len(jobs)} runs of the plan "
        f"`recipes/study.toml` (digest {plan.digest}), {seconds / 60:.1f} minutes of one core together. "
        "The plan was fixed before the tested runs were made.",
        "",
        *_summary(comparisons, plan),
    ]
    if made < len(jobs):
        lines += [
            "",
            f"**Not complete: {len(jobs) - made} runs are missing; what is here may still change.**",
        ]
    for experiment in plan.experiments:
        if _main(records, experiment):
            lines += ["", *_experiment(records, experiment, comparisons, plan)]
    lines += ["", *_caveats()]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------- findings


def _summary(comparisons: Sequence[SrSteComparison], plan: SrStePlan) -> list[str]:
    """The findings, a line each."""
    tested = [c for c in comparisons if c.paired is not None]
    lines = ["## What was found", ""]
    metric = {experiment.name: experiment.metric for experiment in plan.experiments}
    claims = [
        ("SR-STE better than STE", False, False),
        ("SAD lower with SR-STE", False, True),
        ("Negative λ worse than STE", True, False),
        ("SAD higher with negative λ", True, True),
    ]
    for claim, of_sweep, of_sad in claims:
        of_claim = [
            c
            for c in tested
            if c.against == "ste" and (c.arm == "sweep") == of_sweep and (c.figure == "sad") == of_sad
        ]
        if not of_claim:
            continue
        shown = [c for c in of_claim if c.verdict(plan.alpha).endswith("as expected")]
        against = [c for c in of_claim if c.verdict(plan.alpha).endswith("against expectation")]
        text = f"- **{claim}:** shown in {len(shown)} of {len(of_claim)} comparisons"
        text += f" ({', '.join(map(_place, shown))})" if shown else ""
        text += f"; the opposite in {len(against)} ({', '.join(map(_place, against))})" if against else ""
        rest = [c for c in of_claim if c not in shown and c not in against]
        text += f"; no difference shown in {len(rest)} ({', '.join(map(_place, rest))})" if rest else ""
        lines.append(text + ".")
    for c in tested:
        if (c.arm, c.against) == ("sr-ste-decoupled", "sr-ste"):
            lines.append(
                f"- **Decoupled against published penalty** ({c.experiment} {c.case}): "
                f"{metric[c.experiment]} {difference(c)}; {c.verdict(plan.alpha)}."
            )
    lines += [
        "",
        f'"Shown" means: p < {plan.alpha:g} in a paired t test over the seeds, after Holm\'s correction for '
        f"all {len(tested)} comparisons of the study. No difference shown is not the same as no difference: "
        "with so few seeds only large effects can be seen.",
    ]
    return lines


def _place(c: SrSteComparison) -> str:
    decoupled = " decoupled" if c.arm == "sr-ste-decoupled" else ""
    strength = f" λ = {c.lambda_w:g}" if c.lambda_w is not None else ""
    return f"{c.experiment} {c.case}{decoupled}{strength}"


def _experiment(
    records: Records, experiment: Experiment, comparisons: Sequence[SrSteComparison], plan: SrStePlan
) -> list[str]:
    sample = _main(records, experiment)[0]
    data = ", ".join(f"{key}: {value}" for key, value in sample["data"].items() if key != "sha256")
    return [
        f"## {experiment.name}: `{experiment.recipe}`",
        "",
        f"{data}. {sample['prunable']:,} weights under the pattern, {sample['steps']} optimizer steps, "
        f"{len(experiment.seeds)} seeds planned.",
        "",
        f"![{experiment.name}](images/study_{experiment.name}.png)",
        "",
        *main_table(records, experiment, comparisons, plan),
        "",
        *_sad_table(records, experiment, plan),
        "",
        *_sweep_table(records, experiment, comparisons, plan),
    ]


def main_table(
    records: Records, experiment: Experiment, comparisons: Sequence[SrSteComparison], plan: SrStePlan
) -> list[str]:
    """Metric by pattern and way of training, with the comparison with STE."""
    lines = [
        f"Test {experiment.metric} (mean ± half width of the {100 * (1 - plan.alpha):g} % interval), and the "
        "paired difference from STE [interval], its size in standard deviations of the differences (d), "
        "its p-value, that of the exact sign-flip test, and the p-value after Holm's correction.",
        "",
        "| pattern | training | λ | seeds | "
        + experiment.metric
        + " | minus STE | d | p | p (signs) | p (Holm) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for pattern in experiment.patterns:
        for arm in ("dense", "ste", *experiment.arms):
            values = finite(figures_by_seed(records, experiment, arm, pattern, experiment.metric))
            if not values:
                continue
            found = [
                c for c in comparisons
                if (c.experiment, c.case, c.arm, c.against, c.figure)
                == (experiment.name, pattern, arm, "ste", experiment.metric)
            ]  # fmt: skip
            cells = tested_cells(found[0]) if found else [""] * 5
            strength = _lambda_of(records, experiment, arm, pattern)
            lines.append(
                row(
                    "-" if arm == "dense" else pattern,
                    LABELS[arm],
                    strength,
                    str(len(values)),
                    mean_cell(values, experiment.metric, plan.alpha),
                    *cells,
                )
            )
    # Dense is the same runs whatever the pattern.
    return [line for i, line in enumerate(lines) if "| - |" not in line or line not in lines[:i]]


def _sad_table(records: Records, experiment: Experiment, plan: SrStePlan) -> list[str]:
    lines = [
        "SAD: share of weights that change sides per step, mean over the run, and in the first, middle and "
        "last third; and the share that ends on another side than it began.",
        "",
        "| pattern | training | SAD per step | first third | middle | last | start to end |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for pattern in experiment.patterns:
        for arm in ("dense", "ste", *experiment.arms):
            runs = [r for r in _main(records, experiment) if r["arm"] == arm and r["pattern"] == pattern]
            if not runs:
                continue
            overall = [sum(r["sad"]) / len(r["sad"]) for r in runs]
            thirds = [[_third(r["sad"], i) for r in runs] for i in range(3)]
            ends = [r["sad_from_start"] for r in runs]
            lines.append(
                row(
                    pattern,
                    LABELS[arm],
                    mean_cell(overall, "sad", plan.alpha),
                    *(mean_cell(third, "sad", None) for third in thirds),
                    f"{100 * sum(ends) / len(ends):.1f} %",
                )
            )
    return lines


def _sweep_table(
    records: Records, experiment: Experiment, comparisons: Sequence[SrSteComparison], plan: SrStePlan
) -> list[str]:
    pattern = experiment.sweep_pattern
    lines = [
        f"λ at {pattern} (gradient penalty); λ = 0 is STE. Tests stand where the paper makes a claim.",
        "",
        f"| λ | seeds | {experiment.metric} | SAD per step | minus STE | p (Holm) "
        "| SAD minus STE | p (Holm) |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for lambda_w in sorted({0.0, *experiment.sweep}):
        arm = "sweep" if lambda_w else "ste"
        chosen = lambda_w or None
        values = finite(figures_by_seed(records, experiment, arm, pattern, experiment.metric, chosen))
        sad = finite(figures_by_seed(records, experiment, arm, pattern, "sad", chosen))
        if not values:
            continue
        cells = []
        for figure in (experiment.metric, "sad"):
            found = [
                c for c in comparisons
                if (c.experiment, c.arm, c.lambda_w, c.figure) == (experiment.name, "sweep", lambda_w, figure)
            ]  # fmt: skip
            all_cells = tested_cells(found[0]) if found else [""] * 5
            cells += [all_cells[0], all_cells[-1]]
        lines.append(
            row(
                f"{lambda_w:g}",
                str(len(values)),
                mean_cell(values, experiment.metric, plan.alpha),
                mean_cell(sad, "sad", plan.alpha),
                *cells,
            )
        )
    return lines


def _caveats() -> list[str]:
    return [
        "## How to read this",
        "",
        "- The networks and runs are tiny: a study of the mechanism, not of ImageNet. λ acts through λ x "
        "learning rate x steps, so that runs as short as these need a λ hundreds of times the published one "
        "to pull as much.",
        "- λ was chosen for each pattern by validation loss with seeds of its own; STE has nothing to "
        "choose, so SR-STE has had a small advantage. The test data are the same in all runs, and the tested "
        "runs read them once, after the last step. The intervals are about other seeds, not other data.",
        "- Before the plan was fixed, some 45 short runs of seeds 90001 and 90002 were looked at, on "
        "validation data. A few runs that tried the commands out (seed 0, other sizes) printed test figures "
        "of the digits; nothing was chosen by them. While the runs were being made, this page was looked at "
        "several times; the plan stayed as it was.",
        "- Pairs share initial weights, order of the data and, for the digits, the split into training and "
        "validation data.",
        "- All runs are in `bench/results/study.jsonl`, one a line, with their curves.",
    ]


def short_table(records: Records, plan: SrStePlan) -> str:
    """The main comparison of all experiments in one table, for the README."""
    comparisons = compare_all(plan, records)
    lines = [
        "| recipe | pattern | dense | STE | SR-STE | λ | SR-STE minus STE | p (Holm) | SAD of STE, SR-STE |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for experiment in plan.experiments:
        for c in comparisons:
            if (c.experiment, c.arm, c.against, c.figure) != (
                experiment.name, "sr-ste", "ste", experiment.metric
            ):  # fmt: skip
                continue

            def mean(arm: str, figure: str, e: Experiment = experiment, pattern: str = c.case) -> str:
                return mean_cell(finite(figures_by_seed(records, e, arm, pattern, figure)), figure, None)

            arms = [mean(arm, experiment.metric) for arm in ("dense", "ste", "sr-ste")]
            tested = tested_cells(c)
            lines.append(
                row(
                    f"{experiment.recipe}, {experiment.metric}",
                    c.case,
                    *arms,
                    _lambda_of(records, experiment, "sr-ste", c.case),
                    tested[0],
                    tested[-1],
                    f"{mean('ste', 'sad')}, {mean('sr-ste', 'sad')}",
                )
            )
    missing = sum(job.key not in records for job in plan.jobs())
    if missing:
        lines += ["", f"Not complete yet: {missing} runs are missing."]
    return "\n".join(lines) + "\n"


def _lambda_of(records: Records, experiment: Experiment, arm: str, pattern: str) -> str:
    if arm in ("dense", "ste"):
        return ""
    runs = [r for r in _main(records, experiment) if r["arm"] == arm and r["pattern"] == pattern]
    return f"{runs[0]['lambda_w']:g}"


def _main(records: Records, experiment: Experiment) -> list[Record]:
    return [r for r in records.values() if r["experiment"] == experiment.name and r["stage"] == "main"]


def _third(values: Sequence[float], which: int) -> float:
    start, end = (round(i * len(values) / 3) for i in (which, which + 1))
    part = values[min(start, len(values) - 1) : max(end, start + 1)]
    return sum(part) / len(part)
