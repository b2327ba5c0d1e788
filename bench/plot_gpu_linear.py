"""Draws the crossovers that bench_gpu_linear.py has measured: speed-up over cuBLAS by tokens, a line a way.

python bench/plot_gpu_linear.py RESULT.json PICTURE.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

COLUMNS = 3


def panels(result: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows of each layer, dtype and pattern that was measured for several numbers of tokens."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = f"{row['group']} {row['layer']} {row['weight']}"
        grouped.setdefault((name, row["dtype"], row["pattern"]), []).append(row)
    return {key: rows for key, rows in grouped.items() if len(rows) > 1}


def draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One layer: every way's speed-up, and what the roofline allows."""
    rows = sorted(rows, key=lambda row: int(row["tokens"]))
    for way in dict.fromkeys(way for row in rows for way in row["ways"]):
        points = {int(row["tokens"]): row["ways"][way] for row in rows if way in row["ways"]}
        wide = 2.2 if way == "ours" else 1.2
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, linewidth=wide, label=way)
    bounds = {int(row["tokens"]): row["bound"] for row in rows if row["bound"] is not None}
    if bounds:
        axes.plot(list(bounds), list(bounds.values()), color="gray", linestyle=":", label="roofline")
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=4)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)


def draw(result: dict[str, Any], picture: Path) -> None:
    """A panel for each layer."""
    found = panels(result)
    columns = min(COLUMNS, max(len(found), 1))
    lines = -(-max(len(found), 1) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False)
    flat = [axes for line in grid for axes in line]
    for axes, ((name, dtype, pattern), rows) in zip(flat, found.items(), strict=False):
        draw_panel(axes, rows)
        axes.set_title(f"{name}, {dtype} {pattern}", fontsize=9)
        axes.legend(fontsize=7)
    for axes in flat[len(found) :]:
        axes.set_visible(False)
    machine = result["machine"]
    figure.suptitle(f"times as fast as cuBLAS by tokens: {machine['processor']}, torch {machine['torch']}")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Draws the picture of a result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args(argv)
    draw(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
