"""Pictures and an HTML page from the result of ``nmsparse demo``.

Everything here works on the plain dictionary that the demo writes to ``result.json`` (see
:func:`nmsparse_ext.recipes.demo.run_demo`), so a page can be made again from the file. The page holds its
figures as inline SVG and refers to nothing outside itself.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._atomic import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

LABELS = {"dense": "dense", "ste": "2:4, STE", "sr-ste": "2:4, SR-STE"}
# Readable on white and on near-black, and told apart by the colour-blind (grey, vermilion, bluish green).
COLOURS = {"dense": "#7c8798", "ste": "#e0662b", "sr-ste": "#0d9a7e"}
PACKED, DENSE = "#0d9a7e", "#7c8798"
# Text and grid of the inline SVGs follow the page's light or dark theme: these two colours are replaced by
# CSS.
INK, GRID = "#1f2a37", "#d9dee6"

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",  # letters as outlines: the same on every machine
}


# ------------------------------------------------------------------------------------------------- numbers


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def runs_of(result: Result, method: str) -> list[dict]:
    """The training runs of one method, in order of their seeds."""
    return [run for run in result["runs"] if run["method"] == method]


def methods_of(result: Result) -> list[str]:
    """The methods that were trained, in the order they ran."""
    return list(dict.fromkeys(run["method"] for run in result["runs"]))


def tail_sad(run: dict) -> float:
    """Mean SAD per step over the last tenth of a run: a number of weights."""
    return statistics.fmean(run["sad"][-max(1, len(run["sad"]) // 10) :])


def method_rows(result: Result) -> list[dict]:
    """One row a method for the tables: final accuracy with its spread over the seeds, SAD, seconds."""
    rows = []
    for method in methods_of(result):
        runs = runs_of(result, method)
        final = [run["accuracy"][-1] for run in runs]
        mean, spread = mean_and_spread(final)
        rows.append(
            {
                "method": method,
                "label": LABELS[method],
                "seeds": len(runs),
                "accuracy": mean,
                "spread": spread,
                "lowest": min(final),
                "highest": max(final),
                "sad_total": statistics.fmean([sum(run["sad"]) / run["prunable"] for run in runs]),
                "sad_tail": statistics.fmean([tail_sad(run) for run in runs]),
                "seconds": statistics.fmean([run["seconds"] for run in runs]),
            }
        )
    return rows


def percent(share: float, digits: int = 1) -> str:
    """0.984 -> "98.4 %", with a space that no line breaks at."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def byte_size(count: float) -> str:
    """Bytes in the unit a reader would choose: "812 B", "59.3 kB", "1.2 MB" (powers of 1000)."""
    if count < 1000:
        return f"{count:.0f} B"
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1_000_000:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose: "85 µs", "1.32 ms", "2.1 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def ratio_text(baseline: dict, candidate: dict) -> str:
    """How one timing compares with another, in words: "2.4x faster", "1.3x slower", "as fast"."""
    ratio = baseline["median"] / candidate["median"]
    # Overlapping middle halves cannot be told apart in a handful of rounds, whatever the medians say.
    if baseline["low"] <= candidate["high"] and candidate["low"] <= baseline["high"]:
        return "no clear difference"
    if ratio >= 1:
        return f"{_factor(ratio)} faster"
    return f"{_factor(1 / ratio)} slower"


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 1.1 else f"{ratio:.2f}x"


# ------------------------------------------------------------------------------------------------- figures


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: that keeps global state and looks for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the `window` values around each (fewer at the ends)."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw_accuracy(axes: Axes, result: Result) -> None:
    """Test accuracy over epochs: the mean of the seeds as a line, lowest to highest as a band."""
    from matplotlib.ticker import MaxNLocator

    floor = 1.0
    for method in methods_of(result):
        curves = [run["accuracy"] for run in runs_of(result, method)]
        epochs = range(1, len(curves[0]) + 1)
        columns = list(zip(*curves, strict=True))
        means = [100 * statistics.fmean(column) for column in columns]
        axes.plot(epochs, means, color=COLOURS[method], linewidth=2.2, label=LABELS[method])
        if len(curves) > 1:
            low = [100 * min(column) for column in columns]
            high = [100 * max(column) for column in columns]
            axes.fill_between(epochs, low, high, color=COLOURS[method], alpha=0.16, linewidth=0)
        floor = min(floor, *(min(column) for column in columns[len(columns) // 4 :]))
    # The first epochs are far below the rest and would squeeze everything of interest into a line.
    axes.set_ylim(max(0.0, 100 * floor - 1.0), 100.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Test accuracy")
    axes.set_xlabel("epoch")
    axes.set_ylabel("correct (%)")
    axes.legend(loc="lower right")


def draw_sad(axes: Axes, result: Result) -> None:
    """SAD over optimizer steps, as a share of the weights: every step faint, running mean on top."""
    prunable = result["runs"][0]["prunable"]
    for method in methods_of(result):
        flips = zip(*(run["sad"] for run in runs_of(result, method)), strict=True)
        rates = [100 * statistics.fmean(step) / prunable for step in flips]
        steps = range(1, len(rates) + 1)
        smooth = _smooth(rates, max(3, len(rates) // 20))
        axes.plot(steps, rates, color=COLOURS[method], linewidth=0.7, alpha=0.35)
        axes.plot(steps, smooth, color=COLOURS[method], linewidth=2.2, label=LABELS[method])
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom=100 / prunable)  # one weight; below it there is only the average of zeros and ones
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("SAD: mask changes from step to step")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("weights that change sides (%)")
    axes.legend(loc="lower left")


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    *,
    spans: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Horizontal bars from top to bottom, each with its name above it and its value behind it."""
    positions = [-i for i in range(len(names))]
    axes.barh(positions, values, color=colours, height=0.42)
    ends = list(values)
    if spans is not None:
        below = [value - low for value, (low, _) in zip(values, spans, strict=True)]
        above = [high - value for value, (_, high) in zip(values, spans, strict=True)]
        axes.errorbar(
            values, positions, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5
        )
        ends = [high for _, high in spans]
    for position, end, name, text in zip(positions, ends, names, texts, strict=True):
        axes.annotate(
            text, (end, position), xytext=(7, 0), textcoords="offset points", va="center", weight="bold"
        )
        axes.annotate(name, (0, position + 0.25), xytext=(1, 2), textcoords="offset points", va="bottom")
    axes.set_yticks([])
    axes.set_ylim(-len(names) + 0.62, 0.72)
    axes.set_xlim(0, max(ends) * 1.45)
    axes.grid(visible=False)  # the values are written on the bars
    axes.spines["left"].set_visible(False)


def draw_bytes(axes: Axes, result: Result) -> None:
    """Size of the sparse layers and of the whole file, dense and packed."""
    sizes = result["bytes"]
    pairs = [
        ("weights of the sparse layers, dense", sizes["layers_dense"], DENSE),
        ("the same, packed", sizes["layers_packed"], PACKED),
        ("model file, dense", sizes["file_dense"], DENSE),
        ("model file, packed", sizes["file_packed"], PACKED),
    ]
    texts = []
    for i, (_, count, _) in enumerate(pairs):
        share = "" if i % 2 == 0 else f"  ({count / pairs[i - 1][1]:.2f}x)"
        texts.append(byte_size(count) + share)
    _bars(axes, [p[0] for p in pairs], [p[1] / 1e6 for p in pairs], texts, [p[2] for p in pairs])
    axes.set_title("Bytes, in memory and on disk")
    axes.set_xlabel("size (MB)")


def draw_timing(axes: Axes, group: dict) -> None:
    """One group of side-by-side timings: medians as bars, the middle half of the rounds as whiskers."""
    entries = group["entries"]
    scale, unit = (1e3, "ms") if max(entry["median"] for entry in entries) >= 1e-3 else (1e6, "µs")
    baseline = entries[0]
    texts = [duration(baseline["median"])]
    texts += [f"{duration(entry['median'])}  ({ratio_text(baseline, entry)})" for entry in entries[1:]]
    _bars(
        axes,
        [entry["name"] for entry in entries],
        [entry["median"] * scale for entry in entries],
        texts,
        [DENSE if i == 0 else PACKED for i in range(len(entries))],
        spans=[(entry["low"] * scale, entry["high"] * scale) for entry in entries],
    )
    axes.set_xlim(right=1.65 * max(entry["high"] for entry in entries) * scale)  # room for the ratio in words
    axes.set_title(group["title"])
    axes.set_xlabel(f"time per call ({unit})")


def overview(result: Result) -> Figure:
    """The whole demo as one picture: accuracy, SAD, bytes, and the time of the mask selection."""
    settings, machine = result["settings"], result["machine"]
    figure = _figure(12.5, 8.4)
    grid = figure.subplots(2, 2, gridspec_kw={"height_ratios": [1.3, 1]})
    draw_accuracy(grid[0][0], result)
    draw_sad(grid[0][1], result)
    draw_bytes(grid[1][0], result)
    draw_timing(grid[1][1], result["selection"])
    figure.set_layout_engine("constrained", w_pad=0.2, h_pad=0.16, wspace=0.03, rect=(0, 0.045, 1, 0.955))
    seeds = len(settings["seeds"])
    figure.text(
        0.017,
        0.018,
        f"A residual network ({settings['parameters']:,} parameters) on scikit-learn's digits, "
        f"{seeds} seed{'' if seeds == 1 else 's'} (bands: lowest to highest). "
        f"{machine['processor']}, {machine['engine']}, {machine['threads']} thread(s), "
        f"PyTorch {machine['torch']}, {machine['date'][:10]}.",
        fontsize=10,
        alpha=0.75,
    )
    return figure


def save_picture(result: Result, path: str | Path) -> Path:
    """Write :func:`overview` as a PNG on white."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return save_png(overview(result), path)


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG on white, small enough for a repository."""
    from PIL import Image  # matplotlib writes its PNGs with it

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, facecolor="white")
    # A palette holds these few colours and their shades, and takes a third of the bytes.
    small = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        small.save(file, format="png", optimize=True)
    return Path(path)


# ---------------------------------------------------------------------------------------------------- page


def _svg(draw: Callable[[Axes], None], name: str, width: float, height: float) -> str:
    """Draw one figure as inline SVG that takes its text and grid colours from the page."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(width, height)
        draw(figure.subplots())
        return inline_svg(figure, name)


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as SVG to stand in a page; it takes its text and grid colours from there.

    Args:
        figure: The figure, drawn in `STYLE`.
        name: Goes before every id in it; another one for each figure of a page.
    """
    import matplotlib

    # hashsalt: ids inside the SVG, which must differ between the figures of a page and not change between
    # runs.
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # A width in points would not shrink with the window; the viewBox keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # matplotlib numbers its groups the same way in every figure; on one page ids must be unique.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)


def figures(result: Result) -> dict[str, str]:
    """Name -> inline SVG of every figure on the page."""
    drawn = {
        "accuracy": _svg(lambda axes: draw_accuracy(axes, result), "accuracy", 6.4, 4.2),
        "sad": _svg(lambda axes: draw_sad(axes, result), "sad", 6.4, 4.2),
        "bytes": _svg(lambda axes: draw_bytes(axes, result), "bytes", 6.4, 3.5),
        "selection": _svg(lambda axes: draw_timing(axes, result["selection"]), "selection", 6.4, 3.5),
    }
    for i, group in enumerate(result["forward"]):
        drawn[f"forward{i}"] = _svg(partial(draw_timing, group=group), f"forward{i}", 6.4, 2.5)
    return drawn


def page_environment() -> Environment:
    """Jinja with this package's templates and the filters that its pages use."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nmsparse_ext", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        percent=percent, byte_size=byte_size, duration=duration, count=lambda value: f"{value:,}"
    )
    return environment


def render_html(result: Result) -> str:
    """The report as one self-contained HTML page."""
    from jinja2.utils import markupsafe

    environment = page_environment()
    environment.globals.update(ratio_text=ratio_text)
    svgs = {name: markupsafe.Markup(svg) for name, svg in figures(result).items()}
    rows = method_rows(result)
    return environment.get_template("report_template.html").render(
        result=result,
        figures=svgs,
        rows=rows,
        by_method={row["method"]: row for row in rows},
        all_hold=all(layer["violation"] is None for layer in result["layers"]),
        slower=[
            g for g in result["forward"] if any(_is_slower(g["entries"][0], e) for e in g["entries"][1:])
        ],
    )


def _is_slower(baseline: dict, candidate: dict) -> bool:
    return ratio_text(baseline, candidate).endswith("slower")


def write_report(result: Result, folder: str | Path) -> dict[str, Path]:
    """Write ``report.html`` and ``overview.png`` into an existing folder.

    Args:
        result: The demo's result as a dictionary (the content of ``result.json``).
        folder: Where to write.

    Returns:
        {"report": path of the page, "picture": path of the PNG}.
    """
    folder = Path(folder)
    page = folder / "report.html"
    page.write_text(render_html(result), encoding="utf-8")
    return {"report": page, "picture": save_picture(result, folder / "overview.png")}
