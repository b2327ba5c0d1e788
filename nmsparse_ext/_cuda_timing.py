"""Timing on a GPU, by its own clock, with what is compared taken in turns."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping

import torch

ROUNDS = 7
#: Of one timing: one call is too short for the clock between two events.
MILLISECONDS = 0.5
_MAX_CALLS = 200
#: Products of so many tokens may take less time than their calls do on the host: they are timed as graphs.
GRAPH_TOKENS = 256


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS and cuSPARSELt keep scratch memory for each stream that they have seen."""
    return torch.cuda.Stream(device)


def graphed(call: Callable[[int], object], calls: int) -> Callable[[int], object]:
    """A batch of calls as a CUDA graph: what replays it, with none of the host's time but that of the launch.

    Args:
        call: What runs; its argument grows by one from call to call. It runs as often beforehand.
        calls: How many.

    Raises:
        RuntimeError: Something in it cannot be captured.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
        # Not torch.cuda.graph(), which collects garbage and empties torch's cache of memory each time.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(calls):
                call(i)
        finally:
            graph.capture_end()
    return lambda _: graph.replay()


def batch_microseconds(call: Callable[[int], object], calls: int, first: int = 0) -> float:
    """Microseconds per call of a batch of calls on the current stream.

    Args:
        call: What runs; its argument grows by one from call to call, to choose cold buffers by.
        calls: How many.
        first: The first argument.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(first, first + calls):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def alternate(
    calls: Mapping[str, Callable[[int], object]],
    *,
    rounds: int = ROUNDS,
    milliseconds: float = MILLISECONDS,
    batch: Callable[[Callable[[int], object], int, int], float] = batch_microseconds,
) -> dict[str, list[float]]:
    """Microseconds per call in every round, the calls taking turns.

    Args:
        calls: ``{name: call}``; see `batch_microseconds`. Each runs three times first, to be warm.
        rounds: How often each is timed.
        milliseconds: How long a timing takes, about.
        batch: What times a batch; tests put another in its place.

    Returns:
        ``{name: microseconds of each round}``.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call(0)
        once = batch(call, 2, 1)
        counts[name] = max(1, min(_MAX_CALLS, round(milliseconds * 1e3 / max(once, 0.1))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    number = 3
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(batch(call, counts[name], number))
            number += counts[name]
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in times.items()}
