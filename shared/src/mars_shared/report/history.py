"""A run as its folder tells it: what its events say in memory, groups on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from mars_shared.errors import ConfigError
from mars_shared.records.groups import GroupRecord, group_facts, latest_of
from mars_shared.records.segments import Line, SegmentReader
from mars_shared.records.start import RunStart
from mars_shared.telemetry import EventTail, by_step

Event = dict[str, Any]
State = Literal["finished", "running", "stopped"]

FLEETING = frozenset({"state", "evaluating"})
"""Kinds of events that tell every few seconds how it is at the moment: those of a day are megabytes."""
ALIVE_S = 60.0
"""A trainer writes events every few seconds; one that wrote nothing for so long works no more."""


@dataclass(frozen=True)
class History:
    """Events of one run, in order, where they are from, and the unix time at which they were read.

    Of FLEETING events the newest of each kind is here alone, and the run's first event. `software` is what replicas and reward
    workers said at last that they run, versions by package; `unreadable` counts lines of the log in which there is no event.
    """

    folder: Path
    events: list[Event]
    read_at: float
    software: dict[str, dict[str, str]] = field(default_factory=dict)
    unreadable: int = 0

    def of(self, *kinds: str) -> list[Event]:
        """Events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def newest(self, kind: str) -> Event | None:
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    @cached_property
    def steps(self) -> list[Event]:
        """Training steps, each once."""
        return by_step(self.events, "step")

    @cached_property
    def evaluations(self) -> list[Event]:
        """Evaluations on the run's way, one a step."""
        return by_step(self.events, "evaluation")

    @cached_property
    def starts(self) -> list[RunStart]:
        """Of the trainer, in order."""
        told = [{name: event[name] for name in RunStart.model_fields if name in event} for event in self.of("started")]
        return [RunStart.model_validate(start) for start in told]

    @property
    def start(self) -> RunStart | None:
        """The newest one; None: none is recorded."""
        return self.starts[-1] if self.starts else None

    @property
    def restarts(self) -> list[Event]:
        """Starts of the trainer after the first."""
        return self.of("started")[1:]

    @property
    def name(self) -> str:
        return self.folder.resolve().name if self.start is None else str(self.start.recipe["run"]["name"])

    @property
    def seed(self) -> int | None:
        return None if self.start is None else int(self.start.recipe["run"]["seed"])

    @property
    def step(self) -> int:
        """The last step that was done; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def planned_steps(self) -> int | None:
        if self.start is not None:
            return int(self.start.recipe["train"]["steps"])
        return int(self.steps[-1]["steps"]) if self.steps else None

    @property
    def state(self) -> State:
        """A run that goes on after its end is not finished any more."""
        telling = ("started", "step", "resumed", "finished", "stopped")
        newest = next((event["event"] for event in reversed(self.events) if event["event"] in telling), None)
        if newest == "finished":
            return "finished"
        if newest == "stopped":
            return "stopped"
        return "running" if self.events and self.read_at - self.events[-1]["time"] < ALIVE_S else "stopped"

    @property
    def sources(self) -> list[str]:
        """That evaluations asked alone, in order of appearance."""
        return list(dict.fromkeys(name for event in self.evaluations for name in event["mono"]))


def read_history(folder: Path) -> History:
    """The run of a folder.

    Raises:
        ConfigError: it is no run folder.
    """
    log = folder / "events.jsonl"
    if not log.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no events.jsonl; expected one such as runs/demo")
    tail, software = EventTail(log, from_end=False), dict[str, dict[str, str]]()
    events = _without_past_moments(_noting_software(tail.new(), software))
    return History(folder, events, time.time(), software, tail.skipped)


def _noting_software(events: Iterable[Event], software: dict[str, dict[str, str]]) -> Iterator[Event]:
    """The same events, while `software` comes to hold by service what the newest `state` event that heard of it has."""
    for event in events:
        if event["event"] == "state":
            software.update({one["name"]: one["software"] for one in event["services"] if one.get("software")})
        yield event


def _without_past_moments(events: Iterable[Event]) -> list[Event]:
    kept: list[tuple[int, Event]] = []
    newest: dict[str, tuple[int, Event]] = {}
    for place, event in enumerate(events):
        if place > 0 and event["event"] in FLEETING:
            newest[event["event"]] = place, event
        else:
            kept.append((place, event))
    return [event for _, event in sorted([*kept, *newest.values()], key=itemgetter(0))]


class Groups:
    """All groups of a run, each once, by what they are about; a whole one is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._reader = SegmentReader(folder, group_facts)
        self.lines = latest_of(self._reader.refresh())

    @property
    def unreadable(self) -> int:
        """Lines of the folder that hold no record of a group."""
        return self._reader.unreadable

    def record(self, line: Line) -> GroupRecord:
        return GroupRecord.model_validate(self._reader.entry(line))
