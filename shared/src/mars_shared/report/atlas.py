"""The conflict atlas: where a single source earned more than all sources together. Pure functions of groups' facts.

A group loses to a source if its mean multi-source reward is below that source's mean reward: gain_by_source < 0. The deficit is
that gain without its sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mars_shared.records.segments import Line

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """How many of some groups lose to a source, and by how much reward on average, if any does."""

    groups: int
    losing: int
    deficit: float | None

    @property
    def rate(self) -> float | None:
        """A fraction; None without groups."""
        return self.losing / self.groups if self.groups else None


@dataclass(frozen=True)
class Cell:
    """A dataset's groups that were asked from one source."""

    dataset: str
    source: str
    all: Share
    first: Share
    """Those of the first part: the first third of training, or the first evaluation."""
    last: Share

    @property
    def change(self) -> float | None:
        """By which the rate rose from the first part to the last; None where one of them has no groups."""
        return None if self.first.rate is None or self.last.rate is None else self.last.rate - self.first.rate


def training_atlas(facts: Sequence[Facts]) -> list[Cell]:
    """Of training groups: all of them, and those of the first and the last third of the steps."""
    steps = [each["step"] for each in facts if each["occasion"] == "step"]
    first, last = thirds(steps)
    return _atlas([each for each in facts if each["occasion"] == "step"], first, last)


def evaluation_atlas(facts: Sequence[Facts]) -> list[Cell]:
    """Of held-out samples: all evaluations, the first, and the last one."""
    evaluated = [each for each in facts if each["occasion"] == "evaluation"]
    steps = [each["step"] for each in evaluated]
    return _atlas(evaluated, min(steps, default=0), max(steps, default=0))


def thirds(steps: Sequence[int]) -> tuple[int, int]:
    """The last step of the first third of training and the first step of its last third.

    >>> thirds([1, 2, 3, 4, 5, 6])
    (2, 5)
    """
    newest = max(steps, default=0)
    return newest // 3, newest - newest // 3 + 1


def worst(lines: Sequence[Line], source: str, count: int) -> list[Line]:
    """Training groups that lose most to a source: those of the last third first, then by deficit."""
    training = [line for line in lines if line.facts["occasion"] == "step"]
    late = thirds([line.facts["step"] for line in training])[1]
    losing = [line for line in training if line.facts["gain_by_source"].get(source, 0.0) < 0]
    return sorted(losing, key=lambda line: (line.facts["step"] < late, line.facts["gain_by_source"][source]))[:count]


def sources_of(facts: Iterable[Facts]) -> list[str]:
    """Sources that were asked alone, in order of appearance."""
    return list(dict.fromkeys(source for each in facts for source in each["sources"] if source in each["gain_by_source"]))


def _atlas(facts: Sequence[Facts], first: int, last: int) -> list[Cell]:
    """A cell for every source of every dataset; `first` and `last` are the end of the first part and the beginning of the last one."""
    gains: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for each in facts:
        for source, gain in each["gain_by_source"].items():
            gains.setdefault((each["dataset"], source), []).append((each["step"], gain))
    return [
        Cell(
            dataset=dataset,
            source=source,
            all=_share(gain for _, gain in found),
            first=_share(gain for step, gain in found if step <= first),
            last=_share(gain for step, gain in found if step >= last),
        )
        for (dataset, source), found in sorted(gains.items(), key=lambda item: item[0][0])
    ]


def _share(gains: Iterable[float]) -> Share:
    found = list(gains)
    deficits = [-gain for gain in found if gain < 0]
    return Share(groups=len(found), losing=len(deficits), deficit=fmean(deficits) if deficits else None)
