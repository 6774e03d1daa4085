"""Child processes that leave nothing behind: own session, own log, killed as a group."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def dies_with_parent() -> Callable[[], None] | None:
    """What a child runs before exec so that it gets SIGTERM when its parent thread ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def spawn(command: Sequence[str], *, log_path: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, output appended to its log."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with_parent(),
            env=None if environment is None else dict(environment),
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to whatever is left of the process's session, the process itself included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def stop_all(processes: Sequence[subprocess.Popen[bytes]], *, grace_s: float) -> None:
    """SIGTERM to each, wait up to `grace_s` for all together, then SIGKILL to every group."""
    try:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        remaining_s = grace_s
        for process in processes:
            remaining_s = _wait(process, remaining_s)
    finally:
        for process in processes:
            kill_group(process)
        for process in processes:
            process.wait()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> float:
    began = time.monotonic()
    try:
        process.wait(max(timeout_s, 0.01))
    except subprocess.TimeoutExpired:
        return 0.0
    return timeout_s - (time.monotonic() - began)
