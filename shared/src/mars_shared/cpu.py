"""CPU time that a set of process sessions used, from Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SESSION, _UTIME, _CSTIME = 3, 11, 14
"""Fields of /proc/PID/stat, counted after the command's closing parenthesis."""


def cpu_seconds(sessions: Collection[int]) -> float:
    """User and system seconds so far of all living processes in the sessions, reaped children included."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(fields[_SESSION]) in sessions:
            ticks += sum(int(value) for value in fields[_UTIME : _CSTIME + 1])
    return ticks / _TICKS_PER_S


class WorkMeter:
    """CPU and wall time between a run's first and last training step: what `efficiency` is made of.

    efficiency = CPU seconds of all services / (cores * wall seconds), on one CPU host.
    """

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self.result: dict[str, float] | None = None

    def see(self, event: Mapping[str, Any], sessions: Collection[int]) -> None:
        """Watch the run's events: the first evaluation's end begins the measurement, each step prolongs it."""
        now = cpu_seconds(sessions)
        if event["event"] == "evaluation" and self._began is None:
            self._began = (event["time"], now)
        elif event["event"] == "step" and self._began is not None:
            wall_s, cpu_s = event["time"] - self._began[0], now - self._began[1]
            cores = len(os.sched_getaffinity(0))
            self.result = {"cpu_s": cpu_s, "wall_s": wall_s, "cores": cores, "efficiency": cpu_s / (cores * wall_s)}
