"""Which pattern does a trained weight hold?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..pattern import Pattern

#: What is looked for when no scheme is given, in this order: lowest density first, then the smallest m. The
#: first that holds is the tightest description of the weight; a 2:4 weight also satisfies 4:8, but not the
#: other way round.
USUAL_PATTERNS: tuple[Pattern, ...] = tuple(
    sorted(
        (Pattern(n, m) for m in (2, 4, 8, 16, 32) for n in (1, 2, 4, 8, 16) if 2 * n <= m),
        key=lambda pattern: (pattern.density, pattern.m),
    )
)


def detect_pattern(
    w: Tensor, *, dim: int = 1, allowed: Callable[[Pattern], bool] = lambda pattern: True
) -> Pattern | None:
    """Finds the tightest of the usual patterns that a weight satisfies.

    Args:
        w: The dense weight.
        dim: The dim that groups run along.
        allowed: Further condition on a pattern, for example that its groups fit a grouped convolution.

    Returns:
        The first of `USUAL_PATTERNS` that ``w`` satisfies and whose m divides the size of ``dim``; ``None``
        if there is none. An all-zero weight satisfies every pattern and has none: it is not pruned but not
        trained.
    """
    if w.numel() == 0 or not has_nonzero(w):
        return None
    for pattern in USUAL_PATTERNS:
        if w.shape[dim] % pattern.m or not allowed(pattern):
            continue
        if ops.find_violation(w, pattern, dim=dim) is None:
            return pattern
    return None


def has_nonzero(w: Tensor) -> bool:
    """Whether any entry is not zero. NaN is not zero."""
    if w.dtype == torch.float8_e4m3fn:  # has no arithmetic of its own
        w = w.to(torch.float32)
    return bool(w.any())
