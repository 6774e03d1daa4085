"""Append-only JSON lines in segments of limited size, and an index of what every line is about.

    groups/000001.jsonl         a JSON object a line; a segment that is full is never written to again
    groups/000001.index.jsonl   {"offset": 0, "size": 812, "facts": {...}} for every line of a full segment
    groups/000002.jsonl         the newest segment, without an index

Facts are the little that lists and filters need. They come from the line alone, so that an index holds nothing new: a segment
whose index is missing, damaged or of another version is read through instead. A line that holds no record (torn, damaged, of another
version) is passed over and counted. `pandas.read_json("000001.jsonl", lines=True)` reads a segment.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mars_shared.contracts.base import Contract
from mars_shared.errors import IntegrityError
from mars_shared.files import disk_is_full, write_atomic
from mars_shared.telemetry import SEGMENT_BYTES, LineLog

logger = logging.getLogger(__name__)

Facts = dict[str, Any]
FactsOf = Callable[[dict[str, Any]], Facts]
"""Raises a ValueError where an object is no record."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line is, its size in bytes without its end, and what it is about."""

    segment: int
    offset: int
    size: int
    facts: Facts


@dataclass(frozen=True, slots=True)
class Part:
    """What a segment holds from an offset on: lines with a record, how many have none, and where the next line begins."""

    lines: list[Line]
    unreadable: int
    end: int


class IndexRow(Contract):
    """A line of an index."""

    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    facts: Facts


class SegmentWriter:
    """Appends lines; for one process at a time.

    A disk that is full makes lines wait in memory, as for `LineLog`, and a segment grow for as long as it has no room for the
    next; an index that it has no room for is never written.
    """

    def __init__(self, folder: Path, facts_of: FactsOf, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._facts_of = facts_of
        self._segment_bytes = segment_bytes
        numbers = segment_numbers(folder)
        self._number = numbers[-1] if numbers else 1
        self._lines = LineLog(segment_path(folder, self._number))
        self._written = read_segment(folder, self._number, facts_of).lines
        """What the index of the present segment will hold."""

    def append(self, entry: dict[str, Any]) -> None:
        """Write one JSON object; its numbers must be finite."""
        if self._lines.size_bytes >= self._segment_bytes and not self._lines.waiting:
            self._begin_next()
        text, offset = json.dumps(entry, allow_nan=False), self._lines.end_bytes
        self._lines.append(text)
        self._written.append(Line(self._number, offset, len(text), self._facts_of(entry)))

    def close(self) -> None:
        self._lines.close()

    def _begin_next(self) -> None:
        try:
            following = LineLog(segment_path(self._folder, self._number + 1))
        except OSError as error:
            _log_if_full(error, f"{self._lines.path} grows beyond its size")
            return
        self._lines.close()
        self._lines = following
        self._write_index()
        self._number, self._written = self._number + 1, []

    def _write_index(self) -> None:
        path = index_path(self._folder, self._number)
        try:
            write_atomic(path, "".join(_row(line) for line in self._written).encode(), durable=False)
        except OSError as error:
            _log_if_full(error, f"{path} is not written; readers do without")


class SegmentReader:
    """Follows a folder of segments while another process appends to it.

    >>> reader = SegmentReader(Path("runs/demo/groups"), facts_of)
    >>> new = reader.refresh()
    >>> reader.entry(new[0])["step"]
    1
    """

    def __init__(self, folder: Path, facts_of: FactsOf) -> None:
        self._folder = folder
        self._facts_of = facts_of
        self._segment = 0
        """The newest that was looked at."""
        self._offset = 0
        """Where its next line begins."""
        self.unreadable = 0
        """Lines without a record that were passed over until now."""

    def refresh(self) -> list[Line]:
        """Lines that are new since the last call, in order; a last line that has no end yet comes later."""
        new: list[Line] = []
        for number in segment_numbers(self._folder):
            if number < self._segment:
                continue
            start = self._offset if number == self._segment else 0
            part = read_segment(self._folder, number, self._facts_of, start)
            new += part.lines
            self.unreadable += part.unreadable
            self._segment, self._offset = number, part.end
        return new

    def entry(self, line: Line) -> dict[str, Any]:
        """The object of a line.

        Raises:
            IntegrityError: the segment changed or is gone.
        """
        path = segment_path(self._folder, line.segment)
        try:
            with path.open("rb") as file:
                content = os.pread(file.fileno(), line.size, line.offset)
            entry = json.loads(content)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: expected a line of {line.size} bytes at {line.offset}: {error}") from error
        if not isinstance(entry, dict):
            raise IntegrityError(f"{path}: expected an object at {line.offset}, came {type(entry).__name__}")
        return entry


def read_segment(folder: Path, number: int, facts_of: FactsOf, start: int = 0) -> Part:
    """Whole lines of a segment from an offset on, by its index if that tells of all of them."""
    indexed = _indexed(folder, number, facts_of, start)
    return _read_through(folder, number, facts_of, start) if indexed is None else indexed


def segment_numbers(folder: Path) -> list[int]:
    """Of all segments, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jsonl"


def index_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.index.jsonl"


def _read_through(folder: Path, number: int, facts_of: FactsOf, start: int) -> Part:
    lines, unreadable, end = [], 0, start
    with segment_path(folder, number).open("rb") as file:
        file.seek(start)
        for content in file:
            if not content.endswith(b"\n"):
                break
            facts = _facts(content, facts_of)
            if facts is None:
                unreadable += 1
            else:
                lines.append(Line(number, end, len(content) - 1, facts))
            end += len(content)
    return Part(lines, unreadable, end)


def _row(line: Line) -> str:
    return json.dumps({key: value for key, value in asdict(line).items() if key != "segment"}) + "\n"


def _log_if_full(error: OSError, consequence: str) -> None:
    if not disk_is_full(error):
        raise error
    logger.error("the disk is full (%s); %s", error, consequence)


def _indexed(folder: Path, number: int, facts_of: FactsOf, start: int) -> Part | None:
    """By the index; None where there is none, or none to go by: every line must have its row, and the first row must be true."""
    path = index_path(folder, number)
    if not path.exists():
        return None
    try:
        rows = [IndexRow.model_validate_json(row) for row in path.read_bytes().splitlines()]
    except ValidationError:
        return None
    lines = [Line(number, row.offset, row.size, row.facts) for row in rows if row.offset >= start]
    with segment_path(folder, number).open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        first = os.pread(file.fileno(), lines[0].size, start) if lines else b""
    if not _follow_each_other(lines, start, end) or (lines and lines[0].facts != _facts(first, facts_of)):
        return None
    return Part(lines, 0, end)


def _follow_each_other(lines: Sequence[Line], start: int, end: int) -> bool:
    """Whether lines with facts of one kind fill a segment from `start` to `end` without a gap."""
    borders = [start, *(line.offset + line.size + 1 for line in lines)]
    begins = [*(line.offset for line in lines), end]
    return borders == begins and all(one.facts.keys() == other.facts.keys() for one, other in pairwise(lines))


def _facts(content: bytes, facts_of: FactsOf) -> Facts | None:
    """Of a line; None if it holds no record: a killed writer tore it, it was damaged, or another version of mars wrote it."""
    try:
        entry = json.loads(content)
        return facts_of(entry) if isinstance(entry, dict) else None
    except ValueError:
        return None
