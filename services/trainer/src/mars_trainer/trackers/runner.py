"""Runs a tracker in a thread beside training, which waits for nothing that happens there."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from typing import NoReturn

from prometheus_client import Counter

from mars_shared.settings import Recipe
from mars_trainer.trackers.base import OpenTracker
from mars_trainer.trackers.feed import Feed
from mars_trainer.trackers.samples import Samples

logger = logging.getLogger(__name__)

FAILURES = Counter("mars_tracker_failures", "What a tracker could not take, each attempt counted", ["tracker"])
LOOK_EVERY_S = 1.0
"""For new events."""
RETRY_S = 60.0
"""After a failure."""
CLOSE_S = 10.0
"""To catch up at the end; less than the supervisor waits before it kills."""
_PREFIX = "tracker "


class TrackerRunner:
    """One tracker's thread. What fails is told once, counted, and tried again from where it was."""

    def __init__(
        self, name: str, open_tracker: OpenTracker, recipe: Recipe, samples: Samples, *, retry_s: float = RETRY_S
    ) -> None:
        FAILURES.labels(name)  # shown at 0
        self._name = name
        self._open_tracker = open_tracker
        self._recipe = recipe
        self._samples = samples
        self._retry_s = retry_s
        self._told: set[str] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{_PREFIX}{name}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def ask_to_end(self) -> None:
        """Catch up with the log, then end; returns at once."""
        self._ending.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "tracker %s did not catch up in time and is left behind; what it lacks comes at the run's next start", self._name
            )
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except Exception as error:  # noqa: BLE001  a tracker may raise anything, and training must not end by it
                self._note(error, f"is tried again every {self._retry_s:g} s")
            else:
                return
            if self._ending.wait(self._retry_s):
                return

    def _follow(self) -> None:
        run_dir = self._recipe.run.dir
        folder = run_dir / self._name
        folder.mkdir(parents=True, exist_ok=True)
        with closing(self._open_tracker(self._recipe)) as tracker:
            feed = Feed(tracker, run_dir, folder / "point.json", self._samples, self._on_lost)
            while not self._ending.is_set():
                if not feed.bring():
                    self._ending.wait(LOOK_EVERY_S)
            while feed.bring():
                pass

    def _on_lost(self, error: Exception) -> None:
        self._note(error, "goes without these samples")

    def _note(self, error: Exception, consequence: str) -> None:
        FAILURES.labels(self._name).inc()
        said = f"{type(error).__name__}: {error}"
        if said not in self._told:
            self._told.add(said)
            logger.warning("tracker %s failed and %s; training goes on: %s", self._name, consequence, said, exc_info=error)


def exit_despite_trackers(main: Callable[[], int]) -> NoReturn:
    """Run a program and end the process with its exit code, also where a tracker hangs, whose package may wait for it then."""
    try:
        code = main()
    except Exception:
        logger.exception("ended by an error that nothing expected")
        code = 1
    if any(thread.name.startswith(_PREFIX) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
