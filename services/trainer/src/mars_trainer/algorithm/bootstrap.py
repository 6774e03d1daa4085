"""Confidence intervals of means by resampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean (Efron); the same values and seed give the same interval.

    Pair what belongs together before: the interval of a difference is that of the differences.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    sample, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = sample[rng.integers(0, len(sample), (resamples, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
