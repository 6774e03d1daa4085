"""What services log, as the objects that stand in their logs."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mars_shared.logs import Identity, JsonLines


class LogLines:
    """Collects lines as `configure_logging` would write them."""

    def __init__(self, *secrets: str) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonLines(Identity("rollout", "rollout-0", "demo"), secrets))

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One object a line; fails if a line is none."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def of(self, group: str) -> list[str]:
        """The messages that bear a group's id, in order."""
        return [entry["message"] for entry in self.entries if entry.get("group") == group]


@contextmanager
def logged(*secrets: str) -> Iterator[LogLines]:
    """The lines of everything that is logged meanwhile in this process."""
    lines, root = LogLines(*secrets), logging.getLogger()
    level = root.level
    root.addHandler(lines.handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(lines.handler)
        root.setLevel(level)
