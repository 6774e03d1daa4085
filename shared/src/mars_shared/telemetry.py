"""Logs for people, an event log for tools."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def configure_logging(service: str, level: int = logging.INFO) -> None:
    """One line per record on standard error: time, service, level, message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {service} %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def open_lines(path: Path) -> TextIO:
    """Open a log of lines to append to; a torn last line of a killed writer gets an end of its own."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)
    if torn:
        file.write("\n")
    return file


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
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_lines(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; values must be JSON-serialisable and finite."""
        self._file.write(json.dumps({"time": time.time(), "event": kind, **fields}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def by_step(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of a kind, one a step, in the steps' order; a step that a restart repeated counts as done last."""
    return [event for _, event in sorted({event["step"]: event for event in events if event["event"] == kind}.items())]


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events of a log, in order; a torn last line (a killed writer) is left out."""
    if not path.exists():
        return []
    events = parse_lines(io.StringIO(path.read_text(encoding="utf-8")))
    return [event for event in events if kind is None or event["event"] == kind]
