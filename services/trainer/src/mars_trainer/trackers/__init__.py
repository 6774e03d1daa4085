"""Trackers: where a run's curves and samples are shown besides its own folder.

They read what the run writes, its event log and its groups, and nothing calls them: so training neither waits for one nor ends by
one, and what one missed it reads later. Reading order: base.py, feed.py, runner.py; a tracker is one file and a line in TRACKERS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mars_shared.settings import Recipe, TrackerName
from mars_shared.trackers import check_trackers
from mars_trainer.trackers.base import OpenTracker
from mars_trainer.trackers.runner import CLOSE_S, TrackerRunner
from mars_trainer.trackers.samples import Samples
from mars_trainer.trackers.tensorboard import TensorBoardTracker
from mars_trainer.trackers.wandb import WandbTracker

TRACKERS: Mapping[TrackerName, OpenTracker] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


@contextmanager
def tracking(recipe: Recipe) -> Iterator[None]:
    """Run the recipe's trackers meanwhile, each in a thread of its own; at the end they get CLOSE_S together to catch up.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    check_trackers(recipe.track.trackers)
    samples = Samples(recipe.run.dir, recipe.track)
    runners = [TrackerRunner(name, TRACKERS[name], recipe, samples) for name in recipe.track.trackers]
    for runner in runners:
        runner.start()
    try:
        yield
    finally:
        for runner in runners:
            runner.ask_to_end()
        deadline = time.monotonic() + CLOSE_S
        for runner in runners:
            runner.wait(max(0.0, deadline - time.monotonic()))
