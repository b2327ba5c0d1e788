"""Timing alternatives of one layer on the inputs that really reach it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 9
_MIN_SECONDS = 1e-3  # of one timing: well above the clock's grain and a scheduler's hiccup


def alternate(
    calls: dict[str, Callable[[], object]], device: torch.device, *, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Times calls in turn, so that a slow moment of the machine hits all of them alike.

    Args:
        calls: ``{name: call}``. Each is run once first, which also shows whether it works.
        device: Where they run; an accelerator is waited for.
        rounds: How often each is timed.

    Returns:
        ``{name: median seconds per call}``, with warm caches.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once = _seconds(call, 1, device)
        counts[name] = max(1, min(1000, round(_MIN_SECONDS / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, counts[name], device))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
