"""CPU time that a set of process sessions used, from Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SESSION, _UTIME, _CSTIME = 3, 11, 14
"""Fields of /proc/PID/stat, counted after the command's closing parenthesis."""


def cpu_seconds(sessions: Collection[int]) -> dict[int, float]:
    """User and system seconds so far by session, of its living processes and their reaped children."""
    ticks = dict.fromkeys(sessions, 0)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        session = int(fields[_SESSION])
        if session in ticks:
            ticks[session] += sum(int(value) for value in fields[_UTIME : _CSTIME + 1])
    return {session: count / _TICKS_PER_S for session, count in ticks.items()}


class WorkMeter:
    """CPU and wall time between a run's first and last training step: what `efficiency` is made of.

    efficiency = CPU seconds of all services / (cores * wall seconds), on one CPU host.
    """

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._by_session: dict[int, float] = {}
        self.result: dict[str, float] | None = None

    def see(self, event: Mapping[str, Any], sessions: Collection[int]) -> None:
        """Watch the run's events: the first evaluation's end begins the measurement, each step prolongs it."""
        self._by_session |= cpu_seconds(sessions)  # a session that ended keeps what it had
        now = sum(self._by_session.values())
        if event["event"] == "evaluation" and self._began is None:
            self._began = (event["time"], now)
        elif event["event"] == "step" and self._began is not None:
            wall_s, cpu_s = event["time"] - self._began[0], now - self._began[1]
            cores = len(os.sched_getaffinity(0))
            self.result = {"cpu_s": cpu_s, "wall_s": wall_s, "cores": cores, "efficiency": cpu_s / (cores * wall_s)}
