"""Child processes that end with the process that started them, however that one ended."""

from __future__ import annotations

import os
import signal
import threading
import time

POLL_S = 0.5

_watching = threading.Event()


def die_with_parent() -> None:
    """Kill this process as soon as its parent is gone, even by kill -9. Call it in spawned children alone.

    An orphan is adopted by another process: its parent's id changes. (prctl's parent-death
    signal would fire already when the thread that started this process ends.)
    """
    if _watching.is_set():
        return
    _watching.set()
    parent = os.getppid()
    if os.getsid(parent) != os.getsid(0):
        _die()  # Adopted before it could look.
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
