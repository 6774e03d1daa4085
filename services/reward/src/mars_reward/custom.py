"""Custom rewards: a user's function, scored in processes of its own, with limits for each item."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Self

from mars_reward.parts import Parts
from mars_shared.contracts import BoxesTruth, ScoreItem
from mars_shared.errors import ConfigError, RewardCpuTimeoutError, RewardDiedError, RewardError, RewardTimeoutError

START_S = 60.0
"""How long importing the user's module may take."""
WALL_FACTOR = 10.0
"""Wall seconds an item may take, for each CPU second: it may wait for a network, or the machine be busy."""
EXIT_S = 5.0
"""How long a process that has closed its pipe may take to end."""


@dataclass
class Sandbox:
    """One isolated process. Not for several threads at a time."""

    spec: str
    cpu_s: float
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Import the function.

        Raises:
            ConfigError: there is no such function, or its module fails.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mars_reward.sandbox", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            reply = self._reply(START_S)
        except RewardError as error:
            self.stop()
            raise ConfigError(f"{error}, at the import of its module") from error
        if "ready" not in reply:
            self.stop()
            raise ConfigError(f"reward {self.spec!r}: {reply['error']}")
        return self

    def score(self, item: dict[str, Any]) -> dict[str, Any]:
        """The function's reply. After an error the next item gets a new process.

        Raises:
            RewardTimeoutError, RewardCpuTimeoutError, RewardDiedError: there was none; says which limit, or how it ended.
            ConfigError: a new process was needed and the module fails by now.
        """
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self.start()
        assert self._process is not None and self._process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # then there is no reply, which says how the process ended
                self._process.stdin.write(json.dumps(item | {"cpu_s": self.cpu_s}).encode() + b"\n")
                self._process.stdin.flush()
            return self._reply(self.wall_s)
        except RewardError:
            self.stop()
            raise

    @property
    def wall_s(self) -> float:
        """The operating system counts whole CPU seconds, so that short limits need a second's worth of time too."""
        return WALL_FACTOR * max(self.cpu_s, 1.0)

    def stop(self) -> None:
        """End the process and whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what could not be written is tried again on closing
                pipe.close()

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        """The next line, or the error that says why there is none."""
        assert self._process is not None and self._process.stdout is not None
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise RewardTimeoutError(f"reward {self.spec!r} took longer than {timeout_s:g} s by the clock")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._death()
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _death(self) -> RewardError:
        assert self._process is not None
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return RewardDiedError(f"reward {self.spec!r} closed the pipe of its process")
        if code == -signal.SIGXCPU:
            return RewardCpuTimeoutError(f"reward {self.spec!r} used more than {self.cpu_s:g} CPU seconds (reward.time_limit_s)")
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        return RewardDiedError(f"reward {self.spec!r} ended its process ({how})")


@dataclass
class CustomReward:
    """A scorer over a few sandboxes, for any number of threads."""

    spec: str
    cpu_s: float
    sandboxes: int = 2
    _idle: queue.SimpleQueue[Sandbox] = field(default_factory=queue.SimpleQueue)
    _started: list[Sandbox] = field(default_factory=list)

    def start(self) -> Self:
        """Start one sandbox, so that a wrong specification is known at once; the others start when they are needed.

        Raises:
            ConfigError: there is no such function, or its module fails.
        """
        self._started = [Sandbox(self.spec, self.cpu_s) for _ in range(self.sandboxes)]
        self._started[0].start()
        for sandbox in self._started:
            self._idle.put(sandbox)
        return self

    def __call__(self, item: ScoreItem) -> Parts:
        """Score an item.

        Raises:
            RewardError: the function raised, returned no numbers, or (a subclass) took too long or ended its process.
        """
        sandbox = self._idle.get()
        try:
            reply = sandbox.score(_as_json(item))
        except ConfigError as error:  # the module worked at the start, so that it may work again
            raise RewardError(str(error)) from error
        finally:
            self._idle.put(sandbox)
        if "error" in reply:
            raise RewardError(f"reward {self.spec!r} failed: {reply['error']}", reply["traceback"])
        return Parts(reply["parts"], parsed=True)

    def stop(self) -> None:
        """End all sandboxes."""
        for sandbox in self._started:
            sandbox.stop()


def _as_json(item: ScoreItem) -> dict[str, Any]:
    """What the function sees: boxes as [[x1, y1, x2, y2], ...] in pixels of the original image, or a text."""
    truth = [list(box) for box in item.truth.boxes] if isinstance(item.truth, BoxesTruth) else item.truth.text
    return {"completion": item.completion, "truth": truth, "question": item.question}
