"""The page of the study of searches: what was found, with intervals, in Markdown with plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from nmsparse_ext.recipes.study.cells import difference, finite, mean_cell, p_cell, row
from nmsparse_ext.recipes.study.comparison import Comparison
from nmsparse_ext.recipes.study.plan import Record, Records
from nmsparse_ext.recipes.study.search.caveats import caveats
from nmsparse_ext.recipes.study.search.comparisons import (
    ALL,
    EXPECTED,
    LABELS,
    case_of,
    cases_of,
    compare_all,
    figures_by_seed,
    is_mean,
    job_of,
)
from nmsparse_ext.recipes.study.search.figures import kept_by_layer, search_seconds
from nmsparse_ext.recipes.study.search.plan import Experiment, SearchPlan

WHAT = {"params": "weights", "macs": "MACs"}


def render(records: Records, plan: SearchPlan) -> str:
    """The page as Markdown."""
    comparisons = compare_all(plan, records)
    jobs = list(plan.jobs())
    made = sum(job.key in records for job in jobs)
    seconds = sum(r["cpu_seconds"] + r.get("search", {}).get("cpu_seconds", 0) for r in records.values())
    lines = [
        "# Does it pay to choose a pattern for every layer?",
        "",
        f"Made by `nmsparse study report --plan search_study` from {made} of {len(jobs)} runs of the plan "
        f"`recipes/search_study.toml` (digest {plan.digest}), {seconds / 60:.0f} minutes of one core "
        f"together. {_fixed(records, plan)}",
        "",
        *_what(plan),
        "",
        *_summary(records, comparisons, plan),
    ]
    if made < len(jobs):
        lines += [
            "",
            f"**Not complete: {len(jobs) - made} runs are missing; what is here may still change.**",
        ]
    for experiment in plan.experiments:
        if any(r["experiment"] == experiment.name for r in records.values()):
            lines += ["", *_experiment(records, experiment, comparisons, plan)]
    lines += ["", *caveats(plan)]
    return "\n".join(lines) + "\n"


def _fixed(records: Records, plan: SearchPlan) -> str:
    """What of the plan was fixed when, and which runs were known when it got its present form."""
    fixed = "fixed before its tested runs were made"
    before = sum(record["plan"] in plan.extends for record in records.values())
    if not before:
        return f"The plan was {fixed}."
    return (
        f"It extends a plan ({', '.join(plan.extends)}) that was {fixed}: {before} of the runs are of that "
        f"one, and were seen before the other {len(records) - before} were made; none was made again."
    )


def what_is_equal(records: Records, experiment: Experiment, metric: str) -> str:
    """What ways have in common at a budget: weights or MACs, or both where they come to the same."""
    shares = [r["shares"] for r in records.values() if r["experiment"] == experiment.name and "shares" in r]
    same = bool(shares) and all(math.isclose(s["params"], s["macs"], abs_tol=1e-6) for s in shares)
    return "weights and MACs" if same else WHAT[metric]


def _what(plan: SearchPlan) -> list[str]:
    """What was compared."""
    return [
        "For every seed a dense model is trained. From it each way finds a scheme, and from it again the "
        "model is fine-tuned with that scheme by SR-STE, everything else being equal. A budget is what a "
        "uniform pattern, given to every searched weight, keeps (its weights, or its MACs): no scheme may "
        "keep more. The candidates are the same for all ways: n of m with n a power of two, down to 1:m, or "
        "dense; so m is 32, since with m = 16 nothing but 1:16 everywhere keeps 1/16. Layers that the "
        "recipes leave dense (of the digits network the first convolution, with its one input channel, and "
        "the classifier; of the GPT the embedding, which is its head too) are dense in every scheme; they "
        "are not in the shares below. In the GPT every searched weight meets every token once, so that equal "
        "weights are equal MACs.",
        "",
        "| way | what it is |",
        "|---|---|",
        row("uniform", "one pattern for all searched weights"),
        row("ERK, rounded", "densities in proportion to sum(shape) / prod(shape), rounded to candidates"),
        row("DominoSearch", "`nms.domino_search` from the dense model, its times shortened, see below"),
        row("allocate", "`nms.allocate`: least lost of a criterion within the budget; three criteria"),
        row("allocate, then DominoSearch", "DominoSearch that starts from a looser allocation, see below"),
    ]


# ----------------------------------------------------------------------------------------------- findings


def _summary(records: Records, comparisons: Sequence[Comparison], plan: SearchPlan) -> list[str]:
    """The findings, a line each."""
    lines = ["## What was found", ""]
    for against in EXPECTED:
        for arm in LABELS:
            family = [c for c in comparisons if (c.arm, c.against) == (arm, against) and c.paired is not None]
            if family:
                lines.append(f"- **{LABELS[arm]} against {LABELS[against]}:** {_verdicts(family, plan)}")
    for experiment in plan.experiments:
        if line := _cost_line(records, experiment):
            lines.append(line)
    tested = [c for c in comparisons if c.paired is not None]
    families = [
        f"{sum(c.against == against and is_mean(c) == mean for c in tested)} comparisons of {what} against "
        f"{LABELS[against]}"
        for against in EXPECTED
        for mean, what in ((True, "means"), (False, "single budgets"))
    ]
    lines += [
        "",
        f'"Better" and "worse" mean: p < {plan.alpha:g} in a paired t test over the seeds, after Holm\'s '
        f"correction within each of four families ({', '.join(families)}). No difference shown is not "
        "the same as no difference: with so few seeds only large effects can be seen.",
    ]
    return lines


def _verdicts(family: Sequence[Comparison], plan: SearchPlan) -> str:
    """In how many budgets one way was better than another, worse, or neither."""
    up = {experiment.name: experiment.higher_is_better for experiment in plan.experiments}
    single = [c for c in family if not is_mean(c)]

    def named(keep: Callable[[bool], bool]) -> list[str]:
        found = []
        for c in single:
            assert c.paired is not None
            if c.verdict(plan.alpha) != "no difference shown" and keep(
                (c.paired.mean > 0) == up[c.experiment]
            ):
                found.append(f"{c.experiment} {c.case}")
        return found

    better, worse = named(lambda good: good), named(lambda good: not good)
    text = f"better in {len(better)} of {len(single)} budgets"
    text += f" ({', '.join(better)})" if better else ""
    text += f", worse in {len(worse)}" + (f" ({', '.join(worse)})" if worse else "")
    text += f", no difference shown in {len(single) - len(better) - len(worse)}."
    means = [
        f"{c.experiment}, {c.case.removeprefix(ALL).strip()}: {difference(c)}, p {p_cell(c.corrected)}"
        for c in family
        if is_mean(c) and c.corrected is not None
    ]
    return text + (f" Mean over the budgets: {'; '.join(means)}." if means else "")


def _cost_line(records: Records, experiment: Experiment) -> str:
    """How much cheaper allocation is than DominoSearch."""
    seconds = {arm: search_seconds(records, experiment, arm) for arm in experiment.arms}
    domino = seconds.get("domino")
    if not domino:
        return ""
    slow = statistics.median(domino)
    parts = [
        f"{LABELS[arm]} 1/{slow / statistics.median(of_arm):,.0f}"
        for arm, of_arm in seconds.items()
        if arm not in ("uniform", "domino") and of_arm and statistics.median(of_arm) > 0
    ]
    return (
        f"- **Cost on {experiment.name}:** DominoSearch takes {slow:.2f} s of processor time (median); "
        f"of that, {', '.join(parts)}."
    )


def short_table(records: Records, plan: SearchPlan) -> str:
    """What each way gains over uniform and costs, in one table, for the README."""
    comparisons = {(c.experiment, c.case, c.arm, c.against): c for c in compare_all(plan, records)}
    columns = [
        (experiment, cases_of(patterns)[-1], metric)
        for experiment in plan.experiments
        for metric, patterns in experiment.budgets.items()
    ]
    heads = [
        f"{experiment.name}, {experiment.metric} at equal {what_is_equal(records, experiment, metric)}, "
        + (f"mean of {len(experiment.budgets[metric])} budgets" if case == ALL else case)
        for experiment, case, metric in columns
    ]
    costs = [f"search, {experiment.name}" for experiment in plan.experiments]
    lines = [row("way", *heads, *costs), "|---|" + "---:|" * (len(heads) + len(costs))]
    for arm in dict.fromkeys(arm for experiment in plan.experiments for arm in experiment.arms):
        cells = []
        for experiment, case, metric in columns:
            if arm == "uniform":
                cells.append(_mean_at(records, experiment, arm, case, metric))
                continue
            c = comparisons.get((experiment.name, case_of(case, metric), arm, "uniform"))
            if c is None or c.corrected is None:
                cells.append("")
            else:
                cells.append(f"{difference(c)}, p {p_cell(c.corrected)}")
        for experiment in plan.experiments:
            seconds = search_seconds(records, experiment, arm)
            cells.append(_seconds(statistics.median(seconds)) if seconds and arm != "uniform" else "-")
        lines.append(row(LABELS[arm], *cells))
    missing = sum(job.key not in records for job in plan.jobs())
    if missing:
        lines += ["", f"Not complete yet: {missing} runs are missing."]
    return "\n".join(lines) + "\n"


def _mean_at(records: Records, experiment: Experiment, arm: str, pattern: str, metric: str) -> str:
    values = finite(figures_by_seed(records, experiment, arm, pattern, metric))
    return mean_cell(values, experiment.metric, None)


# ------------------------------------------------------------------------------------------- experiments


def _experiment(
    records: Records, experiment: Experiment, comparisons: Sequence[Comparison], plan: SearchPlan
) -> list[str]:
    sample = next(r for r in records.values() if r["experiment"] == experiment.name and r["arm"] != "dense")
    dense = finite(figures_by_seed(records, experiment, "dense"))
    data = ", ".join(f"{key}: {value}" for key, value in sample["data"].items() if key != "sha256")
    lines = [
        f"## {experiment.name}: `{experiment.recipe}`",
        "",
        f"{data}. {len(sample['scheme'])} searched weights of {sum(sample['sizes'].values()):,} entries, "
        f"{sample['steps']} optimizer steps of fine-tuning, λ = {sample['lambda_w']:g}, "
        f"{len(experiment.seeds)} seeds planned. The dense models have a test {experiment.metric} of "
        f"{mean_cell(dense, experiment.metric, plan.alpha)}.",
        "",
        f"![{experiment.name}](images/search_study_{experiment.name}.png)",
    ]
    for metric in experiment.budgets:
        lines += ["", *_main_table(records, experiment, metric, comparisons, plan)]
    lines += ["", *_cost_table(records, experiment)]
    for metric, patterns in experiment.budgets.items():
        lines += ["", *_layer_table(records, experiment, patterns[-1], metric)]
    return lines


def _main_table(
    records: Records,
    experiment: Experiment,
    metric: str,
    comparisons: Sequence[Comparison],
    plan: SearchPlan,
) -> list[str]:
    """The metric by budget and way, with both comparisons."""
    equal = what_is_equal(records, experiment, metric)
    lines = [
        f"**At equal {equal}**: test {experiment.metric} (mean ± half width of the "
        f"{100 * (1 - plan.alpha):g} % interval), what is kept of the searched weights and of their MACs "
        "(mean), and the paired differences [interval] with p-values after Holm's correction.",
        "",
        f"| budget | way | seeds | {experiment.metric} | weights | MACs | minus uniform | p (Holm) "
        "| minus DominoSearch | p (Holm) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(c.case, c.arm, c.against): c for c in comparisons if c.experiment == experiment.name}
    for pattern in cases_of(experiment.budgets[metric]):
        for arm in experiment.arms:
            values = finite(figures_by_seed(records, experiment, arm, pattern, metric))
            if not values:
                continue
            shares = ["", ""] if pattern == ALL else _shares(records, experiment, arm, pattern, metric)
            cells = []
            for against in EXPECTED:
                c = found.get((case_of(pattern, metric), arm, against))
                cells += (
                    ["", ""]
                    if c is None
                    else [_difference(c), "" if c.corrected is None else p_cell(c.corrected)]
                )
            mean = mean_cell(values, experiment.metric, plan.alpha)
            lines.append(row(pattern, LABELS[arm], str(len(values)), mean, *shares, *cells))
    return lines


def _difference(c: Comparison) -> str:
    if c.paired is None:
        return f"{c.diverged} of {c.pairs} diverged" if c.diverged else ""
    return difference(c) + (f" ({c.diverged} diverged)" if c.diverged else "")


def _shares(records: Records, experiment: Experiment, arm: str, pattern: str, metric: str) -> list[str]:
    runs = _runs(records, experiment, arm, pattern, metric)
    return [f"{100 * statistics.fmean(r['shares'][name] for r in runs):.2f} %" for name in ("params", "macs")]


def _cost_table(records: Records, experiment: Experiment) -> list[str]:
    lines = [
        "Cost of a search, one thread: training steps, processor time and wall time (medians; others used "
        "the machine as well), processor time in parts of DominoSearch's and of the fine-tuning's, and how "
        "often the scheme is the very one of DominoSearch.",
        "",
        "| way | searches | steps | processor time | most | wall time | of DominoSearch | of tuning "
        "| same scheme |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    tune = statistics.median(
        r["cpu_seconds"]
        for r in records.values()
        if r["experiment"] == experiment.name and r["arm"] != "dense"
    )
    domino = search_seconds(records, experiment, "domino")
    for arm in experiment.arms:
        seconds = search_seconds(records, experiment, arm)
        if arm == "uniform" or not seconds:
            continue
        middle = statistics.median(seconds)
        lines.append(
            row(
                LABELS[arm],
                str(len(seconds)),
                f"{statistics.median(search_seconds(records, experiment, arm, 'steps')):.0f}",
                _seconds(middle),
                _seconds(max(seconds)),
                _seconds(statistics.median(search_seconds(records, experiment, arm, "seconds"))),
                f"{middle / statistics.median(domino):.2g}" if domino else "",
                f"{middle / tune:.2g}",
                "" if arm == "domino" else _same_scheme(records, experiment, arm),
            )
        )
    return lines


def _layer_table(records: Records, experiment: Experiment, pattern: str, metric: str) -> list[str]:
    """What each layer keeps, by way, at one budget."""
    table = kept_by_layer(records, experiment, pattern, metric)
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    if not names:
        return []
    sizes = next(
        r["sizes"] for r in records.values() if r["experiment"] == experiment.name and r["arm"] != "dense"
    )
    lines = [
        f"What layers keep of {experiment.m} at {case_of(pattern, metric)}: geometric means over the seeds.",
        "",
        "| weight | entries | " + " | ".join(LABELS[arm] for arm in table) + " |",
        "|---|---:|" + "---:|" * len(table),
    ]
    for name in names:
        lines.append(row(name, f"{sizes[name]:,}", *(f"{column[name]:.3g}" for column in table.values())))
    return lines


def _runs(records: Records, experiment: Experiment, arm: str, pattern: str, metric: str) -> list[Record]:
    keys = [job_of(experiment, arm, seed, pattern, metric).key for seed in experiment.seeds]
    return [records[key] for key in keys if key in records]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def _same_scheme(records: Records, experiment: Experiment, arm: str) -> str:
    """In how many searches a way came to the very scheme of DominoSearch."""
    same, both = 0, 0
    for metric, patterns in experiment.budgets.items():
        for pattern in patterns:
            for seed in experiment.seeds:
                ours, theirs = (
                    records.get(job_of(experiment, way, seed, pattern, metric).key) for way in (arm, "domino")
                )
                if ours and theirs:
                    both += 1
                    same += ours["scheme"] == theirs["scheme"]
    return f"{same} of {both}"
