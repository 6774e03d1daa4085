"""Where a step's wall time went, by stage, from intervals on one clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

Interval = tuple[float, float]

STAGES = ("training", "weight_push", "generation", "reward", "waiting")


def stage_seconds(window: Interval, intervals: Mapping[str, Iterable[Interval]]) -> dict[str, float]:
    """Split a window into stages; each instant counts once, for the first stage of STAGES that covers it.

    Args:
        window: (start, end) in seconds.
        intervals: stage -> intervals, which may overlap and reach outside the window.

    Returns:
        seconds by stage, "waiting" for what none covers; they sum to the window's length.

    Example:
        stage_seconds((0, 10), {"training": [(6, 9)], "generation": [(1, 5), (4, 7)]}) gives
        training 3, generation 5 (1 to 6), waiting 2.
    """
    start, end = window
    clipped = {
        stage: [(max(a, start), min(b, end)) for a, b in intervals.get(stage, ()) if b > start and a < end]
        for stage in STAGES[:-1]
    }
    edges = sorted({start, end, *(edge for spans in clipped.values() for span in spans for edge in span)})
    seconds = dict.fromkeys(STAGES, 0.0)
    for left, right in pairwise(edges):
        middle = (left + right) / 2
        covering = (stage for stage in clipped if any(a <= middle < b for a, b in clipped[stage]))
        seconds[next(covering, "waiting")] += right - left
    return seconds
