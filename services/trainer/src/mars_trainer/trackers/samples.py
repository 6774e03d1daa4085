"""The groups that trackers show, from the run's groups folder, and a picture of them."""

from __future__ import annotations

import io
import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from mars_shared.blobs import BlobStore
from mars_shared.errors import MarsError
from mars_shared.records.groups import GroupRecord, Occasion, group_facts
from mars_shared.records.segments import Line, SegmentReader
from mars_shared.settings import TrackSection
from mars_trainer.pictures import draw_groups

logger = logging.getLogger(__name__)

Moment = tuple[Occasion, int]
"""What groups are of: a training step, or the evaluation at one."""


@dataclass(frozen=True)
class Shown:
    """Some groups, and a picture (PNG) of them; None if it could not be drawn."""

    groups: tuple[GroupRecord, ...]
    picture: bytes | None


class Samples:
    """Chooses and draws groups for all trackers of a run, from their threads.

    Always the first groups by name: so every evaluation shows the same held-out samples.
    """

    def __init__(self, run_dir: Path, settings: TrackSection) -> None:
        self._settings = settings
        self._reader = SegmentReader(run_dir / "groups", group_facts)
        self._blobs = BlobStore(run_dir / "blobs")
        self._lines: dict[Moment, dict[str, Line]] = {}
        """Of groups to show, by name."""
        self._latest: tuple[Moment, Shown] | None = None
        self._lock = threading.Lock()

    def of(self, occasion: Occasion, step: int) -> Shown | None:
        """What is shown of a step or an evaluation, whose groups are all in the folder; None where nothing is.

        Raises:
            IntegrityError: a segment of the groups has changed.
        """
        with self._lock:
            moment = (occasion, step)
            if not self._is_due(moment):
                return None
            if self._latest is None or self._latest[0] != moment:
                self._note_new()
                self._latest = (moment, self._show(moment))
            return self._latest[1] if self._latest[1].groups else None

    def _is_due(self, moment: Moment) -> bool:
        occasion, step = moment
        return self._settings.samples > 0 and (occasion == "evaluation" or step % self._settings.samples_every == 0)

    def _note_new(self) -> None:
        for line in self._reader.refresh():
            moment = (line.facts["occasion"], line.facts["step"])
            if self._is_due(moment):
                chosen = self._lines.setdefault(moment, {})
                chosen[line.facts["name"]] = replace(line, facts={})  # a step that a restart repeats counts as done last
                if len(chosen) > self._settings.samples:
                    del chosen[max(chosen)]

    def _show(self, moment: Moment) -> Shown:
        lines = sorted(self._lines.get(moment, {}).items())
        groups = tuple(GroupRecord.model_validate(self._reader.entry(line)) for _, line in lines)
        return Shown(groups, self._drawn(groups, moment) if groups else None)

    def _drawn(self, groups: tuple[GroupRecord, ...], moment: Moment) -> bytes | None:
        occasion, step = moment
        picture = io.BytesIO()
        try:
            draw_groups(groups, self._blobs, picture, title=f"{occasion} {step}")
        except MarsError as error:  # an image is gone or cannot be read: the table goes without its picture
            logger.warning("the groups of %s %d are shown without a picture: %s", occasion, step, error)
            return None
        return picture.getvalue()
