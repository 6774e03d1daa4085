"""Follows a run's event log and keeps what the page tells of it."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mars_shared.http import explain_validation
from mars_shared.records.state import RunState
from mars_shared.telemetry import EventTail
from mars_shared.ui.curves import Curves, StepTable

SHOWN_DEATHS = 50
SILENT_S = 30.0
"""Without a word for so long, a trainer counts as gone; it writes a `state` event every few seconds."""


class RunStatus(BaseModel):
    """Where a run is."""

    name: str = Field(description="the run folder's")
    state: RunState | None = Field(description="newest one that was written down; None: there is none, or it cannot be read")
    state_problem: str | None = Field(description="why the newest state cannot be read")
    state_s: float | None = Field(description="seconds since the newest state was written down, to which its own ages add")
    said_s: float | None = Field(description="seconds since the last event of any kind")
    alive: bool = Field(description="the trainer has not ended and was heard of lately")
    finished: bool
    stopped: bool = Field(description="the trainer was told to end before the last step")
    steps_recorded: int
    restarts: int = Field(description="starts of the trainer after the first")
    deaths: list[dict[str, Any]] = Field(description="newest first, at most 50")


class RunEvents:
    """Of one run; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._name = path.parent.name
        self._tail = EventTail(path, from_end=False)
        self._steps = StepTable()
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._deaths: deque[dict[str, Any]] = deque(maxlen=SHOWN_DEATHS)
        self._state: RunState | None = None
        self._state_problem: str | None = None
        self._state_at: float | None = None
        self._last: float | None = None
        self._ended: Literal["finished", "stopped"] | None = None
        self._starts = 0

    def refresh(self) -> None:
        """Take up what was written since the last call."""
        for event in self._tail.new():
            self._see(event)

    def curves(self) -> Curves:
        return self._steps.curves()

    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out results, one a step, in order."""
        return [event for _, event in sorted(self._evaluations.items())]

    def status(self) -> RunStatus:
        said_s, state_s = _since(self._last), _since(self._state_at)
        return RunStatus(
            name=self._name,
            state=self._state,
            state_problem=self._state_problem,
            state_s=state_s,
            said_s=said_s,
            alive=self._ended is None and said_s is not None and said_s < SILENT_S,
            finished=self._ended == "finished",
            stopped=self._ended == "stopped",
            steps_recorded=len(self._steps),
            restarts=max(0, self._starts - 1),
            deaths=list(self._deaths)[::-1],
        )

    def _see(self, event: dict[str, Any]) -> None:
        self._last = event["time"]
        match event["event"]:
            case "step":
                self._steps.add(event)
                self._ended = None
            case "evaluation":
                self._evaluations[event["step"]] = event
            case "state":
                self._see_state(event)
            case "dead":
                self._deaths.append(event)
            case "started":
                self._starts += 1
                if self._ended == "stopped":
                    self._ended = None
            case "resumed":
                self._ended = None
            case "finished" | "stopped" as ended:
                self._ended = ended

    def _see_state(self, event: dict[str, Any]) -> None:
        self._state, self._state_problem, self._state_at = None, None, event["time"]
        told = {key: value for key, value in event.items() if key in RunState.model_fields}
        try:
            self._state = RunState.model_validate(told)
        except ValidationError as error:  # the rest of the page needs no state, and the run goes on to show itself
            problems = explain_validation(error.errors(include_url=False))
            self._state_problem = f"the newest state event is not of this version of mars: {problems}"


def _since(unix_s: float | None) -> float | None:
    """Seconds; none below 0, where another machine's clock is ahead."""
    return None if unix_s is None else max(0.0, time.time() - unix_s)
