"""The packed linear layer in integers against dense ones: int8 in PyTorch's ways, and floating point.

    python bench/bench_int8.py --out bench/results/int8_cpu.json   # everything
    python bench/bench_int8.py --shape 4096x4096 --batch 1 16 --pattern 2:4
    python bench/bench_int8.py --dry-run                              # tiny sizes: does it all work?

For each shape and batch, all candidates take turns in one process, one call each a round. Each has several
copies of its weight and takes another in every round, so that weights come from memory. Ratios are of lower
quartiles; ``±`` is half of the middle half of the rounds. A row says "lost" where the packed layer is slower
than the best dense int8.

What counts as PyTorch's dense int8, x float32 as for the packed layer:

- ``dynamic`` linear of fbgemm, x86 and oneDNN (``torch.ao.nn.quantized.dynamic.Linear``);
- ``_int_mm`` and ``onednn.qlinear_pointwise`` with an x that was rounded beforehand: their time lacks that
  work, and for ``_int_mm`` the scales too, so they are favoured;
- ``_weight_int8pack_mm``: int8 weights, products in bfloat16.

Results are merged into the file given by ``--out``: rows measured again replace the old ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import machine
from linear_calls import Call, copies, onednn_call, plain_call, spread, take_turns
from torch import Tensor

import nmsparse_ext as nms

SHAPES = ("4096x4096", "11008x4096")
PATTERNS = ("2:4", "1:4", "2:8", "1:8", "1:16")
BATCHES = (1, 4, 16, 64, 256)


def works(call: Call) -> bool:
    """Whether a candidate runs here at all."""
    try:
        call(0)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def dynamic_calls(x: Tensor, weight: Tensor, number: int) -> dict[str, Call]:
    """``linear_dynamic`` of every quantized engine of this torch."""
    calls: dict[str, Call] = {}
    rows = weight.shape[0]
    scales, zeros = torch.full((rows,), 1e-3, dtype=torch.double), torch.zeros(rows, dtype=torch.long)
    before = torch.backends.quantized.engine
    for engine in ("fbgemm", "x86", "onednn"):
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that these tensors will go, some day
            quantized = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
        packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(number)]

        def call(i: int, packed: list[Any] = packed) -> Tensor:
            return torch.ops.quantized.linear_dynamic(x, packed[i % number], False)

        calls[f"dynamic {engine}"] = call
    torch.backends.quantized.engine = before
    return calls


def dense_int8_calls(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """PyTorch's ways to multiply with a dense int8 ``weight [out, in]``."""
    number, rows = copies(weight.nbytes), weight.shape[0]
    calls = dynamic_calls(x, weight, number)
    rounded = (x * (127 / x.abs().amax())).round().to(torch.int8)
    shifted = (rounded.int() + 128).to(torch.uint8)
    plain = [weight.clone() for _ in range(number)]
    scales, zeros = torch.full((rows,), 1e-3), torch.zeros(rows, dtype=torch.int32)
    calls["_int_mm"] = lambda i: torch._int_mm(rounded, plain[i % number].t())
    halves, half_scales = x.bfloat16(), scales.bfloat16()
    calls["_weight_int8pack_mm"] = lambda i: torch._weight_int8pack_mm(halves, plain[i % number], half_scales)
    try:
        onednn = [torch.ops.onednn.qlinear_prepack(w, list(x.shape)) for w in plain]
    except (RuntimeError, AttributeError):
        onednn = []
    if onednn:
        calls["qlinear_pointwise"] = lambda i: torch.ops.onednn.qlinear_pointwise(
            *(
                shifted,
                0.02,
                128,
                onednn[i % number],
                scales,
                zeros,
                None,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
        )
    return {name: call for name, call in calls.items() if works(call)}


def float_calls(x: Tensor, weight: Tensor, pattern: str) -> dict[str, Call]:
    """Packed and dense products in float32 and bfloat16."""
    calls: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, y, dense = str(dtype).removeprefix("torch."), x.to(dtype), weight.to(dtype)
        weights = [dense.clone() for _ in range(copies(dense.nbytes))]
        calls[f"{name} dense"] = plain_call(y, weights)
        with contextlib.suppress(RuntimeError):  # not for this dtype or processor
            calls[f"{name} oneDNN prepacked"] = onednn_call(y, weights)
        calls[f"{name} packed {pattern}"] = plain_call(y, packed_weights(dense, pattern, "cpu-panels"))
    return {name: call for name, call in calls.items() if works(call)}


def packed_weights(weight: Tensor, pattern: str, engine: str) -> list[Tensor]:
    """The packed weight, as often as it takes to be cold; every copy has panels of its own."""
    first = nms.compress(weight, pattern, prune=True).with_engine(engine)
    return [first] + [first.with_engine(engine) for _ in range(copies(first.engine_nbytes) - 1)]


def measure(
    shape: tuple[int, int],
    batch: int,
    patterns: list[str],
    *,
    floats: bool,
    seconds: float,
    rounds: int | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one shape and batch, and the lower quartiles of all candidates in ms."""
    weight = torch.randint(-127, 128, shape).to(torch.int8)
    x = torch.randn(batch, shape[1])
    dense = dense_int8_calls(x, weight)
    calls = dict(dense)
    for pattern in patterns:
        calls[pattern] = plain_call(x, packed_weights(weight.float(), pattern, "cpu-int8"))
    if floats:
        calls |= float_calls(x, weight, patterns[0])
    spreads = {name: spread(values) for name, values in take_turns(calls, seconds, rounds).items()}
    best = min(dense, key=lambda name: spreads[name]["low"])
    rows = []
    for pattern in patterns:
        ratio = spreads[best]["low"] / spreads[pattern]["low"]
        rows.append(
            {
                "pattern": pattern,
                "weight": f"{shape[0]}x{shape[1]}",
                "batch": batch,
                "over dense int8": {"ratio": ratio},
                "packed int8": spreads[pattern],
                "dense int8": spreads[best],
                "which": best,
                "verdict": "lost" if ratio < 1 else "faster",
            }
        )
    return rows, {name: round(values["low"] * 1e3, 4) for name, values in spreads.items()}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    packed, dense = row["packed int8"], row["dense int8"]
    width = (packed["high"] - packed["low"]) / packed["median"]
    return (
        f"{row['weight']:>11} B={row['batch']:<5} {row['pattern']:5} {row['over dense int8']['ratio']:6.2f}x "
        f"{packed['low'] * 1e3:9.3f} ms ± {width * 50:3.0f} %  {row['which']} {dense['low'] * 1e3:.3f} ms  "
        f"{row['verdict']}"
    )


def merged(path: Path, rows: list[dict[str, Any]], candidates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The rows of a result file, those measured again replaced."""

    def key(row: dict[str, Any]) -> tuple[str, int, str]:
        return row["weight"], row["batch"], row["pattern"]

    old = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "candidates (ms)": {}}
    )
    return {
        "rows": list({key(row): row for row in [*old["rows"], *rows]}.values()),
        "candidates (ms)": {**old["candidates (ms)"], **candidates},
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, store; returns the exit code."""
    parser = argparse.ArgumentParser(description="Packed int8 linear layers against dense ones on the CPU.")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="out x in, as 4096x4096")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS))
    parser.add_argument("--seconds", type=float, default=8.0, help="per shape and batch")
    parser.add_argument("--floats", action="store_true", help="time float32 and bfloat16 beside, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, three rounds")
    parser.add_argument("--out", type=Path, default=None, help="result file to merge into")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.shape, arguments.batch, arguments.floats = ["64x128"], [1, 4], True
    rounds = 3 if arguments.dry_run else None
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    candidates: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for text in arguments.shape:
            out, inputs = (int(size) for size in text.split("x"))
            for batch in arguments.batch:
                new, times = measure(
                    (out, inputs),
                    batch,
                    arguments.pattern,
                    floats=arguments.floats,
                    seconds=arguments.seconds,
                    rounds=rounds,
                )
                candidates[f"{text} batch {batch}"] = times
                rows += new
                print("\n".join(line(row) for row in new), flush=True)
    print(f"\n{len(rows)} rows, {sum(row['verdict'] == 'lost' for row in rows)} lost against dense int8")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        what = (
            "`F.linear(x, W)` with a packed W of engine cpu-int8, float32 x of batch rows, rounded in the "
            "call, weights from memory, against the fastest dense int8 of PyTorch."
        )
        stored = {"machine": machine(), "what": what, **merged(arguments.out, rows, candidates)}
        arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
