"""Logs for people, an event log for tools."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mars_shared.files import disk_is_full

logger = logging.getLogger(__name__)


def configure_logging(service: str, level: int = logging.INFO) -> None:
    """One line per record on standard error: time, service, level, message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {service} %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class LineLog:
    """A file of lines to append to; a torn last line of a killed writer gets an end of its own.

    While the disk is full, lines wait in memory for the next one that is appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        self._waiting = b"\n" if torn else b""

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


def parse_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """JSON objects of whole lines; a line that a killed writer tore is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n"):
            yield entry


class EventLog:
    """Append-only JSON lines: what a run did, for curves, reports and the page.

    Each line is {"time": unix seconds, "event": kind, ...fields}.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = LineLog(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; values must be JSON-serialisable and finite."""
        self._lines.append(json.dumps({"time": time.time(), "event": kind, **fields}, allow_nan=False))

    def close(self) -> None:
        self._lines.close()


def by_step(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of a kind, one a step, in the steps' order; a step that a restart repeated counts as done last."""
    return [event for _, event in sorted({event["step"]: event for event in events if event["event"] == kind}.items())]


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events of a log, in order; a torn last line (a killed writer) is left out."""
    if not path.exists():
        return []
    events = parse_lines(io.StringIO(path.read_text(encoding="utf-8")))
    return [event for event in events if kind is None or event["event"] == kind]
