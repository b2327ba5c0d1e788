"""A picture of a scheme: each layer's pattern, and its share of parameters and MACs, dense and kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .deploy.summary import Summary, summary
from .pattern import Pattern
from .report import DENSE, INK, PACKED, STYLE, save_png
from .scheme import Scheme
from .weights import prunable_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .deploy.example import ExampleInput


def save_chart(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str],
    path: str | os.PathLike[str],
    example_input: ExampleInput | None = None,
) -> Path:
    """Writes the picture of the prunable weights, those that searches count, as a PNG; see `draw_chart`."""
    searchable = {weight.name for weight in prunable_weights(model)}
    rows = (row for row in summary(model, scheme, example_input) if row.name in searchable or row.pattern)
    return save_summary_chart(Summary(tuple(rows)), path)


def save_summary_chart(rows: Summary, path: str | os.PathLike[str]) -> Path:
    """Writes the picture of a summary as a PNG; see `draw_chart`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return save_png(draw_chart(rows), os.fspath(path))


def draw_chart(rows: Summary) -> Figure:
    """Draws a summary: one line a weight, from the model's input at the top to its output.

    The bars show which part of a weight is kept, with its pattern, and how much of all parameters, and of all
    MACs if these are known, it has: dense as the whole bar, kept as the dark part.
    """
    from matplotlib.figure import Figure

    counted = [row for row in rows if row.params]
    columns: list[tuple[str, list[int], list[int]]] = [
        ("parameters", [row.params for row in counted], [row.kept for row in counted])
    ]
    if any(row.macs for row in counted):
        macs = [row.macs or 0 for row in counted], [row.kept_macs or 0 for row in counted]
        columns.append(("MACs", *macs))
    height = 1.2 + 0.19 * max(4, len(counted))
    figure = Figure(figsize=(4.5 + 3.2 * len(columns), height), layout="constrained")
    axes = figure.subplots(1, 1 + len(columns), sharey=True, squeeze=False)[0]
    places = range(len(counted))
    density = [100 * row.kept / row.params for row in counted]
    colours = [DENSE if row.pattern is None else PACKED for row in counted]
    axes[0].barh(places, density, color=colours, height=0.72)
    for place, row in zip(places, counted, strict=True):
        text = row.pattern or "dense"
        axes[0].text(density[place] + 2, place, text, va="center", fontsize=8, color=INK)
    axes[0].set_xlim(0, 125)
    axes[0].set_xticks([0, 50, 100])
    axes[0].set_yticks(places, [row.name.removesuffix(".weight") for row in counted], fontsize=8)
    axes[0].set_ylim(len(counted) - 0.4, -0.6)
    axes[0].set_title("kept")
    axes[0].set_xlabel("part of the weight (%)")
    for axis, (title, dense, kept) in zip(axes[1:], columns, strict=True):
        _shares(axis, title, dense, kept)
    for axis in axes:
        axis.grid(visible=False, axis="y")  # it would strike the patterns through
        axis.set_axisbelow(True)
    return figure


def _shares(axes: Axes, title: str, dense: list[int], kept: list[int]) -> None:
    whole = sum(dense) or 1
    places = range(len(dense))
    axes.barh(places, [100 * value / whole for value in dense], color=DENSE, alpha=0.35, height=0.72)
    axes.barh(places, [100 * value / whole for value in kept], color=PACKED, height=0.72)
    axes.set_title(f"{title}: {sum(kept) / whole:.1%} left")
    axes.set_xlabel(f"share of all {title} (%)")
    axes.tick_params(axis="y", length=0)
