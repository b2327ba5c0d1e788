"""What the CPU benches share: cold buffers, alternating timing, ceilings, records.

Memory speed of a shared or virtual machine drifts within minutes, so no number means much alone. The
benches therefore time everything that is compared in one process, call by call in turn, and report ratios.
Buffers rotate, so that what a call reads was last touched several hundred megabytes ago: weights come from
memory, not from a cache.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _build
from nmsparse_ext._machine import machine as machine
from nmsparse_ext.recipes.timing import threads as threads

COLD_BYTES = 256 << 20
RESULTS = Path(__file__).resolve().parent / "results"


# ------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in seconds.

    Attributes:
        best: The shortest.
        low: The lower quartile, which ratios are made of: disturbances only ever lengthen a call.
        median: The median.
        high: The upper quartile.
        rounds: How many there were.
    """

    best: float
    low: float
    median: float
    high: float
    rounds: int

    @property
    def disturbed(self) -> bool:
        """True when lower quartile and median differ so much that the machine was not quiet."""
        return self.median > 1.2 * self.low

    def to_json(self) -> dict[str, float]:
        """Median and middle half, as ``make_readme_table.py`` prints them, and what ratios are made of."""
        return {"median": self.median, "low": self.low, "high": self.high, "best": self.best}


def timing_of(seconds: list[float]) -> Timing:
    """The summary of a list of measured times."""
    if len(seconds) == 1:
        return Timing(*seconds * 4, rounds=1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(min(seconds), low, median, high, len(seconds))


def alternate(
    calls: Mapping[str, Callable[[int], object]], *, rounds: int, rare: Mapping[str, int] | None = None
) -> dict[str, Timing]:
    """Times several calls in turn, round after round.

    Args:
        calls: Name -> call. Its argument is a number that grows by one with every call of any of them; cold
            buffers are chosen by it.
        rounds: How often each is timed.
        rare: Name -> rounds, for calls so slow that they would dominate the run.

    Returns:
        Name -> timing, in the order given.
    """
    rare = rare or {}
    numbers = itertools.count()
    for call in calls.values():
        call(next(numbers))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name, call in calls.items():
            if done >= rare.get(name, rounds):
                continue
            number = next(numbers)
            start = time.perf_counter()
            call(number)
            seconds[name].append(time.perf_counter() - start)
    return {name: timing_of(values) for name, values in seconds.items()}


class Rotation:
    """Copies of a tensor, enough of them that each is cold when its turn comes."""

    def __init__(self, make: Callable[[], Tensor], *, at_least: int = 2) -> None:
        first = make()
        count = max(at_least, -(-COLD_BYTES // max(1, first.numel() * first.element_size())))
        self._tensors = [first] + [make() for _ in range(count - 1)]

    def __getitem__(self, number: int) -> Tensor:
        return self._tensors[number % len(self._tensors)]

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def cpu_isa(isa: str) -> Iterator[None]:
    """Run the block with the kernels of one instruction set, then put the old ones back."""
    extension = _build.extension
    if extension is None:
        raise RuntimeError("there are no compiled kernels to choose from")
    before = extension.cpu_isa()
    extension.set_cpu_isa(isa)
    try:
        yield
    finally:
        extension.set_cpu_isa(before)


@contextmanager
def reused_memory() -> Iterator[None]:
    """Run the block with a C library that keeps freed memory instead of giving it back to the system.

    Where an op has no ``out=``, its time is else mostly that of the system, which hands out every page of a
    large new tensor zeroed. Programs with a caching allocator do not pay that; nor does anybody in the block.
    """
    glibc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    if glibc is not None:
        glibc.mallopt(mmap_threshold, 1 << 30)
        glibc.mallopt(trim_threshold, (1 << 31) - 1)
    try:
        yield
    finally:
        if glibc is not None:
            glibc.mallopt(mmap_threshold, 128 << 10)
            glibc.mallopt(trim_threshold, 128 << 10)


# ----------------------------------------------------------------------------------------------- ceilings


class Ceiling:
    """Plain memory traffic, as fast as this machine does it: a copy past the cache, and a read.

    Compiled when it is made, and run on the same OpenMP threads as torch.
    """

    def __init__(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
        source = Path(__file__).resolve().parent / "native" / "stream_copy.cpp"
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "stream_copy.so"
            subprocess.run(
                [
                    compiler,
                    "-std=c++17",
                    "-O3",
                    "-fopenmp",
                    "-shared",
                    "-fPIC",
                    str(source),
                    "-o",
                    str(library),
                ],
                check=True,
            )
            self._library = ctypes.CDLL(str(library))
        self._library.stream_read.restype = ctypes.c_int64

    def copy(self, src: Tensor, dst: Tensor) -> None:
        """Copies ``src`` to ``dst`` with non-temporal stores; both contiguous, whole 64 KiB."""
        self._library.stream_copy(*_pointers(src, dst), _bytes(src), torch.get_num_threads())

    def read(self, src: Tensor) -> None:
        """Reads ``src``, whole 64 KiB."""
        self._library.stream_read(*_pointers(src), _bytes(src), torch.get_num_threads())


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _bytes(tensor: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(tensor.numel() * tensor.element_size())


# ------------------------------------------------------------------------------------------------ records


class Report:
    """The rows of a bench: printed as they come, compared with their goals, written as JSON at the end."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.rows: list[dict[str, Any]] = []
        self.others: dict[str, list[dict[str, Any]]] = {}
        self.missed: list[str] = []
        self.disturbed = 0

    def watch(self, timings: Mapping[str, Timing]) -> None:
        """Counts timings that show another load on the machine."""
        self.disturbed += sum(timing.disturbed for timing in timings.values())

    def goal(self, name: str, value: float, at_least: float) -> str:
        """``value`` as text, marked where it misses its goal."""
        met = value >= at_least
        if not met:
            self.missed.append(f"{name}: {value:.3g}, goal {at_least:.3g}")
        return f"{value:7.3g} {'ok' if met else 'LOW'} (>= {at_least:g})"

    def finish(self, path: Path | None) -> int:
        """Writes the file, lists the missed goals; returns the exit code."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {
                "machine": machine(),
                "what": self.what,
                "rows": self.rows,
                "others": self.others,
                "missed": self.missed,
                "disturbed": self.disturbed,
            }
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"\nwritten to {path}")
        if self.disturbed:
            print(f"{self.disturbed} timings were disturbed: the machine was not quiet")
        print("\n".join(["missed goals:", *self.missed]) if self.missed else "all goals met")
        return 0


def arguments(description: str, default: str) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=RESULTS / default, help="where the results go")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="PyTorch threads")
    parser.add_argument("--rounds", type=int, default=15, help="how often each call is timed")
    return parser


def require_kernels() -> None:
    """Ends the program where there is nothing compiled to measure."""
    if nms.build_info().reference:
        sys.exit(f"nothing to measure, the ops run in pure PyTorch: {nms.build_info().reference_reason}")
