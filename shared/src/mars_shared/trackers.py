"""Whether what a run's trackers need is installed; what they do is in `mars_trainer.trackers`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from mars_shared.errors import ConfigError
from mars_shared.settings import TrackerName


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Look for the trackers' packages without importing them.

    Raises:
        ConfigError: one is not installed.
    """
    for name in names:
        # A folder of that name beside the run, such as W&B makes, is found too, as a package without a file.
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"track.trackers names {name!r}, whose package is not installed; install it (pip install {name}), "
                "or leave it out of track.trackers"
            )
