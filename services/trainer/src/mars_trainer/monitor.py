"""Looks at a run's queues and services every few seconds, for metrics, the page and `mars watch`."""

from __future__ import annotations

import asyncio
import logging
import time

from mars_shared.contracts import Purpose
from mars_shared.errors import QueueError
from mars_shared.queue import Streams
from mars_shared.records.state import QueueState, RunState, ServiceState
from mars_shared.registry import Heard, Registry
from mars_shared.telemetry import EventLog
from mars_trainer.progress import Progress

logger = logging.getLogger(__name__)

LOOK_S = 2.0
WRITE_S = 6.0
"""Between two `state` events."""
OLD_S = 15.0
"""After which what was seen is told no more, since it may be otherwise by now."""
ANSWER_S = 2.0
"""How long Redis may take to answer a look."""


class Monitor:
    """Beside the training of a run; it reads and decides nothing, and whatever fails in it, training goes on."""

    def __init__(self, registry: Registry, progress: Progress, events: EventLog) -> None:
        self._registry = registry
        self._progress = progress
        self._events = events
        self._streams = streams_of(progress.run)
        self._newest: RunState | None = None
        self._looked = 0.0
        """When the newest look began, on the monotonic clock."""

    @property
    def newest(self) -> RunState | None:
        """What was seen last, if that is not long ago."""
        return self._newest if time.monotonic() - self._looked < OLD_S else None

    async def follow(self) -> None:
        """Look again and again until cancelled, then write down what was seen last."""
        next_write = 0.0
        try:
            while True:
                try:
                    self._looked, self._newest = time.monotonic(), await self._look()
                    if time.monotonic() >= next_write:
                        self._write()
                        next_write = time.monotonic() + WRITE_S
                except Exception:  # whatever a look or the disk brings up, training must not end by it
                    logger.exception("a look at queues and services failed; the next one is in %g s", LOOK_S)
                await asyncio.sleep(LOOK_S)
        finally:
            self._write()

    def _write(self) -> None:
        if self._newest is not None:
            self._newest = self._newest.model_copy(update=self._doing())
            self._events.write("state", **self._newest.model_dump(mode="json"))

    async def _look(self) -> RunState:
        queues: dict[str, QueueState] = {}
        heard: list[Heard] = []
        try:
            async with asyncio.timeout(ANSWER_S):
                queues, heard = await self._registry.look(self._streams)
            answers = True
        except (QueueError, TimeoutError):
            answers = False
        services = tuple(service_state(one, self._progress.version.step) for one in heard)
        return RunState(**self._doing(), redis=answers, queues=queues, services=services)

    def _doing(self) -> dict[str, str | int]:
        progress = self._progress
        return {
            "state": progress.state,
            "step": progress.version.step,
            "steps": progress.steps,
            "version": str(progress.version),
        }


def streams_of(run: str) -> dict[str, str]:
    """The run's streams by the last parts of their names."""
    streams = Streams(run)
    scored = {f"scored:{purpose.value}": streams.scored(purpose.value) for purpose in (Purpose.TRAIN, Purpose.EVAL)}
    return {"prompts": streams.prompts, "rollouts": streams.rollouts, **scored, "retries": streams.retries, "dead": streams.dead}


def service_state(heard: Heard, step: int) -> ServiceState:
    """What is told of a service while the trainer is at `step`; a policy that it is behind of is never ahead."""
    beat = heard.beat
    return ServiceState(
        service=beat.service,
        name=beat.name,
        seen_s=heard.seen_s,
        started=beat.started,
        starts=heard.starts,
        in_hand=beat.in_hand,
        version=None if beat.version is None else str(beat.version),
        lag=None if beat.version is None else max(0, step - beat.version.step),
        software=beat.software,
    )
