"""Brings what a run has written to one tracker, each thing once, over restarts of the run and failures of the tracker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from mars_shared.files import write_atomic
from mars_shared.http import explain_validation
from mars_shared.records.groups import Occasion
from mars_shared.telemetry import EventTail
from mars_trainer.trackers.base import Tracker
from mars_trainer.trackers.samples import Samples
from mars_trainer.trackers.scalars import evaluation_scalars, step_scalars

logger = logging.getLogger(__name__)

OnLost = Callable[[Exception], None]

BATCH_EVENTS = 200
"""After so many, while a tracker catches up, its place is kept: a failure later on does not bring them twice."""


class Point(BaseModel):
    """How far a tracker is: so many events of the log, the newest training step among them."""

    events: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)


class Feed:
    """A tracker that has just been opened, and its place in the run's event log.

    The place is kept in the tracker's folder: with the folder deleted, it begins anew.

    Args:
        tracker: what it raises while numbers are brought comes through.
        run_dir: with the events.
        point: file of the place.
        on_lost: told why samples were not taken; unlike numbers they are not tried again.
    """

    def __init__(self, tracker: Tracker, run_dir: Path, point: Path, samples: Samples, on_lost: OnLost) -> None:
        self._tracker = tracker
        self._tail = EventTail(run_dir / "events.jsonl", from_end=False)
        self._path = point
        self._samples = samples
        self._on_lost = on_lost
        self._evaluations: dict[int, dict[str, Any]] = {}
        """All so far, by step: a restarted run does not repeat them."""
        self._point = self._read_point()
        self._position = self._point.events
        self._take_up()

    def _read_point(self) -> Point:
        if not self._path.exists():
            return Point()
        try:
            return Point.model_validate_json(self._path.read_bytes())
        except ValidationError as error:
            problems = explain_validation(error.errors(include_url=False))
            logger.warning("%s is damaged (%s); its tracker gets the whole run once more", self._path, problems)
            self._tracker.rewind(-1)  # of what it may have, evaluations before the first step among it
            return Point()

    def _take_up(self) -> None:
        """Read over what the tracker has, and have it forget what it may have got after that."""
        for event in islice(self._tail.new(), self._point.events):
            if event["event"] == "evaluation":
                self._evaluations[event["step"]] = event
        if self._point.events:
            self._rewind(self._point.step)

    def bring(self) -> bool:
        """Bring up to BATCH_EVENTS new events; whether there were any."""
        events = list(islice(self._tail.new(), BATCH_EVENTS))
        step = self._point.step
        for event in events:
            match event["event"]:
                case "step":
                    step = self._bring_step(event, newest=step)
                case "evaluation":
                    self._evaluations[event["step"]] = event
                    self._bring_evaluation(event)
        self._position += len(events)
        if any(event["event"] in ("step", "evaluation") for event in events):
            self._tracker.flush()
            self._point = Point(events=self._position, step=step)
            write_atomic(self._path, self._point.model_dump_json().encode(), durable=False)
        return bool(events)

    def _bring_step(self, event: dict[str, Any], *, newest: int) -> int:
        """Returns the newest step that the tracker has then."""
        step = int(event["step"])
        if step <= newest and not self._rewind(step - 1):
            return newest
        self._tracker.scalars(step, step_scalars(event))
        self._bring_samples("step", step)
        return step

    def _bring_evaluation(self, event: dict[str, Any]) -> None:
        self._tracker.scalars(event["step"], evaluation_scalars(event))
        self._bring_samples("evaluation", event["step"])

    def _rewind(self, step: int) -> bool:
        """Whether the tracker forgot later steps; their evaluations still hold, and are brought again."""
        if not self._tracker.rewind(step):
            return False
        for later, event in sorted(self._evaluations.items()):
            if later > step:
                self._bring_evaluation(event)
        return True

    def _bring_samples(self, occasion: Occasion, step: int) -> None:
        """Once: a group that cannot be shown must not hold up the numbers behind it."""
        try:
            shown = self._samples.of(occasion, step)
            if shown is not None:
                self._tracker.groups(step, occasion, shown.groups, shown.picture)
        except Exception as error:  # noqa: BLE001  a tracker may raise anything, and drawing too
            self._on_lost(error)
