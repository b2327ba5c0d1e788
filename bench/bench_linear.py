"""The packed linear layer against dense ones: F.linear and the best there is with a prepacked weight.

    python bench/bench_linear.py                         # everything; about half an hour
    python bench/bench_linear.py --shape 4096x4096 --batch 1 16 --pattern 2:4 --dtype float32

For each dtype, shape and batch, all candidates take turns in one process, one call each a round, so that a
slow moment of the machine hits all alike. Each has several copies of its weight, and takes another in every
round: large weights come from memory ("cold"), as they do when a model is larger than the caches. Small ones
fit into the caches with all their copies.

- F: how many times as fast as ``F.linear`` with the dense weight;
- D: how many times as fast as the best dense candidate: ``F.linear``, oneDNN and MKL with a weight that they
  packed beforehand (what an inductor-compiled and frozen model calls).

Ratios are of lower quartiles. A row says "lost" where the packed layer is slower than the best dense one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nmsparse_ext as nms

RESULT = Path(__file__).resolve().parent / "results" / "linear_cpu.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = ("4096x4096", "11008x4096")
SMALL = ("384x384", "1536x384")
PATTERNS = ("2:4", "1:4", "2:8", "1:8", "1:16")
BATCHES = (1, 4, 16, 64, 256, 1024)
COLD_BYTES = 160 << 20  # several times what the last-level cache holds
MAX_COPIES = 48

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

Call = Callable[[int], object]  # the argument chooses the copy of the weight


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[last // 4], ordered[last // 2], ordered[math.ceil(last * 3 / 4)]


def copies(nbytes: int) -> int:
    """How many copies of a weight are needed for it to be cold."""
    return min(MAX_COPIES, COLD_BYTES // nbytes + 2)


def dense_calls(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """The dense candidates that this torch has for ``x``."""
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    calls: dict[str, Call] = {"F.linear": lambda i: F.linear(x, weights[i % len(weights)])}
    rows = x.shape[0]
    reorder = torch.ops.mkldnn._reorder_linear_weight
    multiply = torch.ops.mkldnn._linear_pointwise
    onednn = [reorder(w, rows) for w in weights]
    calls["oneDNN prepacked"] = lambda i: multiply(x, onednn[i % len(onednn)], None, "none", [], "")
    if x.dtype == torch.float32 and torch.backends.mkl.is_available():
        mkl = [torch.ops.mkl._mkl_reorder_linear_weight(w, rows) for w in weights]

        def call(i: int) -> Tensor:
            i %= len(mkl)
            return torch.ops.mkl._mkl_linear(x, mkl[i], weights[i], None, rows)

        calls["MKL prepacked"] = call
    return {name: call for name, call in calls.items() if runs(call)}


def runs(call: Call) -> bool:
    """Whether a candidate works here at all."""
    try:
        call(0)
    except RuntimeError:
        return False
    return True


def packed_call(x: Tensor, weight: Tensor, pattern: str) -> Call:
    """``F.linear`` with the packed weight."""
    first = nms.compress(weight, pattern, prune=True)
    number = copies(first.engine_nbytes or first.nbytes)
    weights = [first] + [first.with_engine(first.engine) for _ in range(number - 1)]  # makes its forms anew
    return lambda i: F.linear(x, weights[i % len(weights)])


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for i in range(1, rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rounds_for(shape: tuple[int, int], batch: int, wanted: int | None) -> int:
    """More rounds for shorter calls."""
    work = shape[0] * shape[1] * batch
    return wanted or max(9, min(201, int(6e9 / work)))


def measure(
    dtype: str, shape: tuple[int, int], batch: int, patterns: list[str], wanted_rounds: int | None
) -> list[dict[str, Any]]:
    """The rows of one dtype, shape and batch."""
    weight = torch.randn(shape).to(DTYPES[dtype])
    x = torch.randn(batch, shape[1]).to(DTYPES[dtype])
    dense = dense_calls(x, weight)
    calls = dict(dense)
    for pattern in patterns:
        calls[pattern] = packed_call(x, weight, pattern)
    seconds = take_turns(calls, rounds_for(shape, batch, wanted_rounds))
    best_name = min(dense, key=lambda name: quartiles(seconds[name])[0])
    best, linear = quartiles(seconds[best_name])[0], quartiles(seconds["F.linear"])[0]
    rows = []
    for pattern in patterns:
        low, median, high = quartiles(seconds[pattern])
        rows.append(
            {
                "dtype": dtype,
                "pattern": pattern,
                "weight": f"{shape[0]}x{shape[1]}",
                "batch": batch,
                "F": {"ratio": linear / low},
                "D": {"ratio": best / low},
                "packed": {"median": median, "low": low, "high": high},
                "best dense": f"{best_name} {best * 1e3:.3f} ms",
                "goal": verdict(dtype, pattern, shape, batch, linear / low, best / low),
            }
        )
    return rows


def verdict(dtype: str, pattern: str, shape: tuple[int, int], batch: int, f: float, d: float) -> str:
    """Whether it lost against dense, else whether the goal is reached, where there is one."""
    if d < 1:
        return "lost"
    goals = GOALS.get((dtype, pattern))
    if goals is None or batch not in BATCHES[:5] or f"{shape[0]}x{shape[1]}" not in LARGE:
        return "-"
    goal_f, goal_d = goals[BATCHES.index(batch)]
    return "met" if f >= goal_f and d >= goal_d else f"F {goal_f:g} D {goal_d:g}"


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    packed = row["packed"]
    spread = (packed["high"] - packed["low"]) / packed["median"]
    return (
        f"{row['dtype']:9} {row['weight']:>11} B={row['batch']:<5} {row['pattern']:5} "
        f"F {row['F']['ratio']:6.2f}  D {row['D']['ratio']:6.2f}  {packed['low'] * 1e3:9.3f} ms "
        f"± {spread * 50:3.0f} %  {row['best dense']:28} {row['goal']}"
    )


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored: see make_readme_table.py."""
    return {
        "machine": machine(),
        "what": (
            "`F.linear(x, W)` with a packed W, batch rows of x, weights from memory: F times as fast as with "
            "the dense weight, D times as fast as the best of that and of prepacked oneDNN and MKL."
        ),
        "rows": rows,
    }


def main() -> int:
    """Measure, print, store; returns the exit code."""
    parser = argparse.ArgumentParser(description="Packed linear layers against dense ones on the CPU.")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs="+", default=[*LARGE, *SMALL], help="out x in, as 4096x4096")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help=f"result file; for all of it: {RESULT}")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in arguments.dtype:
            for text in arguments.shape:
                out, inputs = (int(size) for size in text.split("x"))
                for batch in arguments.batch:
                    new = measure(dtype, (out, inputs), batch, arguments.pattern, arguments.rounds)
                    rows += new
                    print("\n".join(line(row) for row in new), flush=True)
    lost = [row for row in rows if row["goal"] == "lost"]
    missed = [row for row in rows if row["goal"].startswith("F ")]
    print(f"\n{len(rows)} rows, {len(lost)} lost against the best dense, {len(missed)} below their goal")
    for row in lost:
        print("lost:", line(row))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result(rows), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
