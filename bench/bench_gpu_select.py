"""Selection ops on a GPU: time and bandwidth, beside a device copy and beside how others choose masks.

    python bench/bench_gpu_select.py [--json FILE] [--quick]

Every row is measured in rounds that alternate between all its candidates, with CUDA events around a batch of
calls; shown are medians. Buffers rotate through more memory than the cache holds, so every call reads and
writes device memory. "copy" is ``dst.copy_(src)`` of the same tensor in the same rounds: the least that a
masked copy could take if there were no mask to write. Bandwidth counts the bytes that must move at least,
each input and output once.

Masks as others choose them, into fresh tensors because nothing else is offered:

- argsort+scatter, the published SR-STE code: ``w * ones.scatter_(1, argsort(|w|)[:, :m - n], 0)``
- topk+scatter: ``w * zeros.scatter_(1, topk(|w|, n).indices, 1)``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nmsparse_ext

PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 16), (4, 16), (8, 16), (8, 32))
ROTATED_BYTES = 512 << 20  # several times the second-level cache of any GPU
nmsparse = torch.ops.nmsparse


class Rotation:
    """As many sets of buffers as exceed the cache, handed out one after the other."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        first = make()
        size = sum(t.numel() * t.element_size() for t in first)
        self._sets = [first, *(make() for _ in range(min(63, max(1, ROTATED_BYTES // size))))]
        self._next = 0

    def next(self) -> tuple[Tensor, ...]:
        """The next set."""
        self._next = (self._next + 1) % len(self._sets)
        return self._sets[self._next]

    def on(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """A call of the function on the next set."""
        return lambda: function(*self.next())


def batch_time(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds per call, on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats


def measure(
    candidates: dict[str, Callable[[], Any]], rounds: int, milliseconds: float
) -> dict[str, list[float]]:
    """Microseconds of every candidate in every round, the candidates taking turns."""
    repeats = {}
    for name, call in candidates.items():
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(1000, int(milliseconds * 1e3 / max(1.0, batch_time(call, 3)))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(batch_time(call, repeats[name]))
    return times


def by_argsort(w: Tensor, n: int, m: int) -> Tensor:
    """The published way, for rows."""
    groups = w.abs().reshape(-1, m)
    index = torch.argsort(groups, dim=1)[:, : m - n]
    return w * torch.ones_like(groups).scatter_(1, index, 0).reshape(w.shape)


def by_topk(w: Tensor, n: int, m: int) -> Tensor:
    """The other usual way, for rows."""
    groups = w.abs().reshape(-1, m)
    index = groups.topk(n, dim=1, sorted=False).indices
    return w * torch.zeros_like(groups).scatter_(1, index, 1).reshape(w.shape)


class Layout(NamedTuple):
    """A weight's shape, its group dim, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    dim: int
    memory_format: torch.memory_format = torch.contiguous_format

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Random weights."""
        w = torch.randn(self.shape, device="cuda").contiguous(memory_format=self.memory_format)
        return (40 * w).clamp(-127, 127).to(dtype)


ROWS = Layout("rows", (4096, 4096), 1)
COLUMNS = Layout("columns", (4096, 4096), 0)
CONV = Layout("OIHW along I", (1024, 1024, 3, 3), 1)
CHANNELS_LAST = Layout("channels_last", (1024, 1024, 3, 3), 1, torch.channels_last)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Bench:
    """Measures rows, prints each, and keeps them for the report."""

    def __init__(self, rounds: int, milliseconds: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._rounds, self._milliseconds = rounds, milliseconds

    def row(
        self,
        what: tuple[str, Layout, torch.dtype, str],
        moved: int,
        candidates: dict[str, Callable[[], Any]],
    ) -> None:
        """One row; ``candidates`` are "ours", "copy" and whatever else to compare with."""
        op, layout, dtype, pattern = what
        times = measure(candidates, self._rounds, self._milliseconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        ours = median["ours"]
        self.rows.append(
            {
                "op": op,
                "layout": f"{layout.name} {list(layout.shape)}",
                "dtype": str(dtype).removeprefix("torch."),
                "pattern": pattern,
                "time": timing(times["ours"]),
                "GB/s": f"{moved / ours / 1e3:.0f}",
                "of a copy": {"share": median["copy"] / ours},
                **{
                    name: {"ratio": median[name] / ours} if name in median else "-"
                    for name in ("argsort+scatter", "topk+scatter")
                },
            }
        )
        others = "  ".join(f"{value / ours:6.1f}x {name}" for name, value in list(median.items())[2:])
        print(
            f"{op:18} {layout.name:13} {self.rows[-1]['dtype']:13} {pattern:5} {ours:8.1f} us "
            f"{self.rows[-1]['GB/s']:>5} GB/s {100 * median['copy'] / ours:5.1f} % of copy {others}",
            flush=True,
        )


def timing(microseconds: list[float]) -> dict[str, float]:
    """Median and middle half, in seconds."""
    low, median, high = statistics.quantiles(microseconds, n=4)
    return {"median": median * 1e-6, "low": low * 1e-6, "high": high * 1e-6}


def prune(bench: Bench, layout: Layout, dtype: torch.dtype, n: int, m: int) -> None:
    """Masked copy and bits in one launch, into preallocated outputs."""
    dim = layout.dim

    def buffers() -> tuple[Tensor, ...]:
        w = layout.weight(dtype)
        return w, torch.empty_like(w), nmsparse.mask_bits(w, n, m, dim, True)

    rotation = Rotation(buffers)
    candidates = {
        "ours": rotation.on(lambda w, out, bits: nmsparse.prune_out(w, n, m, dim, True, out, bits)),
        "copy": rotation.on(lambda w, out, _: out.copy_(w)),
    }
    if layout is ROWS and dtype in (torch.float32, torch.bfloat16):
        candidates["argsort+scatter"] = rotation.on(lambda w, *_: by_argsort(w, n, m))
        candidates["topk+scatter"] = rotation.on(lambda w, *_: by_topk(w, n, m))
    bench.row(("prune_out", layout, dtype, f"{n}:{m}"), bytes_of(*rotation.next()), candidates)


def others(bench: Bench, layout: Layout, dtype: torch.dtype) -> None:
    """The other ops of a training step and of packing, 2:4."""
    dim, k = layout.dim, layout.shape[layout.dim]
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def buffers() -> tuple[Tensor, ...]:
        w = layout.weight(dtype)
        bits = nmsparse.mask_bits(w, 2, 4, dim, True)
        return w, layout.weight(dtype), bits, *nmsparse.compress(w, 2, 4, dim, True)

    rotation = Rotation(buffers)
    w, _, bits, *packed = rotation.next()
    weight, mask = bytes_of(w), bytes_of(bits)
    ops: dict[str, tuple[int, Callable[..., Any]]] = {
        "mask_bits": (weight + mask, lambda w, o, b, v, i: nmsparse.mask_bits(w, 2, 4, dim, True)),
        "apply_bits_": (2 * weight + mask, lambda w, o, b, v, i: nmsparse.apply_bits_(o, b, dim)),
        "add_pruned_": (
            3 * weight + mask,
            lambda w, o, b, v, i: nmsparse.add_pruned_(o, w, b, dim, 2e-4, None),
        ),
        "sad_out": (2 * mask, lambda w, o, b, v, i: nmsparse.sad_out(b, b, count)),
        "find_violation": (weight, lambda w, o, b, v, i: nmsparse.find_violation(w, 2, 4, dim, True)),
        "compress": (weight + bytes_of(*packed), lambda w, *_: nmsparse.compress(w, 2, 4, dim, True)),
        "decompress": (
            weight + bytes_of(*packed),
            lambda w, o, b, v, i: nmsparse.decompress(v, i, 2, 4, k, dim),
        ),
    }
    if len(layout.shape) == 2:
        both_ways, blob = nmsparse.transposable_pack(w), nmsparse.lt_prune_pack(w, "cutlass")
        ops["transposable_bits"] = (weight + mask, lambda w, *_: nmsparse.transposable_bits(w))
        ops["transposable_pack"] = (
            weight + bytes_of(*both_ways),
            lambda w, *_: nmsparse.transposable_pack(w),
        )
        ops["lt_prune_pack"] = (weight + bytes_of(blob), lambda w, *_: nmsparse.lt_prune_pack(w, "cutlass"))
    copy = rotation.on(lambda w, o, *_: o.copy_(w))
    for name, (moved, function) in ops.items():
        bench.row((name, layout, dtype, "2:4"), moved, {"ours": rotation.on(function), "copy": copy})


def all_rows(bench: Bench, quick: bool) -> None:
    """All rows, or a few of them."""
    for dtype in (torch.float32, torch.bfloat16):
        for n, m in PATTERNS[:1] if quick else PATTERNS:
            prune(bench, ROWS, dtype, n, m)
    if not quick:
        for dtype in (torch.float16, torch.int8, torch.float8_e4m3fn, torch.float64):
            prune(bench, ROWS, dtype, 2, 4)
        for layout in (COLUMNS, CONV, CHANNELS_LAST):
            for dtype in (torch.float32, torch.bfloat16):
                prune(bench, layout, dtype, 2, 4)
    for layout in (ROWS,) if quick else (ROWS, COLUMNS, CONV):
        for dtype in (torch.float32, torch.bfloat16):
            others(bench, layout, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/bench_gpu_select.json"))
    parser.add_argument("--quick", action="store_true", help="a few rows only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=10.0, help="per candidate and round")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    if not nmsparse_ext.build_info().cuda:
        parser.error("this build has no CUDA kernels")

    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, torch {torch.__version__}", flush=True)
    bench = Bench(arguments.rounds, arguments.milliseconds)
    with contextlib.suppress(KeyboardInterrupt):  # the time is up: what there is counts
        all_rows(bench, arguments.quick)

    report = {
        "machine": {
            "processor": device.name,
            "engine": f"sm_{device.major}{device.minor}, {device.multi_processor_count} multiprocessors",
            "threads": "1",
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).date().isoformat(),
        },
        "what": "Ops on tensors in device memory, cold caches, against a device copy of the same tensor and "
        "against how masks are usually chosen in PyTorch.",
        "rows": bench.rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
