"""Metrics over steps, kept in columns and thinned out for a page: at most POINTS values a curve, each the mean of equally many steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from pydantic import BaseModel

POINTS = 500


class Curves(BaseModel):
    """`metrics` by name, a value for every entry of `steps` (the last step of its bin); None where no step of a bin has it."""

    steps: list[int]
    metrics: dict[str, list[float | None]]
    seconds: dict[str, list[float | None]]
    """Wall seconds a step, by stage."""


class StepTable:
    """All steps of a run, eight bytes a number."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, dict[str, array[float]]] = {"metrics": {}, "seconds": {}}

    def add(self, event: Mapping[str, Any]) -> None:
        """Take up a `step` event; one that a restart repeats ends what was known from there on."""
        while self._steps and self._steps[-1] >= event["step"]:
            self._drop_last()
        for field, columns in self._columns.items():
            for name in event[field]:
                if name not in columns:
                    columns[name] = array("d", [math.nan] * len(self._steps))
            for name, column in columns.items():
                column.append(event[field].get(name, math.nan))
        self._steps.append(event["step"])

    def __len__(self) -> int:
        return len(self._steps)

    def curves(self, points: int = POINTS) -> Curves:
        """Of all steps so far."""
        size = -(-len(self._steps) // points) or 1
        starts = range(0, len(self._steps), size)
        thinned = {
            field: {name: [_mean(column[start : start + size]) for start in starts] for name, column in columns.items()}
            for field, columns in self._columns.items()
        }
        return Curves(steps=[self._steps[start : start + size][-1] for start in starts], **thinned)

    def _drop_last(self) -> None:
        self._steps.pop()
        for columns in self._columns.values():
            for column in columns.values():
                column.pop()


def curves_of(events: Iterable[Mapping[str, Any]], points: int = POINTS) -> Curves:
    """Of `step` events, in order."""
    table = StepTable()
    for event in events:
        table.add(event)
    return table.curves(points)


def _mean(values: array[float]) -> float | None:
    numbers = [value for value in values if not math.isnan(value)]
    return fmean(numbers) if numbers else None
