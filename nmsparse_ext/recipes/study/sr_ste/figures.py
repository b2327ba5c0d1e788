"""Plots of the study: the metric by pattern, SAD over the run, and the sweep over lambda."""

from __future__ import annotations

import statistics
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from nmsparse_ext.recipes.study.cells import units
from nmsparse_ext.recipes.study.plan import Records
from nmsparse_ext.recipes.study.plots import AXIS, draw_seeds, legend_below, spread
from nmsparse_ext.recipes.study.sr_ste.comparisons import LABELS, figures_by_seed
from nmsparse_ext.recipes.study.sr_ste.plan import Experiment
from nmsparse_ext.recipes.study.statistics import mean_interval
from nmsparse_ext.report import COLOURS, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {**COLOURS, "sr-ste-decoupled": "#3b6fd4", "sweep": "#3b6fd4"}


def save_figure(experiment: Experiment, records: Records, path: Path, alpha: float) -> Path:
    """Draw one experiment as a PNG of three panels."""
    import matplotlib
    from matplotlib.figure import Figure

    from nmsparse_ext.report import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 5), layout="constrained")
        spread(figure)
        left, middle, right = figure.subplots(1, 3)
        draw_metric(left, experiment, records, alpha)
        draw_sad(middle, experiment, records)
        draw_sweep(right, experiment, records, alpha)
        return save_png(figure, path)


def draw_metric(axes: Axes, experiment: Experiment, records: Records, alpha: float) -> None:
    """The metric by pattern: every seed a dot, the mean with its interval beside them."""
    arms = ("dense", "ste", *experiment.arms)
    for i, pattern in enumerate(experiment.patterns):
        for j, arm in enumerate(arms):
            values = _values(records, experiment, arm, pattern)
            x, label = i + 0.2 * (j - (len(arms) - 1) / 2), LABELS[arm] if i == 0 else None
            draw_seeds(axes, x, values, experiment.metric, alpha, color=SHADES[arm], label=label)
    axes.set_xticks(range(len(experiment.patterns)), experiment.patterns)
    axes.set_ylabel(AXIS[experiment.metric])
    axes.set_xlabel("pattern")
    axes.set_title("Seeds, means, intervals")
    legend_below(axes)


def draw_sad(axes: Axes, experiment: Experiment, records: Records) -> None:
    """SAD over the run at the pattern of the sweep: means over the seeds, epoch by epoch."""
    from matplotlib.ticker import MaxNLocator

    pattern = experiment.sweep_pattern
    arms, broken = ("ste", *experiment.arms, "sweep"), cycle(("--", ":", "-."))
    for arm in arms:
        curves: dict[float | None, list[list[float]]] = {}
        for record in records.values():
            if (record["experiment"], record["stage"], record["arm"]) == (experiment.name, "main", arm) and (
                record["pattern"] == pattern
            ):
                curves.setdefault(record["lambda_w"] if arm == "sweep" else None, []).append(record["sad"])
        for lambda_w, runs in curves.items():
            if lambda_w is not None and lambda_w >= 0:
                continue
            mean = [100 * statistics.fmean(column) for column in zip(*runs, strict=True)]
            label = LABELS[arm] if lambda_w is None else f"λ = {lambda_w:g}"
            dashes = "-" if lambda_w is None else next(broken)
            shade = "#a63a8b" if lambda_w is not None else SHADES[arm]
            axes.plot(range(1, len(mean) + 1), mean, dashes, color=shade, label=label, linewidth=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("weights that change sides per step (%)")
    axes.set_title(f"SAD at {pattern}")
    legend_below(axes)


def draw_sweep(axes: Axes, experiment: Experiment, records: Records, alpha: float) -> None:
    """The metric over lambda at the pattern of the sweep; STE is lambda 0."""
    pattern, scale = experiment.sweep_pattern, units(experiment.metric)[0]
    points: dict[float, dict[int, float]] = {}
    for record in records.values():
        if (record["experiment"], record["stage"], record["pattern"]) != (experiment.name, "main", pattern):
            continue
        value = record["test"][experiment.metric]
        if record["arm"] in ("ste", "sr-ste", "sweep") and value is not None:
            points.setdefault(record["lambda_w"], {})[record["seed"]] = value
    lambdas = sorted(points)
    for place, lambda_w in enumerate(lambdas):
        mean, half = mean_interval(list(points[lambda_w].values()), alpha)
        axes.errorbar(place, scale * mean, scale * half, fmt="o", ms=6, capsize=3,
                      color=COLOURS["ste"] if lambda_w == 0 else COLOURS["sr-ste"])  # fmt: skip
    axes.set_xticks(range(len(lambdas)), [f"{value:g}" if value else "0 (STE)" for value in lambdas])
    axes.set_xlabel("λ (gradient penalty)")
    axes.set_ylabel(AXIS[experiment.metric])
    axes.set_title(f"λ at {pattern}")


def _values(records: Records, experiment: Experiment, arm: str, pattern: str) -> list[float]:
    found = figures_by_seed(records, experiment, arm, pattern, experiment.metric)
    return [value for value in found.values() if value is not None]
