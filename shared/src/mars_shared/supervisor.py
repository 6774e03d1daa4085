"""Runs a set of processes: restarts what dies, gives up loudly on what cannot start, leaves nothing behind."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from mars_shared.errors import MarsError
from mars_shared.logs import tail_for_people
from mars_shared.masking import known_secrets
from mars_shared.processes import kill_group, spawn, stop_all

logger = logging.getLogger(__name__)

QUICK_DEATHS = 3
"""Deaths before ready, in a row, after which a service is given up."""
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 10.0
GRACE_S = 20.0
MANY_DEATHS, MANY_DEATHS_S = 20, 300.0
"""So many deaths within so many seconds are too many even for a service that gets ready each time: one every quarter of a
minute is a fault of its own, while killing each service a few times, as a test of faults does, stays far below."""
HOPELESS_EXIT_CODES = (2, 3)
"""Of ConfigError and InputError: the same would happen again."""
POLL_S = 0.2
LOG_TAIL_LINES = 12


class ServiceFailedError(MarsError):
    """A service cannot start, or failed for good; the message has the end of its log, `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 1


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    `ready_url` answers 200 once the service is ready (None: ready as soon as it runs).
    `finishes`: exit code 0 means that its work is done, and it is not started again.
    `needed_to_stop`: the others need it while they end, so it ends after them.
    `optional`: the others can do without it, so it is given up alone where another would end them all.
    """

    name: str
    command: Sequence[str]
    ready_url: str | None = None
    finishes: bool = False
    needed_to_stop: bool = False
    optional: bool = False


@dataclass
class Running:
    """A service's process and its history. The process's own lines begin `log_start` bytes into the log, which holds older ones."""

    service: Service
    process: subprocess.Popen[bytes]
    log_start: int
    ready: bool = False
    finished: bool = False
    quick_deaths: int = 0
    deaths: list[float] = field(default_factory=list, repr=False)
    """When it died, monotonic seconds."""
    restart_at: float | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Ending:
    """A process that was asked to end, and when (monotonic seconds) it is killed."""

    process: subprocess.Popen[bytes]
    kill_at: float


class Supervisor:
    """Starts services, watches them in `poll`, and ends one in `end` or all in `stop`.

    `given_up` says why, by name, of optional services that were given up since it was cleared last.

    Args:
        log_dir: one file a service.
        environment: what the services' processes see.
        say: prints one line for people.
        secret_url: whose credentials are not said, as those that the environment holds.
    """

    def __init__(
        self, *, log_dir: Path, environment: Mapping[str, str], say: Callable[[str], None], secret_url: str | None = None
    ) -> None:
        self._log_dir = log_dir
        self._environment = dict(environment)
        self._say = say
        self._secrets = known_secrets(environment, secret_url)
        self._running: dict[str, Running] = {}
        self._ending: dict[str, Ending] = {}
        self.given_up: dict[str, str] = {}
        self._http = httpx.Client(timeout=2.0, trust_env=False)

    def start(self, service: Service) -> None:
        """Start a service; returns at once."""
        process, log_start = self._spawn(service)
        self._running[service.name] = Running(service, process, log_start)

    def end(self, name: str) -> None:
        """Ask one service to end; returns at once. `poll` kills it when GRACE_S is over, and nothing starts it again."""
        process = self._running.pop(name).process
        if process.poll() is None:
            process.terminate()
        self._ending[name] = Ending(process, time.monotonic() + GRACE_S)

    def give_up(self, name: str, reason: str) -> None:
        """Say that an optional service is done without, and remember why."""
        self.given_up[name] = reason
        self._say(f"{name} is given up, the others go on: {reason}")

    def stop(self) -> None:
        """End everything, politely first."""
        by_turn = [
            [item.process for item in self._running.values() if item.service.needed_to_stop is last] for last in (False, True)
        ]
        try:
            stop_all([*by_turn[0], *(ending.process for ending in self._ending.values())], grace_s=GRACE_S)
        finally:
            stop_all(by_turn[1], grace_s=GRACE_S)
            self._http.close()

    def poll(self) -> None:
        """Look once at every service: note who became ready, restart who died, see off who was asked to end.

        Raises:
            ServiceFailedError: a service that is not optional died QUICK_DEATHS times before it was
                ready or MANY_DEATHS times in all, or its configuration is wrong.
        """
        for name, ending in list(self._ending.items()):
            self._see_off(name, ending)
        for running in list(self._running.values()):
            if running.finished:
                continue
            if running.restart_at is not None:
                self._restart_when_due(running)
            elif running.process.poll() is not None:
                self._on_death(running, running.process.returncode)
            elif not running.ready:
                running.ready = self._is_ready(running.service)
                if running.ready:
                    running.quick_deaths = 0
                    self._say(f"{running.service.name} is ready")

    @property
    def all_ready(self) -> bool:
        """Whether every service is ready or finished."""
        return self.ready == len(self._running)

    @property
    def ready(self) -> int:
        """How many services are ready or finished."""
        return sum(running.ready or running.finished for running in self._running.values())

    def wait_ready(self) -> None:
        """Poll until every service is ready or finished."""
        while not self.all_ready:
            self.poll()
            time.sleep(POLL_S)

    def finished(self, name: str) -> bool:
        """Whether a service's work is done."""
        return self._running[name].finished

    @property
    def names(self) -> set[str]:
        """Of the services that are to run; those that end or were given up are not among them."""
        return set(self._running)

    @property
    def ending(self) -> list[str]:
        """Names of the services that were asked to end and have not."""
        return list(self._ending)

    def pids(self) -> dict[str, int]:
        """Process id by service, of those that run and were not asked to end."""
        return {name: running.process.pid for name, running in self._running.items() if running.process.poll() is None}

    def _spawn(self, service: Service) -> tuple[subprocess.Popen[bytes], int]:
        path = self._log_path(service)
        log_start = path.stat().st_size if path.exists() else 0
        return spawn(service.command, log_path=path, environment=self._environment), log_start

    def _on_death(self, running: Running, code: int) -> None:
        service = running.service
        kill_group(running.process)
        if service.finishes and code == 0:
            running.finished = True
            return
        if not running.ready:
            running.quick_deaths += 1
        now = time.monotonic()
        running.deaths = [died for died in running.deaths if now - died < MANY_DEATHS_S] + [now]
        too_many = running.quick_deaths >= QUICK_DEATHS or len(running.deaths) >= MANY_DEATHS
        if code in HOPELESS_EXIT_CODES or too_many:
            self._fail(running, code)
            return
        delay_s = min(FIRST_BACKOFF_S * 2**running.quick_deaths, LONGEST_BACKOFF_S)
        self._say(
            f"{service.name} ended with {_describe(code)}; it starts again in {delay_s:g} s (log: {self._log_path(service)})"
        )
        running.ready = False
        running.restart_at = time.monotonic() + delay_s

    def _fail(self, running: Running, code: int) -> None:
        service = running.service
        what = f"{service.name} ended with {_describe(code)}:\n{self._log_tail(running)}"
        if not service.optional:
            raise ServiceFailedError(what, code)
        del self._running[service.name]
        self.give_up(service.name, what)

    def _see_off(self, name: str, ending: Ending) -> None:
        if ending.process.poll() is None:
            if time.monotonic() >= ending.kill_at:
                kill_group(ending.process)
            return
        kill_group(ending.process)
        del self._ending[name]
        self._say(f"{name} has ended")

    def _restart_when_due(self, running: Running) -> None:
        assert running.restart_at is not None
        if time.monotonic() < running.restart_at:
            return
        running.restart_at = None
        running.process, running.log_start = self._spawn(running.service)

    def _is_ready(self, service: Service) -> bool:
        if service.ready_url is None:
            return True
        try:
            return self._http.get(service.ready_url).status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def _log_path(self, service: Service) -> Path:
        return self._log_dir / f"{service.name}.log"

    def _log_tail(self, running: Running) -> str:
        path = self._log_path(running.service)
        tail = tail_for_people(path, start=running.log_start, lines=LOG_TAIL_LINES, secrets=self._secrets)
        lines = tail or ["it wrote nothing to its log"]
        return "\n".join(f"  {line}" for line in lines) + f"\n(whole log: {path})"


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
