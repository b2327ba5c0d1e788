"""How the pages write numbers: rows, means, differences, p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nmsparse_ext.recipes.study.comparison import Comparison
from nmsparse_ext.recipes.study.statistics import mean_interval


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def mean_cell(values: Sequence[float], figure: str, alpha: float | None) -> str:
    """A mean, with half the width of its interval unless `alpha` is ``None``."""
    if not values:
        return ""
    mean, half = mean_interval(values, alpha or 0.05)
    scale, digits, unit = units(figure)
    spread = f" ± {scale * half:.{digits}f}" if alpha is not None and len(values) > 1 else ""
    return f"{scale * mean:.{digits}f}{spread}{unit}"


def units(figure: str) -> tuple[float, int, str]:
    """Factor, digits and unit that a figure is written with."""
    return {"accuracy": (100.0, 2, " %"), "loss": (1.0, 4, ""), "sad": (100.0, 3, " %")}[figure]


def difference(c: Comparison) -> str:
    """The mean difference with its interval."""
    if c.paired is None:
        return "-"
    scale, digits, _ = units(c.figure)
    low, high = scale * c.paired.low, scale * c.paired.high
    return f"{scale * c.paired.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def tested_cells(c: Comparison) -> list[str]:
    """Difference, its size in standard deviations, and the p-values: t, sign flips, Holm."""
    if c.paired is None or c.corrected is None:
        return [f"{c.diverged} of {c.pairs} diverged" if c.diverged else "", "", "", "", ""]
    note = f" ({c.diverged} diverged)" if c.diverged else ""
    return [
        difference(c) + note,
        f"{c.paired.effect:+.1f}",
        p_cell(c.paired.p),
        p_cell(c.paired.p_signs),
        p_cell(c.corrected),
    ]


def p_cell(value: float) -> str:
    """A p-value."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def finite(values: Mapping[int, float | None]) -> list[float]:
    """The figures of the runs that did not diverge."""
    return [value for value in values.values() if value is not None]
