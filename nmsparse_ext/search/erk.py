"""Erdős-Rényi-Kernel (ERK): how many weights of each layer are kept if small layers are to keep more.

The density of a weight is proportional to ``sum(shape) / prod(shape)``, kernel dims included, and what would
be more than 1 is dense (Evci et al. 2020, "Rigging the Lottery"; Mocanu et al. 2018 for the original without
kernels). DominoSearch steers by it; rounded to N:M it is a scheme of its own, made in no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from ..pattern import Pattern


class Erk(NamedTuple):
    """What `erk_densities` returns.

    Attributes:
        epsilon: The factor of proportion.
        densities: ``{name: density}``, in the order of the shapes.
    """

    epsilon: float
    densities: dict[str, float]


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float, *, dense: Collection[str] = ()) -> Erk:
    """Distributes kept weights over layers: ``density_l = epsilon * sum(shape_l) / prod(shape_l)``.

    Args:
        shapes: ``{name: shape of the weight}``.
        density: The part of all these weights that is kept, in (0, 1].
        dense: Names of those that are dense whatever their shape. Layers of which more than everything would
            be kept join them one by one, largest first, and epsilon is found anew.

    Returns:
        Epsilon and the densities. ``sum(density_l * prod(shape_l))`` is ``density`` of all weights, rounded
        up to whole ones layer by layer. Where all of them are dense, epsilon is infinite.

    Raises:
        ValueError: If ``density`` is out of range, a name in ``dense`` is unknown, a shape is not one of
            positive sizes, or what is dense is more than ``density`` already.

    Example:
        >>> erk_densities({"conv": (16, 16, 3, 3), "fc": (64, 32)}, 0.5).densities
        {'conv': 0.36666666666666664, 'fc': 0.6500000000000001}
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be more than 0 and at most 1, got {density}")
    for name, shape in shapes.items():
        if not shape or any(size <= 0 for size in shape):
            raise ValueError(f"shapes must have positive sizes, got {tuple(shape)} for {name}")
    if unknown := set(dense) - set(shapes):
        raise ValueError(f"dense must name weights of shapes, got {', '.join(sorted(unknown))}")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    sums = {name: sum(shape) for name, shape in shapes.items()}
    whole = set(dense)
    # In whole weights, as the authors count: of a layer of average density, floor((1 - density) * size) go.
    kept = sum(size - math.floor((1 - density) * size) for size in sizes.values())
    while True:
        rest = [name for name in shapes if name not in whole]
        left = kept - sum(sizes[name] for name in whole)
        if left < -1e-9 * kept:
            raise ValueError(
                f"density must be at least {(kept - left) / sum(sizes.values()):.4g}, which is what stays "
                f"dense, got {density:.4g}"
            )
        if not rest:
            return Erk(math.inf, dict.fromkeys(shapes, 1.0))
        epsilon = max(left, 0.0) / sum(sums[name] for name in rest)
        raw = {name: sums[name] / sizes[name] for name in rest}
        most = max(raw.values())
        if epsilon * most <= 1:
            return Erk(epsilon, {name: epsilon * raw[name] if name in raw else 1.0 for name in shapes})
        whole.update(name for name in rest if raw[name] == most)


def round_densities(
    densities: Mapping[str, float],
    candidates: Mapping[str, Sequence[Pattern]],
    fits: Callable[[Mapping[str, Pattern]], bool],
) -> dict[str, Pattern]:
    """Rounds densities to patterns, so that the whole fits.

    First each density is rounded to the candidate that it differs least from, as a ratio. While the whole
    does not fit, the weight that is furthest above its density (as a ratio) goes one candidate down. Then,
    while there is room, the weight that is furthest below goes one candidate up, if the whole still fits. Of
    equals, the first is taken.

    Args:
        densities: ``{name: density}``, each in (0, 1].
        candidates: ``{name: patterns}`` of the same names: one or more, by ascending density.
        fits: Whether patterns for all names are within the budget; fewer kept weights fit rather than more.

    Raises:
        ValueError: If the sparsest candidates do not fit.
    """
    levels = {name: _nearest(candidates[name], density) for name, density in densities.items()}

    def patterns() -> dict[str, Pattern]:
        return {name: candidates[name][level] for name, level in levels.items()}

    def excess(name: str, step: int) -> float:
        return candidates[name][levels[name] + step].density / densities[name]

    while not fits(patterns()):
        lower = [name for name, level in levels.items() if level > 0]
        if not lower:
            raise ValueError("budget cannot be met: not even the sparsest candidates of all weights fit")
        levels[max(lower, key=lambda name: excess(name, 0))] -= 1
    full: set[str] = set()
    while upper := [n for n, level in levels.items() if n not in full and level + 1 < len(candidates[n])]:
        name = min(upper, key=lambda name: excess(name, 1))
        levels[name] += 1
        if not fits(patterns()):
            levels[name] -= 1
            full.add(name)
    return patterns()


def _nearest(candidates: Sequence[Pattern], density: float) -> int:
    """Which of the candidates differs least from a density, as a ratio; of equals, the first."""
    ratios = [abs(math.log(pattern.density / density)) for pattern in candidates]
    return ratios.index(min(ratios))
