"""Where a run stands, from its events alone; cli_watch.py shows it, watch_view.py draws it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mars_shared.errors import InputError
from mars_shared.http import explain_validation
from mars_shared.pace import Pace
from mars_shared.records.state import RunState

HISTORY = 40
"""Steps whose metrics are remembered."""


@dataclass
class RunView:
    """What the events told until now; `see` takes the next one."""

    step: int = 0
    steps: int | None = None
    metrics: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    """Of the last steps, the newest last."""
    measured: int = 0
    """The step of the newest metrics."""
    evaluation: dict[str, Any] | None = None
    """The newest one's event."""
    evaluating: dict[str, Any] | None = None
    """The event that tells how far the evaluation under way is."""
    state: RunState | None = None
    state_at: float | None = None
    """Unix time of `state`."""
    heard_at: float | None = None
    """Unix time of the newest event."""
    deaths: int = 0
    starts: int = 0
    """Of the trainer."""
    finished: bool = False
    stopped: bool = False
    """The trainer was told to end before the last step."""
    pace: Pace = field(default_factory=Pace)
    """Of steps."""
    evaluation_pace: Pace = field(default_factory=Pace)

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> RunView:
        """The view after these events."""
        view = cls()
        for event in events:
            view.see(event)
        return view

    def see(self, event: dict[str, Any]) -> None:
        """Take in one event of the run's log."""
        self.heard_at = event["time"]
        match event["event"]:
            case "step":
                self._on_step(event)
            case "state":
                self._on_state(event)
            case "evaluating":
                self.evaluating = event
                self.evaluation_pace.see(event["time"], event["done"])
            case "evaluation" | "evaluated":
                self.evaluation, self.evaluating = event, None
            case "started":
                self.starts += 1
                self.stopped = False
            case "stopped":
                self.stopped, self.evaluating = True, None
            case "resumed":
                self._goes_on_at(event["step"])
                self.pace.see(event["time"], event["step"])
            case "dead":
                self.deaths += 1
            case "finished":
                self.step, self.finished = event["step"], True

    @property
    def restarts(self) -> int:
        """Starts of the trainer after the first."""
        return max(0, self.starts - 1)

    @property
    def ended(self) -> bool:
        """Nothing more comes unless the run is started again."""
        return self.finished or self.stopped

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step at the pace of the last ones; None if that is unknown."""
        return None if self.steps is None or self.ended else self.pace.left_s(self.steps)

    def as_json(self) -> dict[str, Any]:
        """What `mars watch --json` prints, apart from the run's folder."""
        return {
            "time": self.heard_at,
            "step": self.step,
            "steps": self.steps,
            "finished": self.finished,
            "stopped": self.stopped,
            "steps_per_s": self.pace.rate,
            "left_s": self.left_s,
            "state": None if self.state is None else self.state.model_dump(mode="json"),
            "state_time": self.state_at,
            "metrics": self.metrics[-1] if self.metrics else None,
            "evaluation": self.evaluation,
            "evaluating": self.evaluating,
            "dead": self.deaths,
            "restarts": self.restarts,
        }

    def _on_step(self, event: dict[str, Any]) -> None:
        self.steps = event["steps"]
        for _ in range(min(len(self.metrics), self.measured - event["step"] + 1)):
            self.metrics.pop()  # a restart repeats these steps
        self.metrics.append(event["metrics"])
        self.measured = event["step"]
        self.pace.see(event["time"], event["step"])
        self._goes_on_at(event["step"])

    def _goes_on_at(self, step: int) -> None:
        self.step, self.finished, self.stopped, self.evaluating = step, False, False, None

    def _on_state(self, event: dict[str, Any]) -> None:
        # JSON's lists become the contract's tuples, and fields of a later version are left alone.
        told = {key: value for key, value in event.items() if key in RunState.model_fields}
        try:
            self.state = RunState.model_validate(told)
        except ValidationError as error:
            problems = explain_validation(error.errors(include_url=False))
            raise InputError(
                f"a state event of the run is not of this version of mars ({problems}); use the run's own"
            ) from error
        self.state_at = event["time"]
        self.step, self.steps = self.state.step, self.state.steps
