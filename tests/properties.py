"""Property tests: any weight that the ops take, found by hypothesis.

The generators draw from a ``random.Random``. Hypothesis brings one whose draws it replays and shrinks; where
it is not installed, such as on a borrowed GPU machine, seeds do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from cases import DTYPES
from samples import KINDS, LAYOUTS, content, lay_out
from torch import Tensor

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None

EXAMPLES = 40  # without hypothesis; conftest.py sets as many with it
USUAL_PATTERNS = ((2, 4), (1, 4), (1, 2), (4, 8), (2, 8), (1, 16), (4, 16), (8, 16), (8, 32), (16, 64))


def for_any(**generators: Callable[[Random], Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on many draws of the named arguments."""
    if hypothesis:
        randoms = hypothesis.strategies.randoms(use_true_random=False)
        return hypothesis.given(**{name: randoms.map(draw) for name, draw in generators.items()})

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for seed in range(EXAMPLES):
                test(
                    **fixtures, **{name: draw(Random(f"{name} {seed}")) for name, draw in generators.items()}
                )

        signature = inspect.signature(test)
        fixtures = [p for name, p in signature.parameters.items() if name not in generators]
        run.__signature__ = signature.replace(parameters=fixtures)  # what pytest shall pass
        return run

    return decorate


def integers(low: int, high: int) -> Callable[[Random], int]:
    """Integers from ``low`` to ``high``, both included."""
    return lambda random: random.randint(low, high)


def seeds(random: Random) -> int:
    """Seeds of torch generators."""
    return random.randrange(2**31)


class Weight(NamedTuple):
    """A weight, and how to group it. ``dim`` is normalised."""

    w: Tensor
    n: int
    m: int
    dim: int
    label: str

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def k(self) -> int:
        return self.w.shape[self.dim]

    def last(self, x: Tensor) -> Tensor:
        """``x`` of the weight's shape with the group dim moved last."""
        return x.movedim(self.dim, -1)


def patterns(random: Random) -> tuple[int, int]:
    """The usual patterns often, all others sometimes."""
    if random.random() < 0.5:
        return random.choice(USUAL_PATTERNS)
    m = random.randint(1, 64)
    return random.randint(1, m), m


def weights(
    dtypes: tuple[torch.dtype, ...] = DTYPES, layouts: tuple[str, ...] = LAYOUTS, min_k: int = 0
) -> Callable[[Random], Weight]:
    """Any weight that the ops take; group dims around every vector width, few of the rest."""

    def draw(random: Random) -> Weight:
        n, m = patterns(random)
        ndim = random.randint(1, 5)
        dim = random.randrange(ndim)
        shape = [random.randint(1, 4) for _ in range(ndim)]
        if random.randrange(10) == 0:
            shape[random.randrange(ndim)] = 0
        shape[dim] = random.randint(min_k, 130)
        dtype, kind, layout = random.choice(dtypes), random.choice(KINDS), random.choice(layouts)
        w = lay_out(content(tuple(shape), dtype, kind, seeds(random)), layout)
        return Weight(w, n, m, dim, f"{n}:{m} {dtype} {shape} {layout} {kind} dim {dim}")

    return draw


def kept_by_hand(row: list[float], n: int, m: int) -> list[bool]:
    """The selection rule in plain Python."""
    kept = [False] * len(row)
    for start in range(0, len(row), m):
        group = range(start, min(start + m, len(row)))
        # NaN first, then by |w|, then by position
        order = sorted(group, key=lambda i: (row[i] == row[i], -abs(row[i]) if row[i] == row[i] else 0.0, i))
        for i in order[:n]:
            kept[i] = True
    return kept
