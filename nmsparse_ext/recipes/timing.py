"""Side-by-side timing for the recipes.

The benches under ``bench/`` measure single operations with cold caches. This file is for the demo: a handful
of calls of everything, in turn, so that a slow moment of the machine hits all candidates alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in seconds: the median and the middle half of all rounds."""

    name: str
    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int

    def to_json(self) -> dict:
        """Plain JSON types."""
        return dict(vars(self))


def alternate(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, repeats: Mapping[str, int] | None = None
) -> dict[str, Timing]:
    """Time several calls in turn, round after round.

    Args:
        calls: Name -> call. Each is run once before timing starts.
        rounds: How often each is timed.
        repeats: Name -> calls per timing, for calls too short to time alone; the time is per call.

    Returns:
        Name -> timing, in the order given.
    """
    repeats = repeats or {}
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count = repeats.get(name, 1)
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: _summary(name, values) for name, values in seconds.items()}


def _summary(name: str, values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(name, values[0], values[0], values[0], len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(name, statistics.median(values), low, high, len(values))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with `count` PyTorch threads, then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
