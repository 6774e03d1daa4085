"""Custom rewards: a user's function, scored in processes of its own, with limits for each item."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from mars_reward.metrics import TIME_OUTS
from mars_reward.parts import Parts
from mars_shared.contracts import BoxesTruth, ScoreItem
from mars_shared.errors import ConfigError, RewardError

logger = logging.getLogger(__name__)

START_S = 60.0
"""How long importing the user's module may take."""
WALL_FACTOR = 10.0
"""Wall seconds an item may take, for each CPU second: it may wait for a network, or the machine be busy."""


class Ended(StrEnum):
    """How a sandbox's process ended in the middle of an item."""

    CPU = "cpu"
    """It used more CPU seconds than an item may."""
    WALL = "wall"
    """It took longer than an item may, waiting for something."""
    EXIT = "exit"
    """It crashed or left by itself."""


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
        reply = self._reply(START_S)
        if isinstance(reply, dict) and "ready" in reply:
            return self
        self.stop()
        reason = reply["error"] if isinstance(reply, dict) else f"its import ended the process or took {START_S:g} s ({reply})"
        raise ConfigError(f"reward {self.spec!r}: {reason}")

    def score(self, item: dict[str, Any]) -> dict[str, Any] | Ended:
        """The function's reply, or how it ended without one; then the next item gets a new process."""
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(item | {"cpu_s": self.cpu_s}).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._reply(self.cpu_s * WALL_FACTOR)
        except BrokenPipeError:
            reply = Ended.EXIT
        if isinstance(reply, Ended):
            self.stop()
        return reply

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

    def _reply(self, timeout_s: float) -> dict[str, Any] | Ended:
        """The next line, or why there is none."""
        assert self._process is not None and self._process.stdout is not None
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return Ended.WALL
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                return Ended.CPU if self._process.wait() == -signal.SIGXCPU else Ended.EXIT
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply


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
        """Score an item. One that takes too long, or the process with it, gets 0: mars_reward_time_outs_total counts them.

        Raises:
            RewardError: the function raised, or returned no finite numbers.
        """
        sandbox = self._idle.get()
        try:
            reply = sandbox.score(_as_json(item))
        finally:
            self._idle.put(sandbox)
        if isinstance(reply, Ended):
            TIME_OUTS.labels(cause=reply.value).inc()
            logger.warning("reward %s ended in the middle of an item (%s), which gets 0", self.spec, reply.value)
            return Parts({}, parsed=False)
        if "error" in reply:
            raise RewardError(f"reward {self.spec!r} failed: {reply['error']}")
        return Parts(reply["parts"], parsed=True)

    def stop(self) -> None:
        """End all sandboxes."""
        for sandbox in self._started:
            sandbox.stop()


def _as_json(item: ScoreItem) -> dict[str, Any]:
    """What the function sees: boxes as [[x1, y1, x2, y2], ...] in pixels of the original image, or a text."""
    truth = [list(box) for box in item.truth.boxes] if isinstance(item.truth, BoxesTruth) else item.truth.text
    return {"completion": item.completion, "truth": truth, "question": item.question}
