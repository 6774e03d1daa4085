"""The event log of a run, for curves, reports, the page and the terminal."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mars_shared.files import disk_is_full

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 32 << 20
"""Of files of lines, which are followed by others."""


class LineLog:
    """A file of lines to append to; a torn last line of a killed writer gets an end of its own.

    While the disk is full, lines wait in memory for the next one that is appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._waiting = b"\n" if _is_torn(path) else b""

    @property
    def waiting(self) -> bool:
        """Whether lines wait in memory for room on the disk."""
        return bool(self._waiting)

    @property
    def size_bytes(self) -> int:
        """What is in the file."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def end_bytes(self) -> int:
        """Where the next line will begin: after what is in the file and what waits."""
        return self.size_bytes + len(self._waiting)

    def append(self, line: str) -> None:
        """Write a line, which has no end of its own yet."""
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not disk_is_full(error):
                raise
            logger.error("the disk is full (%s); %d bytes for %s wait for space", error, len(self._waiting), self.path)

    def close(self) -> None:
        self._file.close()


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of a whole line; None if there is none in it: a killed writer tore it, or a disk damaged it."""
    try:
        # A damaged byte inside a text costs a character of it, and no more.
        entry = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


class EventLog:
    """Append-only JSON lines: what a run did, for curves, reports and the page.

    Each line is {"time": unix seconds, "event": kind, ...fields}. A file that has become large is renamed and followed by a new
    one: events.000001.jsonl, events.000002.jsonl, ... and the newest, events.jsonl.
    """

    def __init__(self, path: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path
        self._segment_bytes = segment_bytes
        self._lines = LineLog(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; values must be JSON-serialisable and finite."""
        if self._lines.size_bytes >= self._segment_bytes and not self._lines.waiting:
            self._begin_next()
        self._lines.append(json.dumps({"time": time.time(), "event": kind, **fields}, allow_nan=False))

    def close(self) -> None:
        self._lines.close()

    def _begin_next(self) -> None:
        """Go on in a new file; where the disk has no room for one, in the present one."""
        following = self.path.with_name(f"{self.path.name}.next")
        try:
            following.touch()
            if self.path.exists():  # else a disk that was full ended this half-way
                self.path.rename(_segment(self.path, _newest_segment(self.path) + 1))
            following.rename(self.path)
        except OSError as error:
            if not disk_is_full(error):
                raise
            logger.error("the disk is full (%s); %s grows beyond its size", error, self.path)
            return
        self._lines.close()
        self._lines = LineLog(self.path)


class EventTail:
    """Yields a growing event log's new events, from its first one or from its present end on.

    `skipped` counts the lines until now in which there was no event.
    """

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._number, self._offset = 1, 0
        self.skipped = 0
        if from_end:
            self._go_to_end()

    def new(self) -> Iterator[dict[str, Any]]:
        """What was written since the last call; a last line that has no end yet comes later."""
        while (file := self._open()) is not None:
            with file:
                yield from self._read(file)
                if self._number > _newest_segment(self._path):
                    return
                # It was renamed, and nothing comes to it any more; but something may have come between its end and that.
                yield from self._read(file)
                self.skipped += bool(file.read())
            self._number, self._offset = self._number + 1, 0

    def _go_to_end(self) -> None:
        self._number = _newest_segment(self._path) + 1
        if (file := self._open()) is not None:
            with file:
                self._offset = file.seek(0, os.SEEK_END)

    def _read(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        """Events of whole lines from the present place on, which is after the last of them then."""
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                file.seek(self._offset)
                return
            self._offset += len(line)
            event = parse_event(line)
            if event is None:
                self.skipped += 1
            else:
                yield event

    def _open(self) -> BinaryIO | None:
        """The file that has come to be of this number, whatever is renamed meanwhile."""
        while True:
            renamed = _newest_segment(self._path)
            path = _segment(self._path, self._number) if self._number <= renamed else self._path
            if not path.exists():
                return None
            file = path.open("rb")
            if _newest_segment(self._path) == renamed:
                return file
            file.close()


def _segment(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number:06d}{path.suffix}")


def _newest_segment(path: Path) -> int:
    """The largest number of a renamed file of a log; 0 if there is none."""
    found = (segment.name.split(".")[-2] for segment in path.parent.glob(f"{path.stem}.*{path.suffix}"))
    return max((int(number) for number in found if number.isdecimal()), default=0)


def by_step(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of a kind, one a step, in the steps' order; a step that a restart repeated counts as done last."""
    return [event for _, event in sorted({event["step"]: event for event in events if event["event"] == kind}.items())]


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events of a log, in order; what is no event (a killed writer tore it) is left out."""
    return [event for event in EventTail(path, from_end=False).new() if kind is None or event["event"] == kind]
