"""Paired comparisons over seeds: interval, test, and the correction for many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """How much one way of training differs from another, over runs of the same seeds.

    Attributes:
        mean: Mean of the differences a - b.
        low: Lower end of the interval of the mean (Student's t).
        high: Upper end.
        effect: The mean in standard deviations of the differences (Cohen's d for pairs).
        p: Two-sided p-value of the paired t test.
        p_signs: Two-sided p-value of the exact sign-flip test, which assumes no distribution. With n pairs it
            cannot fall below 2 / 2^n.
        pairs: Number of pairs.
    """

    mean: float
    low: float
    high: float
    effect: float
    p: float
    p_signs: float
    pairs: int


def compare(a: Sequence[float], b: Sequence[float], alpha: float = 0.05) -> Paired:
    """Compare two ways of training, pair by pair.

    Args:
        a: Figures of one, in order of the seeds.
        b: Figures of the other, for the same seeds.
        alpha: One minus the interval's level.

    Returns:
        The comparison of a - b. Differences that are all the same have an interval of no width and p = 0, or
        p = 1 if they are all zero.

    Raises:
        ValueError: If there are fewer than two pairs, or the numbers of figures differ.
    """
    from scipy import stats

    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a and b must be pairs, two or more, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        same = mean == 0
        return Paired(
            mean, mean, mean, 0.0 if same else math.copysign(math.inf, mean), float(same), 1.0, len(a)
        )
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(1 - alpha)
    flips = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        n_resamples=math.inf if len(a) <= 16 else 9999,
        rng=0,
        vectorized=True,
    )
    return Paired(
        mean,
        float(interval.low),
        float(interval.high),
        mean / spread,
        float(test.pvalue),
        float(flips.pvalue),
        len(a),
    )


def mean_interval(values: Sequence[float], alpha: float = 0.05) -> tuple[float, float]:
    """Mean of the values, and half the width of its interval (Student's t; 0 for a single value)."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(1 - alpha / 2, len(values) - 1)) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method, in the order given.

    At level alpha, the chance that any true null hypothesis is rejected stays below alpha.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
