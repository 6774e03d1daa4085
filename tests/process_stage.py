"""Small real processes under a real supervisor, and patience for what they do."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from mars_shared.supervisor import Service, Supervisor

PATIENT_S = 20.0
SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
NOTES_ITS_END = textwrap.dedent("""
    import signal, sys, time
    def stop(*_):
        with open(sys.argv[1], "a") as file:
            file.write(sys.argv[2] + "\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    print("up", flush=True)
    time.sleep(600)
""")
"""Asked to end, it appends its second argument to the file that its first names."""


class Stage:
    """A supervisor, what it said, and how to wait for what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.supervisor = Supervisor(
            log_dir=folder / "logs",
            environment=dict(os.environ) | {"STAGE": "test", "STAGE_TOKEN": "0123abcd"},
            say=self.said.append,
            secret_url="s3://me:pass-w@bucket",
        )

    def start(self, name: str, program: str, *arguments: str, **options: object) -> None:
        self.supervisor.start(Service(name, [sys.executable, "-c", program, *arguments], **options))  # type: ignore[arg-type]

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, meanwhile=self.supervisor.poll)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        return self.supervisor.pids()[name]


def wait_until(condition: Callable[[], object], *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """For what takes milliseconds; patient, so that a busy machine fails no test."""
    deadline = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        meanwhile()
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
