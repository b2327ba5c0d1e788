"""Plots of the study of searches: what is gained over uniform, at which cost, and the schemes."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import nmsparse_ext as nms
from nmsparse_ext.recipes.study.cells import units
from nmsparse_ext.recipes.study.plan import Records
from nmsparse_ext.recipes.study.plots import draw_seeds, spread
from nmsparse_ext.recipes.study.search.comparisons import LABELS, cases_of, figures_by_seed, job_of
from nmsparse_ext.recipes.study.search.plan import Experiment
from nmsparse_ext.recipes.study.statistics import mean_interval
from nmsparse_ext.report import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {
    "uniform": "#7c8798",
    "erk": "#e0662b",
    "domino": "#a63a8b",
    "magnitude": "#3b6fd4",
    "taylor": "#0d9a7e",
    "output": "#c29a12",
    "refined": "#5b3fa8",
}
COUNTED = {"params": "weights", "macs": "MACs"}
AXIS = {"accuracy": "accuracy minus uniform's (points)", "loss": "loss minus uniform's (nats per token)"}


def save_figure(experiment: Experiment, records: Records, path: Path, alpha: float) -> Path:
    """Draw one experiment as a PNG: a panel for each kind of budget, then cost, then schemes."""
    import matplotlib
    from matplotlib.figure import Figure

    from nmsparse_ext.report import STYLE

    with matplotlib.rc_context(STYLE):
        budgets = list(experiment.budgets)
        figure = Figure(figsize=(15, 9.6 if len(budgets) > 1 else 8.2), layout="constrained")
        spread(figure)
        grid = figure.add_gridspec(2, 2)
        if len(budgets) > 1:
            panels = [figure.add_subplot(grid[0, i]) for i in range(2)]
        else:
            panels = [figure.add_subplot(grid[0, :])]
        for axes, metric in zip(panels, budgets, strict=True):
            draw_gain(axes, experiment, records, metric, alpha)
        draw_cost(figure.add_subplot(grid[1, 0]), experiment, records, budgets[0], alpha)
        draw_schemes(figure.add_subplot(grid[1, 1]), experiment, records, budgets[0])
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:  # one for all panels, where it hides nothing
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        return save_png(figure, path)


def gains(records: Records, experiment: Experiment, arm: str, pattern: str, metric: str) -> list[float]:
    """Paired differences from uniform, a seed each."""
    ours = figures_by_seed(records, experiment, arm, pattern, metric)
    base = figures_by_seed(records, experiment, "uniform", pattern, metric)
    pairs = [(ours[seed], base.get(seed)) for seed in ours]
    return [a - b for a, b in pairs if a is not None and b is not None]


def draw_gain(axes: Axes, experiment: Experiment, records: Records, metric: str, alpha: float) -> None:
    """The difference from uniform by budget: every seed a dot, the mean with its interval."""
    arms = [arm for arm in experiment.arms if arm != "uniform"]
    patterns = experiment.budgets[metric]
    for i, pattern in enumerate(patterns):
        for j, arm in enumerate(arms):
            x = i + 0.13 * (j - (len(arms) - 1) / 2)
            draw_seeds(axes, x, gains(records, experiment, arm, pattern, metric), experiment.metric, alpha,
                       color=SHADES[arm], label=LABELS[arm] if i == 0 else None)  # fmt: skip
    axes.axhline(0, color=SHADES["uniform"], linewidth=1)
    axes.set_xticks(range(len(patterns)), patterns)
    what = COUNTED[metric]
    axes.set_xlabel(f"budget: the {what} of this uniform pattern")
    axes.set_ylabel(AXIS[experiment.metric])
    axes.set_title(f"At equal {what}: paired differences, means, intervals")


def draw_cost(axes: Axes, experiment: Experiment, records: Records, metric: str, alpha: float) -> None:
    """Gain over uniform, mean of all budgets of a metric, against the time that the search takes."""
    scale = units(experiment.metric)[0]
    for arm in experiment.arms:
        seconds = search_seconds(records, experiment, arm)
        values = gains(records, experiment, arm, cases_of(experiment.budgets[metric])[-1], metric)
        if arm == "uniform" or not seconds or not values:
            continue
        mean, half = mean_interval(values, alpha)
        axes.errorbar(statistics.median(seconds), scale * mean, scale * half, fmt="o", ms=7, capsize=3,
                      color=SHADES[arm], label=LABELS[arm])  # fmt: skip
    axes.axhline(0, color=SHADES["uniform"], linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("processor time of the search (s, median)")
    axes.set_ylabel(AXIS[experiment.metric])
    axes.set_title(f"Gain and cost, mean over the budgets of {COUNTED[metric]}")


def draw_schemes(axes: Axes, experiment: Experiment, records: Records, metric: str) -> None:
    """What is kept of m by layer and arm at the smallest budget: geometric means over the seeds."""
    pattern = experiment.budgets[metric][-1]
    table = kept_by_layer(records, experiment, pattern, metric)
    layers = list(dict.fromkeys(name for column in table.values() for name in column))
    if not layers:
        return
    grid = [[math.log2(column[name]) for column in table.values()] for name in layers]
    most = math.log2(experiment.m)
    axes.imshow(grid, cmap="YlGnBu", aspect="auto", vmin=0, vmax=most)
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(j, i, f"{2**value:.3g}", ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 * most else "#1f2a37")  # fmt: skip
    axes.set_yticks(range(len(layers)), [name.removesuffix(".weight") for name in layers], fontsize=8)
    names = [LABELS[arm].replace(", ", ",\n").replace("then ", "then\n") for arm in table]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.grid(False)
    axes.set_title(f"n of {experiment.m} by layer at {pattern} {COUNTED[metric]} (geometric mean over seeds)")


def kept_by_layer(
    records: Records, experiment: Experiment, pattern: str, metric: str
) -> dict[str, dict[str, float]]:
    """``{arm: {weight: geometric mean of n over the seeds}}`` at one budget."""
    table: dict[str, dict[str, float]] = {}
    for arm in experiment.arms:
        found: dict[str, list[int]] = {}
        for seed in experiment.seeds:
            record = records.get(job_of(experiment, arm, seed, pattern, metric).key)
            for name, text in (record["scheme"] if record else {}).items():
                found.setdefault(name, []).append(nms.Pattern.parse(text).n)
        if found:
            table[arm] = {name: statistics.geometric_mean(values) for name, values in found.items()}
    return table


def search_seconds(
    records: Records, experiment: Experiment, arm: str, which: str = "cpu_seconds"
) -> list[float]:
    """Processor seconds (or another entry of "search") of all searches of an arm."""
    return [
        record["search"][which]
        for record in records.values()
        if (record["experiment"], record["arm"]) == (experiment.name, arm)
    ]
