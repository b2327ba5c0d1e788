"""The packed linear layer against dense ones: F.linear and the best there is with a prepacked weight.

    python bench/bench_linear.py                        # all parts, about ten minutes
    python bench/bench_linear.py --list                 # their names
    python bench/bench_linear.py --part float32-4096x4096 packing

Every part takes less than two minutes and puts its rows into the result files in place of those that it made
before, so a run can be made in pieces and gone on with.

For each layer and batch all candidates take turns in one process, one call each a round, so that a slow
moment of the machine hits all alike. Each has several copies of its weight, and takes another in every round:
large weights come from memory ("cold"), as they do when a model is larger than the caches. Small ones fit
into the caches with all their copies.

- F: how many times as fast as ``F.linear`` with the dense weight;
- D: how many times as fast as the best dense candidate: ``F.linear``, oneDNN and MKL with a weight that they
  packed beforehand (what an inductor-compiled and frozen model calls).

Ratios are of lower quartiles. A row says "lost" where the packed layer is slower than the best dense one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cpu_isa, machine, require_kernels
from linear_calls import Row, measure_gradient, measure_layer, measure_packing

RESULTS = Path(__file__).resolve().parent / "results"
GOAL_FILE, OTHER_FILE = "linear_cpu.json", "linear_other_cpu.json"
LARGE = ("4096x4096", "11008x4096")
SMALL = ("384x384", "1536x384", "768x768", "3072x768")
PATTERNS = ("2:4", "1:4", "2:8", "1:8", "1:16")
PACKING_PATTERNS = ("2:4", "1:4", "2:8", "1:8", "1:16", "1:2", "3:4", "4:8", "8:16", "6:8")
BATCHES = (1, 4, 16, 64, 256)
GRADIENT_PATTERNS, GRADIENT_BATCHES = ("2:4", "1:4", "1:8"), (1, 16, 64, 256)
LARGE_BATCHES = (512, 1024, 4096)
DTYPES = ("float32", "bfloat16")
# What limits the libraries behind F.linear to AVX2; they read it when they are loaded.
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

# (F, D) to reach at batch 1, 4, 16, 64, 256 with AVX-512, cold weights and 2 threads.
GOALS: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("float32", "2:4"): ((3.0, 1.80), (5.5, 1.3), (4.0, 1.45), (2.0, 1.33), (1.7, 1.33)),
    ("float32", "1:4"): ((5.5, 3.3), (10, 2.3), (5.2, 2.0), (3.6, 2.3), (3.1, 2.4)),
    ("float32", "2:8"): ((5.5, 3.3), (10, 2.3), (5.2, 2.0), (3.6, 2.3), (3.1, 2.4)),
    ("float32", "1:8"): ((10, 6.4), (17, 4.3), (9.3, 3.6), (7.0, 4.5), (6.2, 4.8)),
    ("float32", "1:16"): ((20, 12), (30, 7), (15, 6.2), (12, 7.4), (11, 8.2)),
    ("bfloat16", "2:4"): ((2.9, 1.55), (2.7, 1.65), (2.5, 1.7), (1.7, 1.4), (1.4, 1.33)),
    ("bfloat16", "1:4"): ((5.5, 3.0), (4.3, 2.2), (3.4, 2.2), (2.8, 2.35), (2.5, 2.45)),
    ("bfloat16", "2:8"): ((5.5, 3.0), (4.3, 2.2), (3.4, 2.2), (2.8, 2.35), (2.5, 2.45)),
    ("bfloat16", "1:8"): ((9.5, 6.0), (6.4, 5), (5.5, 4), (5.0, 4.3), (4.7, 4.7)),
    ("bfloat16", "1:16"): ((20, 8.5), (12, 6.0), (11, 6.8), (9.4, 7.7), (8.3, 7.9)),
}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: Per layer and batch.
        rounds: Exactly so many rounds instead of what fits into that time.
        tiny: Tiny layers in place of all others: only to see that everything runs.
    """

    seconds: float
    rounds: int | None
    tiny: bool

    def shape(self, text: str) -> tuple[int, int]:
        """``"4096x4096"`` as numbers."""
        out, inputs = (int(size) for size in text.split("x"))
        return (48, 64) if self.tiny else (out, inputs)


# A part: name, result file, key of its rows there, and what makes them.
Part = tuple[str, str, str, Callable[[Effort], list[Row]]]


def layers(
    kind: str, dtype: str, shapes: Sequence[str], batches: Sequence[int], patterns: Sequence[str] = PATTERNS
) -> Callable[[Effort], list[Row]]:
    """Rows of layers under the instruction set that is on."""

    def make(effort: Effort) -> list[Row]:
        rows = []
        for text in shapes:
            shape = effort.shape(text)
            sizes = [min(batch, 5) for batch in batches] if effort.tiny else batches
            new = measure_layer(dtype, shape, sizes, patterns, seconds=effort.seconds, rounds=effort.rounds)
            for row in new:
                row["goal"] = verdict(row)
            rows += [{"kind": kind, **row} if kind else row for row in new]
        return rows

    return make


def packing(effort: Effort) -> list[Row]:
    """How long panels take to make."""
    rows = []
    for dtype in (*DTYPES, "float16"):
        shape = effort.shape(LARGE[0])
        rows += measure_packing(
            dtype, shape, PACKING_PATTERNS, seconds=2 * effort.seconds, rounds=effort.rounds
        )
    return rows


def gradient(dtype: str) -> Callable[[Effort], list[Row]]:
    """The gradient of the input."""

    def make(effort: Effort) -> list[Row]:
        batches = (1, 5) if effort.tiny else GRADIENT_BATCHES
        shape = effort.shape(LARGE[0])
        return measure_gradient(
            dtype, shape, batches, GRADIENT_PATTERNS, seconds=effort.seconds, rounds=effort.rounds
        )

    return make


def avx2(kind: str) -> Callable[[Effort], list[Row]]:
    """Rows of our AVX2 kernels; F.linear is what the process was started with."""

    def make(effort: Effort) -> list[Row]:
        with cpu_isa("avx2"):
            return [row for d in DTYPES for row in layers(kind, d, LARGE[:1], BATCHES[:3])(effort)]

    return make


def avx2_limited(effort: Effort) -> list[Row]:
    """The same in a process whose F.linear, oneDNN and MKL know nothing beyond AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--part", "avx2-inner", "--results", folder]
        command += ["--seconds", str(effort.seconds)] + (["--dry-run"] if effort.tiny else [])
        command += ["--threads", str(torch.get_num_threads())]
        subprocess.run(command, check=True, env=os.environ | AVX2_ONLY, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / OTHER_FILE).read_text(encoding="utf-8"))["rows"]


def parts() -> list[Part]:
    """All that there is to measure."""
    goal = [
        (f"{d}-{shape}", GOAL_FILE, "rows", layers("", d, (shape,), BATCHES))
        for d in DTYPES
        for shape in LARGE
    ]
    small = [
        (f"small-{d}", OTHER_FILE, "rows", layers("small layer", d, SMALL, BATCHES, ("2:4", "1:4", "1:8")))
        for d in DTYPES
    ]
    batches = [
        (
            f"batch-{d}",
            OTHER_FILE,
            "rows",
            layers("large batch", d, LARGE[:1], LARGE_BATCHES, ("2:4", "1:4", "1:8")),
        )
        for d in DTYPES
    ]
    other: list[Part] = [
        ("avx2", OTHER_FILE, "rows", avx2("AVX2 kernels")),
        ("avx2-limited", OTHER_FILE, "rows", avx2_limited),
        ("packing", OTHER_FILE, "packing", packing),
        *((f"gradient-{d}", OTHER_FILE, "gradient", gradient(d)) for d in DTYPES),
    ]
    return [*goal, *small, *batches, *other]


# Not on the list: what avx2-limited runs in its own process.
INNER: Part = ("avx2-inner", OTHER_FILE, "rows", avx2("AVX2 kernels, dense limited to AVX2"))


def verdict(row: Row) -> str:
    """Whether it lost against dense, else whether the goal is reached, where there is one."""
    f, d = row["F"]["ratio"], row["D"]["ratio"]
    if d < 1:
        return "lost"
    goals = GOALS.get((row["dtype"], row["pattern"]))
    if goals is None or row["batch"] not in BATCHES or row["weight"] not in LARGE:
        return "-"
    goal_f, goal_d = goals[BATCHES.index(row["batch"])]
    return "met" if f >= goal_f and d >= goal_d else f"F {goal_f:g} D {goal_d:g}"


# ------------------------------------------------------------------------------------------- what is kept


def identity(row: Row) -> tuple:
    """Rows of the same identity replace each other."""
    return tuple(row.get(key) for key in ("kind", "dtype", "pattern", "weight", "batch"))


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows with new ones in their places, or behind them."""
    fresh = {identity(row): row for row in new}
    kept = [fresh.pop(identity(row), row) for row in old]
    return kept + list(fresh.values())


def by_batch(rows: list[Row]) -> list[dict[str, str]]:
    """One line for each layer and pattern: F and D by batch, with a star below the goal."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = tuple(row.get(k, "") for k in ("kind", "dtype", "weight", "pattern"))
        head = {
            name: text for name, text in zip(("kind", "dtype", "weight", "pattern"), key, strict=True) if text
        }
        mark = {"met": "", "-": "", "lost": " lost"}.get(row["goal"], " *")
        text = f"{row['F']['ratio']:.3g} / {row['D']['ratio']:.3g}{mark}"
        lines.setdefault(key, head)[f"batch {row['batch']}"] = text
    columns = sorted(
        {c for line in lines.values() for c in line if c.startswith("batch ")}, key=lambda c: int(c[6:])
    )
    heads = ["kind"] * any("kind" in line for line in lines.values()) + ["dtype", "weight", "pattern"]
    return [{c: line.get(c, "") for c in (*heads, *columns)} for line in lines.values()]


WHAT = {
    GOAL_FILE: (
        "`F.linear(x, W)` with a packed W, batch rows of x, weights from memory: F / D, F times as fast as "
        "with the dense weight, D times as fast as the best of that and of prepacked oneDNN and MKL. *: "
        "below the goal that the project has set itself, in F or in D."
    ),
    OTHER_FILE: (
        "The same for small layers (in the caches), large batches, and the AVX2 kernels, against the "
        "libraries as they are (they use AVX-512) and limited to AVX2. F.linears: how many calls of "
        "`F.linear` with one row of x the making of panels takes. g @ W: the gradient of a layer's input, as "
        "fast against the dense weight and against one that is unpacked for it."
    ),
}


def store(path: Path, key: str, new: list[Row]) -> None:
    """Puts rows into a result file; see make_readme_table.py for what it is."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result |= {"machine": machine(), "what": WHAT[path.name]}
    result[key] = merged(result.get(key, []), new)
    result.setdefault("rows", [])
    result["summary"] = by_batch(result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """A row for the terminal."""
    time_key = next(key for key in ("packed", "packing", "g @ W") if key in row)
    times = row[time_key]
    deviation = (times["high"] - times["low"]) / times["median"] / 2
    head = f"{row.get('kind', ''):12.12} {row['dtype']:9} {row['weight']:>11} {row['pattern']:5}"
    middle = f"{times['low'] * 1e3:9.3f} ms ± {deviation:4.0%}"
    if time_key == "packing":
        return f"{head} {middle}  {row['F.linears']['ratio']:5.2f} F.linears  {row['goal']}"
    if time_key == "g @ W":
        ratios = f"{row['over dense']['ratio']:5.2f} dense {row['over unpacking']['ratio']:6.2f} unpacking"
        return f"{head} B={row['batch']:<5} {middle}  {ratios}  {row['goal']}"
    ratios = f"B={row['batch']:<5} F {row['F']['ratio']:6.2f}  D {row['D']['ratio']:6.2f}"
    dense = f"{row['which']} {row['best dense']['low'] * 1e3:.3f} ms"
    return f"{head} {ratios} {middle}  {dense:28} {row['goal']}"


def summary(rows: list[Row]) -> str:
    """How many rows lost or are below their goals, and which."""
    lost = [row for row in rows if row["goal"] == "lost"]
    missed = [row for row in rows if row["goal"] not in ("lost", "met", "faster", "-")]
    lines = [f"\n{len(rows)} rows, {len(lost)} lost against the best dense, {len(missed)} below their goal"]
    return "\n".join(
        [*lines, *(f"lost:  {line(row)}" for row in lost), *(f"below: {line(row)}" for row in missed)]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store; returns the exit code."""
    known = {part[0]: part for part in [*parts(), INNER]}
    listed = [part[0] for part in parts()]
    parser = argparse.ArgumentParser(description="Packed linear layers against dense ones on the CPU.")
    parser.add_argument("--part", nargs="+", choices=known, default=listed, metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer and batch")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers, one round: does it run?")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(listed))
        return 0
    require_kernels()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    effort = Effort(options.seconds, 1 if options.dry_run else None, options.dry_run)
    everything: list[Row] = []
    for name, file, key, make in (known[name] for name in options.part):
        start = time.perf_counter()
        with torch.inference_mode():
            rows = make(effort)
        store(options.results / file, key, rows)
        everything += rows
        print("\n".join(line(row) for row in rows))
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(summary(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
