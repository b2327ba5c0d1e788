"""What the studies' plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmsparse_ext.recipes.study.cells import units
from nmsparse_ext.recipes.study.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS = {"accuracy": "test accuracy (%)", "loss": "test loss (nats per token)"}


def spread(figure: Figure) -> None:
    """Leaves room between the panels of a figure with a constrained layout."""
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]


def legend_below(axes: Axes) -> None:
    """A legend below the axes, where it hides no data."""
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def draw_seeds(
    axes: Axes, x: float, values: Sequence[float], figure: str, alpha: float, *, color: str, label: str | None
) -> None:
    """Every seed a dot, and the mean with its interval beside them.

    Args:
        axes: Where to draw.
        x: Where along the x axis.
        values: One figure a seed, or differences of them.
        figure: Which figure; says what to scale by.
        alpha: One minus the interval's level.
        color: Colour of both.
        label: Entry of the legend; ``None`` for none.
    """
    if not values:
        return
    scale = units(figure)[0]
    mean, half = mean_interval(values, alpha)
    axes.plot([x - 0.04] * len(values), [scale * v for v in values], "o", ms=3, alpha=0.45, color=color)
    axes.errorbar(x + 0.03, scale * mean, scale * half, fmt="o", ms=6, capsize=3, color=color, label=label)
