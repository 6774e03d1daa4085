"""Where a step's wall time went, by stage, from intervals on one clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean

Interval = tuple[float, float]

REMEMBERED = 10
"""Windows."""

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
    clipped = {stage: _clipped(window, intervals.get(stage, ())) for stage in STAGES[:-1]}
    edges = sorted({start, end, *(edge for spans in clipped.values() for span in spans for edge in span)})
    seconds = dict.fromkeys(STAGES, 0.0)
    for left, right in pairwise(edges):
        middle = (left + right) / 2
        covering = (stage for stage in clipped if any(a <= middle < b for a, b in clipped[stage]))
        seconds[next(covering, "waiting")] += right - left
    return seconds


class Efficiency:
    """Share of window after window in which workers were at work, mean over workers.

    Work is known when it has ended. What was done in an earlier window and is known only now counts now, so that one window's
    share may be above 1 while the mean over windows is right. A worker of whom nothing came for REMEMBERED windows is forgotten.

    Example:
        share((0, 10), {"trainer": [(6, 9)], "rollout-0": [(1, 5), (4, 7)]}) is (3 + 6) / 20; then
        share((10, 20), {"trainer": [(16, 19)], "rollout-0": [(7, 15)]}) is (3 + 8) / 20.
    """

    def __init__(self) -> None:
        self._windows: list[Interval] = []
        self._work: dict[str, list[Interval]] = {}
        self._counted: dict[str, float] = {}
        """Seconds of a worker's work within the remembered windows that a share was made of."""

    def share(self, window: Interval, work: Mapping[str, Iterable[Interval]]) -> float:
        """Of a window that ends now, and the work that has become known since the last one, by worker.

        Args:
            window: (start, end) in seconds, not before the last one's end.
            work: worker -> intervals, which may overlap and reach outside the window.
        """
        self._windows.append(window)
        for worker, intervals in work.items():
            self._work.setdefault(worker, []).extend(intervals)
        done = {worker: self._seconds(worker) - self._counted.get(worker, 0.0) for worker in self._work}
        self._forget()
        return fmean(done.values()) / (window[1] - window[0])

    def _forget(self) -> None:
        self._windows = self._windows[-REMEMBERED:]
        oldest = self._windows[0][0]
        kept = {worker: [span for span in spans if span[1] > oldest] for worker, spans in self._work.items()}
        self._work = {worker: spans for worker, spans in kept.items() if spans}
        self._counted = {worker: self._seconds(worker) for worker in self._work}

    def _seconds(self, worker: str) -> float:
        return sum(_covered(_clipped(window, self._work[worker])) for window in self._windows)


def _clipped(window: Interval, intervals: Iterable[Interval]) -> list[Interval]:
    start, end = window
    return [(max(a, start), min(b, end)) for a, b in intervals if b > start and a < end]


def _covered(intervals: Iterable[Interval]) -> float:
    """Length of the union."""
    covered, reached = 0.0, float("-inf")
    for a, b in sorted(intervals):
        covered += max(0.0, b - max(a, reached))
        reached = max(reached, b)
    return covered
