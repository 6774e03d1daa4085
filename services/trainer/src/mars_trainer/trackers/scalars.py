"""The numbers that trackers show, by slash name, from events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def step_scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """A `step` event's metrics, and seconds/<stage>."""
    return {**event["metrics"], **{f"seconds/{stage}": seconds for stage, seconds in event["seconds"].items()}}


def evaluation_scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """An `evaluation` event's results: eval/multi and so on over all samples, eval/<dataset>/multi over a dataset's."""
    scalars = _results("eval", event)
    for name, results in event["datasets"].items():
        scalars |= _results(f"eval/{name}", results)
    return scalars


def _results(prefix: str, results: Mapping[str, Any]) -> dict[str, float]:
    names = ("multi", "union", "multi_minus_union", "correct", "parsed")
    return {
        **{f"{prefix}/{name}": results[name] for name in names},
        **{f"{prefix}/mono/{source}": value for source, value in results["mono"].items()},
    }
