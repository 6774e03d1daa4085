"""Child processes that end with the process that started them, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

_watching = threading.Event()


def die_with_parent() -> None:
    """Kill this process as soon as the process that spawned it is gone; a no-op where multiprocessing didn't spawn it.

    The parent holds the other end of a pipe that the kernel closes even on kill -9. Unlike
    prctl's parent-death signal this doesn't fire when only the starting thread ends.
    """
    parent = multiprocessing.parent_process()
    if parent is None or _watching.is_set():
        return
    _watching.set()
    threading.Thread(target=_wait_and_die, args=(parent.sentinel,), name="lifeline", daemon=True).start()


def _wait_and_die(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
