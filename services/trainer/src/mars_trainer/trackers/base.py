"""What a tracker is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mars_shared.records.groups import GroupRecord, Occasion
from mars_shared.settings import Recipe


class Tracker(Protocol):
    """A place that shows a run's numbers and samples; called from one thread, and it may raise anything.

    What it has on this machine is in the run folder's subfolder of its name, which exists. It imports its package when it is
    opened, for that takes seconds.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a training step, by slash name."""

    def groups(self, step: int, occasion: Occasion, groups: Sequence[GroupRecord], picture: bytes | None) -> None:
        """Some groups of a training step, or of the evaluation of its policy: a table of answers, and a picture as PNG."""

    def rewind(self, step: int) -> bool:
        """Forget what was given of later steps, since they are trained once more; False if it cannot: it keeps what it has."""

    def flush(self) -> None:
        """What was given so far outlives this process from here on; may take seconds."""

    def close(self) -> None:
        """Flush, and release everything."""


OpenTracker = Callable[[Recipe], Tracker]
