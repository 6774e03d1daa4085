"""Means over seeds with Student's t intervals, and Welch's interval of a difference. Pure functions.

    mean of n values:         m ± t(0.975, n - 1) * s / sqrt(n)                 s: standard deviation, ddof 1
    difference of two means:  (m2 - m1) ± t(0.975, v) * sqrt(a + b)             a = s1² / n1, b = s2² / n2
                              v = (a + b)² / (a² / (n1 - 1) + b² / (n2 - 1))    (Welch, Satterthwaite)

One value says nothing of how much seeds differ, so that there is no interval then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, variance

from pydantic import BaseModel, ConfigDict

LEVEL = 0.95
SIMPSON_PARTS = 2000
TOLERANCE = 1e-10


class Estimate(BaseModel):
    """A mean, or a difference of means, of `n` values (the smaller of the two numbers), with a 95 % interval if n > 1."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed.

    Raises:
        ValueError: no values.

    Example:
        mean_estimate([0.70, 0.74, 0.78]) is 0.74 with 0.6406 to 0.8394: 4.3027 * 0.04 / sqrt(3) = 0.0994
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    if len(values) == 1:
        return Estimate(mean=values[0], low=None, high=None, n=1)
    mean, n = fmean(values), len(values)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * math.sqrt(variance(values) / n)
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


def difference_estimate(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """By which the mean of `after` is above that of `before`; their variances may differ.

    Raises:
        ValueError: one of them has no values.
    """
    if not before or not after:
        raise ValueError(f"expected values on both sides, got {len(before)} and {len(after)}")
    mean, n = fmean(after) - fmean(before), min(len(before), len(after))
    if n == 1:
        return Estimate(mean=mean, low=None, high=None, n=1)
    a, b = variance(before) / len(before), variance(after) / len(after)
    if a + b == 0:
        return Estimate(mean=mean, low=mean, high=mean, n=n)
    freedom = max(1.0, (a + b) ** 2 / (a**2 / (len(before) - 1) + b**2 / (len(after) - 1)))
    half = t_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(a + b)
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


@lru_cache(maxsize=1024)
def t_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t.

    It is between that of the normal distribution (infinitely many degrees of freedom) and that of Cauchy's (one): found there by
    halving, the probability by Simpson's rule on the density.

    Args:
        probability: above 0.5, below 1.
        freedom: degrees of freedom, at least 1; need not be whole.

    Raises:
        ValueError: outside of these bounds.
    """
    if not 0.5 < probability < 1 or freedom < 1:
        raise ValueError(f"expected 0.5 < probability < 1 and freedom >= 1, got {probability} and {freedom}")
    low, high = NormalDist().inv_cdf(probability), math.tan(math.pi * (probability - 0.5))
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        if 0.5 + _above_zero(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _above_zero(bound: float, freedom: float) -> float:
    """The probability of a t between 0 and a bound."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    width = bound / SIMPSON_PARTS
    heights = [math.pow(1 + (place * width) ** 2 / freedom, -(freedom + 1) / 2) for place in range(SIMPSON_PARTS + 1)]
    return scale * width / 3 * (heights[0] + heights[-1] + 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2]))
