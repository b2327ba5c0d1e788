"""Packed linear layers on a GPU, beside cuBLAS and torch's own 2:4, in the same run.

    python bench/bench_gpu_linear.py [--quick] [--json FILE] [--search]
    python bench/bench_gpu_linear.py --dry-run        # every kind of row on the CPU, on tiny layers

Every row is measured in rounds that alternate between all its candidates, on random data: cuBLAS with the
dense weight, ``torch.sparse.to_sparse_semi_structured``, our small-batch kernel, cuSPARSELt as we call it,
and "ours": ``F.linear`` with a packed weight, which chooses. Products of few tokens are timed as replays of a
CUDA graph over weights that rotate through more memory than the cache holds; what a call costs on the host is
a table of its own. Power, temperature and clock are noted beside every row. Targets stand beside the results
(``gpu_layers.py``); what misses them is listed at the end, with the terms of the roofline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_layers as layers
import torch
import torch.nn.functional as F
from gpu_candidates import DENSE, DTYPES, OURS, OUT, TORCH, Call, candidates
from gpu_layers import Layer

import nmsparse_ext as nms
from nmsparse_ext import _cuda_timing as timing
from nmsparse_ext import crossover, cusparselt, engines_cuda
from nmsparse_ext._as_on_a_gpu import as_on_a_gpu
from nmsparse_ext._machine import machine

SMALL_PATTERNS = ("1:4", "1:8", "1:16", "4:8")
ROUNDS = 7


def host_batch(call: Callable[[int], object], calls: int, first: int = 0) -> float:
    """As `timing.batch_microseconds`, by the host's clock: for dry runs."""
    start = time.perf_counter()
    for i in range(first, first + calls):
        call(i)
    return max((time.perf_counter() - start) * 1e6 / calls, 1e-3)


def clocks() -> dict[str, float | None]:
    """Watts, degrees and megahertz right now; None where this machine does not say."""
    found: dict[str, float | None] = {}
    for name, ask, scale in (
        ("W", torch.cuda.power_draw, 1e-3),
        ("C", torch.cuda.temperature, 1),
        ("MHz", torch.cuda.clock_rate, 1),
    ):
        try:
            found[name] = ask() * scale
        except Exception:  # no pynvml, no permission, no GPU: whatever it is, the row stands without
            found[name] = None
    return found


class Bench:
    """Measures rows, prints each, keeps them, and lists the targets that were missed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry, self.search = arguments.dry_run, arguments.search
        self.deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
        self.device = "cpu" if self.dry else "cuda"
        self.gpu = "no GPU: a dry run" if self.dry else torch.cuda.get_device_name()
        self.peaks = layers.peaks_of(self.gpu)
        self.rows: list[dict[str, Any]] = []
        self.host: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self.left_out: list[str] = []
        self.crossed: set[tuple[Layer, str, str]] = set()

    def row(self, layer: Layer, tokens: int, dtype: str, pattern: str) -> None:
        """One layer, one number of tokens."""
        what = f"{layer.group} {layer.name} {layer.rows}x{layer.k}, {tokens} tokens, {dtype} {pattern}"
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.left_out.append(what)
            return
        try:
            if not self.dry and dtype in ("bfloat16", "float16"):
                self._measure_crossover(layer, dtype, pattern)
            found = candidates(layer, tokens, dtype, pattern, self.device, self.search and not self.dry)
            times, graphs = self._times(found.calls, tokens)
        except torch.cuda.OutOfMemoryError:
            self.left_out.append(f"{what}: not enough memory")
            return
        if DENSE not in times:
            self.left_out.append(f"{what}: {found.missing.get(DENSE, '')}")
            return
        median = timing.medians(times)
        ways = [name for name in median if name not in (DENSE, TORCH)]
        best = min(ways, key=median.__getitem__) if ways else ""
        mine = OURS if OURS in median else best
        ratio = median[DENSE] / median[mine] if mine else 0.0
        out = OUT.get(dtype, DTYPES[dtype]).itemsize
        terms = layers.roofline(layer, tokens, pattern, DTYPES[dtype].itemsize, out, self.peaks)
        aim = layers.target(self.gpu, dtype, pattern, layer, tokens)
        self.rows.append(
            {
                "group": layer.group,
                "layer": layer.name,
                "weight": f"{layer.rows}x{layer.k}",
                "tokens": str(tokens),
                "dtype": dtype,
                "pattern": pattern,
                "cuBLAS": _seconds(times[DENSE]),
                "ours": _seconds(times[mine]) if mine else "-",
                "over cuBLAS": {"ratio": ratio},
                "over torch": {"ratio": median[TORCH] / median[mine]} if TORCH in median and mine else "-",
                "target": f"{aim.least:g}x" + (f" ({aim.more})" if aim.more else ""),
                "ways": {name: median[DENSE] / median[name] for name in median if name != DENSE},
                "best way": best,
                "TFLOPS": terms.operations / median[mine] * 1e-6 if mine else None,
                "dense TFLOPS": terms.operations / median[DENSE] * 1e-6,
                "GB/s": terms.packed_bytes / median[mine] * 1e-3 if mine else None,
                "bound": terms.bound,
                "limit": terms.limit,
                "graph": sorted(graphs),
                "missing": found.missing,
                "clocks": clocks(),
            }
        )
        self._compare(what, ratio, aim, terms)
        torch_ratio = median[TORCH] / median[mine] if TORCH in median and mine else None
        if not self.dry and torch_ratio is not None and tokens <= 256 and torch_ratio < layers.OVER_TORCH:
            self.missed.append(f"{what}: {torch_ratio:.2f}x torch 2:4, target {layers.OVER_TORCH}x")
        others = "  ".join(f"{name} {median[DENSE] / median[name]:.2f}x" for name in median if name != DENSE)
        bound = "" if terms.bound is None else f"  bound {terms.bound:.2f}x by {terms.limit}"
        print(f"{what:64} cuBLAS {median[DENSE]:8.1f} us  {others}  target {aim.least:g}x{bound}", flush=True)

    def _measure_crossover(self, layer: Layer, dtype: str, pattern: str) -> None:
        """What "ours" chooses by: measured in this run, at other times than the row itself."""
        if (layer, dtype, pattern) in self.crossed:
            return
        self.crossed.add((layer, dtype, pattern))
        dense = torch.randn(layer.rows, layer.k, device=self.device).to(DTYPES[dtype])
        w = nms.compress(dense, pattern, prune=True)
        with contextlib.suppress(RuntimeError):  # no memory: the rules decide
            engines_cuda.measure_once(w, layer.tokens)

    def _compare(self, what: str, ratio: float, aim: layers.Target, terms: layers.Roofline) -> None:
        if self.dry or ratio * crossover.NOISE >= aim.least:
            return
        bound = "" if terms.bound is None else f"; the roofline allows {terms.bound:.2f}x ({terms.limit})"
        self.missed.append(f"{what}: {ratio:.2f}x, target {aim.least:g}x{bound}")

    def _times(self, calls: dict[str, Call], tokens: int) -> tuple[dict[str, list[float]], set[str]]:
        """Microseconds of each, and which were timed as graphs."""
        if self.dry:
            return timing.alternate(calls, rounds=2, milliseconds=0.0, batch=host_batch), set()
        graphs: dict[str, Callable[[int], object]] = {}  # of a call for each of a candidate's copies
        if tokens <= timing.GRAPH_TOKENS:
            for name, call in calls.items():
                try:
                    graphs[name] = timing.graphed(call, call.copies)  # type: ignore[attr-defined]
                except RuntimeError as error:  # torch's own path may synchronise; then it is timed as it is
                    print(f"  {name} cannot be captured: {str(error).splitlines()[0]}")
                    torch.cuda.synchronize()
        times = timing.alternate({**calls, **graphs}, rounds=ROUNDS)
        for name in graphs:
            times[name] = [value / calls[name].copies for value in times[name]]  # type: ignore[attr-defined]
        return times, set(graphs)

    def host_overhead(self) -> None:
        """Microseconds that a call costs on the host: of a product so small that the GPU waits."""
        rows, k, calls = 128, 128, 20 if self.dry else 500
        x = torch.randn(1, k, device=self.device).bfloat16()
        w = nms.compress(torch.randn(rows, k, device=self.device).bfloat16(), "2:4", prune=True)
        lt = cusparselt.pack(w)
        dense = w.to_dense()
        todo: dict[str, Callable[[], Any]] = {
            "F.linear, dense": lambda: F.linear(x, dense),
            "F.linear, packed": lambda: F.linear(x, w),
            "cusparselt.linear": lambda: cusparselt.linear(x, lt),
            "cusparselt.multiply": lambda: cusparselt.multiply(x, lt),
        }
        try:
            theirs = torch.sparse.to_sparse_semi_structured(dense)
            F.linear(x, theirs)
        except (RuntimeError, ValueError) as error:  # not on this card, or without one
            print(f"torch's 2:4 is left out of the host times: {str(error).strip().splitlines()[0]}")
        else:
            todo["F.linear, torch 2:4"] = lambda: F.linear(x, theirs)
        with torch.no_grad():
            for name, call in todo.items():
                rounds = []
                for _ in range(3 if self.dry else 9):
                    call()
                    self._wait()
                    start = time.perf_counter()
                    for _ in range(calls):
                        call()
                    rounds.append((time.perf_counter() - start) * 1e6 / calls)
                    self._wait()
                median = statistics.median(rounds)
                self.host.append({"call": name, "microseconds": median})
                ours = "dense" not in name and "torch" not in name
                late = ours and median > layers.HOST_MICROSECONDS
                if late and not self.dry:
                    self.missed.append(
                        f"{name}: {median:.1f} us on the host, target {layers.HOST_MICROSECONDS}"
                    )
                print(f"host: {name:22} {median:7.1f} us" + (" LATE" if late else ""), flush=True)

    def _wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def record(self) -> dict[str, Any]:
        """All of it, as plain JSON types."""
        return {
            "machine": {**machine(), "processor": self.gpu},
            "what": "Linear layers on a GPU: times as fast as cuBLAS, taken in turns in one process; random "
            "data; up to 256 tokens as CUDA graphs with weights from memory.",
            "dry_run": self.dry,
            "cuda": torch.version.cuda,
            "cusparselt": nms.build_info().cusparselt_version,
            "rows": self.rows,
            "host": self.host,
            "missed": self.missed,
            "left_out": self.left_out,
        }


def _seconds(microseconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(microseconds, n=4, method="inclusive")
    return {"median": median * 1e-6, "low": low * 1e-6, "high": high * 1e-6}


def work(arguments: argparse.Namespace) -> Iterator[tuple[Layer, int, str, str]]:
    """The rows to measure, the ones that say most first."""
    if arguments.dry_run:
        chosen, dtypes = layers.TINY, tuple(DTYPES)
    else:
        chosen = layers.QUICK if arguments.quick else layers.LAYERS
        dtypes = arguments.dtype or (
            ("bfloat16", "int8", "float8_e4m3fn") if arguments.quick else tuple(DTYPES)
        )
    for dtype in dtypes:
        for layer in chosen:
            for tokens in layer.tokens:
                if dtype in ("bfloat16", "float16") or tokens > 16:
                    yield layer, tokens, dtype, "2:4"
    for layer in chosen:
        if layer.rows * layer.k >= 4096 * 4096 or arguments.dry_run:
            for pattern in SMALL_PATTERNS[: 2 if arguments.quick else None]:
                for tokens in sorted({1, 16} & set(layer.tokens)):
                    yield layer, tokens, "bfloat16", pattern


def main(argv: list[str] | None = None) -> int:
    """Runs the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="where the results go")
    parser.add_argument(
        "--chart", type=Path, default=None, help="draw the crossovers there (needs matplotlib)"
    )
    parser.add_argument("--quick", action="store_true", help="a selection for a few minutes")
    parser.add_argument(
        "--seconds", type=float, default=0, help="rows that have not begun by then are left out"
    )
    parser.add_argument(
        "--dtype", action="append", choices=tuple(DTYPES), help="only this one; may be repeated"
    )
    parser.add_argument("--search", action="store_true", help="search for cuSPARSELt's algorithms first")
    parser.add_argument("--dry-run", action="store_true", help="every kind of row on the CPU, on tiny layers")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run:
        if not torch.cuda.is_available():
            parser.error("needs an NVIDIA GPU; --dry-run needs none")
        if not nms.build_info().cuda:
            parser.error("this build has no CUDA kernels")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.dry_run:
            stack.enter_context(as_on_a_gpu(folder / "crossovers.json"))
        bench = Bench(arguments)
        print(f"{bench.gpu}, torch {torch.__version__}", flush=True)
        if not arguments.dry_run:
            # What this run finds, and nothing older.
            crossover.set_table(folder / "crossovers.json")
            cusparselt.set_search_mode("file", path=folder / "algorithms.json")
        try:
            bench.host_overhead()
            for layer, tokens, dtype, pattern in work(arguments):
                bench.row(layer, tokens, dtype, pattern)
        except KeyboardInterrupt:  # the time is up: what there is counts
            bench.left_out.append("all that would have come after an interrupt")
    record = bench.record()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.chart is not None:
        from plot_gpu_linear import draw

        draw(record, arguments.chart)
    for line in bench.left_out:
        print(f"left out: {line}")
    print("\n".join(["missed targets:", *bench.missed]) if bench.missed else "all targets met")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
