"""Draws docs/images/linear_cpu.png from the result of bench_linear.py: speed-up by batch, one line a pattern.

python bench/plot_linear.py
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

from nmsparse_ext import Pattern

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "linear_cpu.json"
PICTURE = ROOT / "docs" / "images" / "linear_cpu.png"
BASELINES = {"F": "F.linear", "D": "the best dense"}


def draw_panel(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """Speed-up over one baseline, for the rows of one dtype and weight."""
    batches = sorted({row["batch"] for row in rows})
    for pattern in sorted({row["pattern"] for row in rows}, key=lambda p: (-Pattern.parse(p).density, p)):
        points = {row["batch"]: row[key]["ratio"] for row in rows if row["pattern"] == pattern}
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=pattern)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=4)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_xticks(batches)
    axes.minorticks_off()  # batches are these and no others
    axes.grid(alpha=0.3)


def draw(result: dict[str, Any], weight: str, picture: Path) -> None:
    """One column a dtype, one row a baseline."""
    rows = [row for row in result["rows"] if row["weight"] == weight]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, grid = plt.subplots(
        len(BASELINES),
        len(dtypes),
        figsize=(4.2 * len(dtypes), 6.4),
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, dtype in enumerate(dtypes):
        for line, (key, name) in enumerate(BASELINES.items()):
            axes = grid[line][column]
            draw_panel(axes, [row for row in rows if row["dtype"] == dtype], key)
            if column == 0:
                axes.set_ylabel(f"times as fast as {name}")
        grid[0][column].set_title(f"{dtype}, {weight}")
        grid[-1][column].set_xlabel("batch (rows of x)")
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncol=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Chart of the packed linear layer's speed-ups.")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--weight", default="4096x4096")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    draw(json.loads(options.result.read_text(encoding="utf-8")), options.weight, options.picture)
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
