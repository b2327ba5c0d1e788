"""Learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """A factor for ``LambdaLR``: rises linearly over `warmup` steps, then falls to 0 along half a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor
