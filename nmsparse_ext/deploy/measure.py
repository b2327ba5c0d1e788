"""Timing alternatives of one layer, or of a model, on the inputs that really reach it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_ROUNDS = 9
_MIN_SECONDS = 1e-3  # of one timing: well above the clock's grain and a scheduler's hiccup
_USUAL_CACHE = 32 << 20  # where the system does not say


def alternate(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    before: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Times calls in turn, so that a slow moment of the machine hits all of them alike.

    Args:
        calls: ``{name: call}``. Each is run once first, which also shows whether it works.
        device: Where they run; an accelerator is waited for.
        rounds: How often each is timed.
        before: Runs before each timing, which then is of a single call. ``None``: of as many calls as take
            a millisecond, with warm caches.

    Returns:
        ``{name: median seconds per call}``.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once = _seconds(call, 1, device)
        counts[name] = 1 if before else max(1, min(1000, round(_MIN_SECONDS / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if before is not None:
                before()
            seconds[name].append(_seconds(call, counts[name], device))
    return {name: statistics.median(times) for name, times in seconds.items()}


@functools.cache
def last_level_cache() -> int:
    """Bytes of the CPU's last level cache."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=_USUAL_CACHE)


class Flush:
    """Empties the CPU's caches, as the other layers of a large model do between two calls of one."""

    def __init__(self) -> None:
        self._other = torch.ones(2 * last_level_cache() // 4)

    def __call__(self) -> None:
        """Reads twice what the last level cache holds: written lines would have to go back first."""
        self._other.sum()


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
