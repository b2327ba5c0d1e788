"""The packed convolution against dense ones: every kind of layer of a ResNet-50.

    python bench/bench_conv.py                     # everything, in one go: some minutes
    python bench/bench_conv.py --part 1/4          # a part of it, added to what the result file holds
    python bench/bench_conv.py --layer 3x3/64@56 --batch 1 --pattern 2:4 --dtype float32
    python bench/bench_conv.py --dry-run           # what would be measured

Inputs are channels_last. For each layer, batch and dtype all candidates take turns in one process, one call
each a round, so that a slow moment of the machine hits all alike. Each has several copies of its weight and
takes another in every round, so weights come from memory, while the input is warm: as in a network, where the
layer before has just written it.

The ratio is over the best dense candidate: ``F.conv2d`` with a channels_last weight, oneDNN with a weight
that it packed beforehand, and, for kernels larger than 1x1, ``torch.compile`` with freezing. Ratios are of
lower quartiles. A row says "lost" where the packed layer is slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, alternate, machine, require_kernels
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nmsparse_ext as nms

RESULT = RESULTS / "conv_cpu.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
BATCHES = (1, 8)
GOALS = {"2:4": 1.25, "1:4": 2.2, "1:8": 4.0}  # float32, 3x3 layers of ResNet-50
COLD_BYTES = 96 << 20
MAX_COPIES = 24

Call = Callable[[int], object]  # the argument chooses the copy of the weight


@dataclass(frozen=True)
class Layer:
    """A convolution of a square image, padded so that stride 1 keeps its size."""

    kernel: int
    inputs: int
    outputs: int
    size: int
    stride: int = 1

    @property
    def name(self) -> str:
        """Like ``3x3/2 64->128@56``: kernel, stride, channels, size of the input."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        channels = self.inputs if self.inputs == self.outputs else f"{self.inputs}->{self.outputs}"
        return f"{self.kernel}x{self.kernel}{stride} {channels}@{self.size}"

    @property
    def padding(self) -> int:
        """Before and after."""
        return self.kernel // 2

    def macs(self, batch: int) -> int:
        """Of the dense layer."""
        return batch * (self.size // self.stride) ** 2 * self.inputs * self.outputs * self.kernel**2


RESNET50 = (
    Layer(3, 64, 64, 56),
    Layer(3, 128, 128, 56, 2),
    Layer(3, 128, 128, 28),
    Layer(3, 256, 256, 28, 2),
    Layer(3, 256, 256, 14),
    Layer(3, 512, 512, 14, 2),
    Layer(3, 512, 512, 7),
    Layer(1, 64, 64, 56),
    Layer(1, 64, 256, 56),
    Layer(1, 256, 64, 56),
    Layer(1, 256, 128, 56),
    Layer(1, 256, 512, 56, 2),
    Layer(1, 128, 512, 28),
    Layer(1, 512, 128, 28),
    Layer(1, 512, 256, 28),
    Layer(1, 512, 1024, 28, 2),
    Layer(1, 256, 1024, 14),
    Layer(1, 1024, 256, 14),
    Layer(1, 1024, 512, 14),
    Layer(1, 1024, 2048, 14, 2),
    Layer(1, 512, 2048, 7),
    Layer(1, 2048, 512, 7),
)
# Layers that no size of a block was chosen by.
OTHERS = (
    Layer(3, 128, 256, 28),
    Layer(3, 256, 256, 28),
    Layer(3, 512, 512, 28),
    Layer(3, 96, 96, 35),
    Layer(3, 192, 320, 17),
    Layer(3, 80, 144, 23),
    Layer(5, 48, 64, 27),
    Layer(1, 320, 192, 19),
)


@dataclass(frozen=True)
class Case:
    """What is measured together."""

    dtype: str
    batch: int
    layer: Layer


def copies(nbytes: int) -> int:
    """How many copies of a weight are needed for it to be cold."""
    return min(MAX_COPIES, COLD_BYTES // nbytes + 2)


def runs(call: Call) -> bool:
    """Whether a candidate works here at all."""
    try:
        call(0)
    except RuntimeError:
        return False
    return True


def dense_calls(x: Tensor, weight: Tensor, layer: Layer, compiled: bool) -> dict[str, Call]:
    """The dense candidates that this torch has."""
    stride, padding = layer.stride, layer.padding
    weights = [weight.clone(memory_format=torch.channels_last) for _ in range(copies(weight.nbytes))]
    calls: dict[str, Call] = {
        "F.conv2d": lambda i: F.conv2d(x, weights[i % len(weights)], None, stride, padding)
    }
    geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    convolve = torch.ops.mkldnn._convolution_pointwise
    packed = [reorder(w, *geometry, list(x.shape)) for w in weights]
    calls["oneDNN prepacked"] = lambda i: convolve(
        x, packed[i % len(packed)], None, *geometry, "none", [], ""
    )
    if compiled:
        modules = [frozen(x, w, layer) for w in weights[:1]]
        calls["compiled, frozen"] = lambda i: modules[i % len(modules)](x)
    return {name: call for name, call in calls.items() if runs(call)}


def frozen(x: Tensor, weight: Tensor, layer: Layer) -> Callable[[Tensor], Tensor]:
    """The layer under ``torch.compile`` with its weight as a constant. One copy only: its weight is warm."""
    import torch._inductor.config as inductor

    module = nn.Conv2d(
        layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, bias=False, dtype=x.dtype
    ).eval()
    module.weight = nn.Parameter(weight, requires_grad=False)
    torch.compiler.reset()
    with inductor.patch(freezing=True):
        compiled = torch.compile(module, dynamic=False)
        compiled(x)
    return compiled


def packed_call(x: Tensor, weight: Tensor, layer: Layer, pattern: str) -> Call:
    """``F.conv2d`` with the packed weight."""
    first = nms.compress(weight, pattern, prune=True)
    number = copies(first.engine_nbytes or first.nbytes)
    weights = [first] + [first.with_engine(first.engine) for _ in range(number - 1)]  # makes its forms anew
    return lambda i: F.conv2d(x, weights[i % len(weights)], None, layer.stride, layer.padding)


def rounds_for(case: Case, wanted: int | None) -> int:
    """More rounds for shorter calls."""
    return wanted or max(11, min(61, int(4e9 / case.layer.macs(case.batch))))


def measure(
    case: Case, patterns: list[str], wanted_rounds: int | None, compiled: bool
) -> list[dict[str, Any]]:
    """The rows of one case."""
    layer, dtype = case.layer, DTYPES[case.dtype]
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel).to(dtype)
    x = torch.randn(case.batch, layer.inputs, layer.size, layer.size).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    dense = dense_calls(x, weight, layer, compiled and layer.kernel > 1)
    calls = dense | {pattern: packed_call(x, weight, layer, pattern) for pattern in patterns}
    timings = alternate(calls, rounds=rounds_for(case, wanted_rounds))
    best_name = min(dense, key=lambda name: timings[name].low)
    best = timings[best_name].low
    rows = []
    for pattern in patterns:
        timing = timings[pattern]
        ratio = best / timing.low
        rows.append(
            {
                "dtype": case.dtype,
                "layer": layer.name,
                "batch": case.batch,
                "pattern": pattern,
                "over dense": {"ratio": ratio},
                "packed": {"median": timing.median, "low": timing.low, "high": timing.high},
                "best dense": f"{best_name} {best * 1e3:.3f} ms",
                "goal": verdict(case, pattern, ratio),
            }
        )
    return rows


def verdict(case: Case, pattern: str, ratio: float) -> str:
    """Whether it lost against dense, else whether the goal is reached, where there is one."""
    if ratio < 1:
        return "lost"
    goal = GOALS.get(pattern)
    if goal is None or case.dtype != "float32" or case.layer.kernel == 1 or case.layer not in RESNET50:
        return "-"
    return "met" if ratio >= goal else f"{goal:g}x"


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    packed = row["packed"]
    spread = (packed["high"] - packed["low"]) / packed["median"]
    return (
        f"{row['dtype']:9} {row['layer']:20} N={row['batch']:<2} {row['pattern']:5} "
        f"{row['over dense']['ratio']:6.2f}x {packed['low'] * 1e3:9.3f} ms ± {spread * 50:3.0f} %  "
        f"{row['best dense']:28} {row['goal']}"
    )


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored: see make_readme_table.py."""
    return {
        "machine": machine(),
        "what": (
            "`F.conv2d(x, W)` with a packed W, channels_last, weights from memory, x warm: how many times as "
            "fast as the best dense one of `F.conv2d`, prepacked oneDNN and, above 1x1, a compiled and "
            "frozen layer."
        ),
        "summary": summary(rows),
        "rows": rows,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype, kernel and batch, and each pattern: the range of the ratios, and how many lost."""
    found: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in rows:
        kernel = row["layer"].split(" ")[0].split("/")[0]
        of_kind = found.setdefault((row["dtype"], kernel, row["batch"]), {})
        of_kind.setdefault(row["pattern"], []).append(row["over dense"]["ratio"])
    return [
        {"dtype": dtype, "kernel": kernel, "batch": batch}
        | {pattern: ratios_text(of_kind.get(pattern, [])) for pattern in PATTERNS}
        for (dtype, kernel, batch), of_kind in found.items()
    ]


def ratios_text(ratios: list[float]) -> str:
    """Their range and median, and how many are below 1."""
    if not ratios:
        return "-"
    lost = sum(ratio < 1 for ratio in ratios)
    text = f"{min(ratios):.2f}-{max(ratios):.2f}x, median {statistics.median(ratios):.2f}x"
    return text if not lost else f"{text}; {lost} of {len(ratios)} lost"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[name] for name in ("dtype", "layer", "batch", "pattern"))


def store(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the rows, in the order of the table, together with others that the file holds."""
    found = {key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    found |= {key(row): row for row in rows}
    names = [layer.name for layer in dict.fromkeys(RESNET50 + OTHERS)]
    order = lambda row: (  # noqa: E731
        list(DTYPES).index(row["dtype"]),
        names.index(row["layer"]),
        row["batch"],
        PATTERNS.index(row["pattern"]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(found.values(), key=order)
    path.write_text(json.dumps(result(ordered), indent=1) + "\n", encoding="utf-8")


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """What the arguments ask for, every n-th of it if it is to be a part of n."""
    layers = OTHERS if arguments.others else RESNET50
    chosen = [layer for layer in layers if not arguments.layer or layer.name in arguments.layer]
    everything = [
        Case(dtype, batch, layer)
        for dtype in arguments.dtype
        for layer in chosen
        for batch in arguments.batch
    ]
    number, parts = (int(text) for text in arguments.part.split("/"))
    return iter(everything[number - 1 :: parts])


def main(argv: list[str] | None = None) -> int:
    """Measure, print, store; returns the exit code."""
    parser = argparse.ArgumentParser(description="Packed convolutions against dense ones on the CPU.")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layer", nargs="+", default=[], help="only these, by the names that are printed")
    parser.add_argument("--others", action="store_true", help="not ResNet-50's layers, but some others")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--part", default="1/1", help="as 2/4: the second of four parts")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no compiled candidate")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    parser.add_argument("--out", type=Path, default=None, help=f"result file; for all of it: {RESULT}")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        for case in cases(arguments):
            print(case.dtype, case.layer.name, f"N={case.batch}", *arguments.pattern)
        return 0
    require_kernels()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case in cases(arguments):
            new = measure(case, arguments.pattern, arguments.rounds, arguments.compile)
            rows += new
            print("\n".join(line(row) for row in new), flush=True)
    lost = [row for row in rows if row["goal"] == "lost"]
    missed = [row for row in rows if row["goal"].endswith("x")]
    print(f"\n{len(rows)} rows, {len(lost)} lost against the best dense, {len(missed)} below their goal")
    for row in lost:
        print("lost:", line(row))
    if arguments.out is not None:
        store(rows, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
