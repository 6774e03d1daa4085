"""Points at which a process fails on purpose, to prove that nothing is lost.

    MARS_FAULT=trainer.after_step                    killed (SIGKILL) when it first passes that point
    MARS_FAULT=trainer.after_step@3,reward.after_claim   at the third time; any number of points
    MARS_FAULT=trainer.before_checkpoint:full        the disk is full there instead: OSError ENOSPC

Each entry strikes once a run: a file in run.dir/faults says that it has. Without MARS_FAULT a point does nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mars_shared.errors import ConfigError

VARIABLE = "MARS_FAULT"
POINTS = {
    "trainer.after_take": "a scored group was taken from Redis, nothing of it is in the weights",
    "trainer.before_ask": "a prompt is made and not in Redis",
    "trainer.after_ask": "a prompt is in Redis",
    "trainer.before_step": "a step's groups are together, the weights are as before",
    "trainer.after_step": "the optimizer has stepped, nothing is published",
    "trainer.before_announce": "a snapshot is written and not announced",
    "trainer.after_publish": "a version is announced",
    "trainer.before_checkpoint": "a step is done, its checkpoint not begun",
    "trainer.before_commit": "a checkpoint is written and not yet in its place",
    "trainer.after_checkpoint": "a checkpoint is durable, its groups are not acknowledged",
    "trainer.after_acknowledge": "the groups of a checkpoint are acknowledged",
    "rollout.after_claim": "a prompt is claimed",
    "rollout.before_update": "new weights are verified and not applied",
    "rollout.after_update": "new weights are applied",
    "rollout.before_complete": "a group is made and not in Redis",
    "rollout.after_complete": "a group is in Redis",
    "reward.after_claim": "a group is claimed",
    "reward.before_complete": "a group is scored and not in Redis",
    "reward.after_complete": "a scored group is in Redis",
}
"""Every point, and how things stand there."""

_ENTRY = re.compile(r"(?P<point>[a-z_.]+)(@(?P<pass>[1-9]\d*))?(:(?P<how>kill|full))?")


@dataclass(frozen=True)
class _Fault:
    on_pass: int
    how: str
    struck: Path


_armed: dict[str, _Fault] = {}
_passes: Counter[str] = Counter()


def arm(run_dir: Path) -> None:
    """Read MARS_FAULT for this process.

    Raises:
        ConfigError: it names no point, or is no such list.
    """
    _armed.clear()
    _passes.clear()
    folder = run_dir / "faults"
    for entry in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None or match["point"] not in POINTS:
            raise ConfigError(f"{VARIABLE}: {entry!r} is no fault; expected POINT[@PASS][:full] with one of {', '.join(POINTS)}")
        folder.mkdir(parents=True, exist_ok=True)
        _armed[match["point"]] = _Fault(int(match["pass"] or 1), match["how"] or "kill", folder / match["point"])


def fault(point: str) -> None:
    """Pass a point: nothing happens unless it is armed and its time has come.

    Raises:
        OSError: ENOSPC, if the disk shall be full here.
    """
    armed = _armed.get(point)
    if armed is None:
        return
    _passes[point] += 1
    if _passes[point] < armed.on_pass or not _first(armed.struck):
        return
    if armed.how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    os.kill(os.getpid(), signal.SIGKILL)


def _first(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
